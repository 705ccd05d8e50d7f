"""Ids of tool calls on vLLM's own parsers, at vLLM's own seam: a function of prompt, seed and position."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="its parsers")
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.parser.parser_manager import ParserManager

from vllm_deterministic.integration.tool_calls import _naming, tool_call_id

PROMPT = [3, 1, 4]
CALL = '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
TEXT = CALL.format("Rome") + "\n" + CALL.format("Oslo")


def request(**more: Any) -> ChatCompletionRequest:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    messages = [{"role": "user", "content": "Hi"}]
    return ChatCompletionRequest(model="m", messages=messages, tools=tools, tool_choice="auto", seed=7, **more)


def parser(get_parser: Any, asked: ChatCompletionRequest) -> Any:
    words = SimpleNamespace(get_vocab=lambda: {"<tool_call>": 1, "</tool_call>": 2})
    return get_parser("hermes", None, True)(words, asked.tools)


def whole(get_parser: Any, prompt: list[int]) -> list[str]:
    asked = request()
    one = parser(get_parser, asked)
    one.set_prompt_token_ids(prompt)
    return [call.id for call in one.parse(TEXT, asked, enable_auto_tools=True)[2]]


def streamed(get_parser: Any, prompt: list[int], step: int) -> list[str]:
    """The same text in pieces of `step` characters: engine outputs merge where the reader is slow."""
    asked = request(stream=True)
    one = parser(get_parser, asked)
    found = []
    for start in range(0, len(TEXT), step):
        last = start + step >= len(TEXT)
        delta = one.parse_delta(
            delta_text=TEXT[start : start + step], delta_token_ids=[5], request=asked, prompt_token_ids=prompt,
            finished=last,
        )  # fmt: skip
        found += [call.id for call in (delta.tool_calls if delta else ()) if call.id]
    return found


def test_ids_are_of_the_request() -> None:
    ours = _naming(ParserManager.get_parser)
    ids = [tool_call_id(PROMPT, 7, position) for position in (0, 1)]
    assert len({*ids, tool_call_id(PROMPT, 8, 0), tool_call_id(PROMPT, None, 0), tool_call_id([3, 1], 7, 0)}) == 5
    assert all(re.fullmatch("chatcmpl-tool-[0-9a-f]{16}", one) for one in ids)
    assert whole(ours, PROMPT) == ids
    for step in (1, 7, len(TEXT)):
        assert streamed(ours, PROMPT, step) == ids
    # The control: vLLM's are new each time.
    assert not {*whole(ParserManager.get_parser, PROMPT)} & {*whole(ParserManager.get_parser, PROMPT)}


def test_no_parser_stays_none_and_no_prompt_is_no_id() -> None:
    assert _naming(ParserManager.get_parser)(None, None) is None
    asked = request()
    with pytest.raises(VLLMValidationError, match="prompt_token_ids"):
        parser(_naming(ParserManager.get_parser), asked).parse(TEXT, asked, enable_auto_tools=True)
