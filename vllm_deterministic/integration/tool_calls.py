"""Ids of tool calls: vLLM draws them at random, and clients send them back in the next turn's prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm_deterministic import compat
from vllm_deterministic.integration.refusals import refusal
from vllm_deterministic.serving.fingerprint import digest_of
from vllm_deterministic.serving.receipts import prompt_digest

__all__ = ["arm", "tool_call_id"]


def arm() -> None:
    """Has every parser of this process name tool calls by request and position. Idempotent. Raises SeamError."""
    for name in ("parse", "parse_delta", "parser_prompt"):  # overridden by the class that `parser` hands out
        compat.probe(compat.WIRE_SEAMS[name])
    compat.install(compat.WIRE_SEAMS["parser"], _naming)


def tool_call_id(prompt_token_ids: Sequence[int], seed: int | None, position: int) -> str:
    """The id of an answer's tool call number `position`, in the form that vLLM gives its random ones."""
    return f"chatcmpl-tool-{digest_of([prompt_digest(prompt_token_ids), seed, position])[:16]}"


def _naming(get_parser: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_parser)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        parser = get_parser(*args, **kwargs)
        return parser if parser is None else type(parser.__name__, (_Naming, parser), {})

    return wrapped


class _Naming:
    """Goes before a vLLM `Parser` among a class's bases: chat and Responses, whole and streamed, ask it alone."""

    _prompt: Sequence[int] | None = None

    def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
        self._prompt = prompt_token_ids
        super().set_prompt_token_ids(prompt_token_ids)  # type: ignore[misc]

    def parse(self, model_output: str, request: Any, *args: Any, **kwargs: Any) -> Any:
        reasoning, content, calls = super().parse(model_output, request, *args, **kwargs)  # type: ignore[misc]
        for position, call in enumerate(calls or ()):
            call.id = self._name(request, position)
        return reasoning, content, calls

    def parse_delta(
        self, delta_text: str, delta_token_ids: Any, request: Any, prompt_token_ids: Any = None, **kwargs: Any
    ) -> Any:
        self._prompt = prompt_token_ids or self._prompt
        delta = super().parse_delta(delta_text, delta_token_ids, request, prompt_token_ids, **kwargs)  # type: ignore[misc]
        for call in delta.tool_calls or () if delta else ():
            if call.id is not None:
                call.id = self._name(request, call.index)
        return delta

    def _name(self, request: Any, position: int) -> str:
        if self._prompt is None:  # chat and Responses always say it; a request to parse a finished answer may not
            message = "the id of a tool call derives from its prompt: send prompt_token_ids"
            raise refusal(message, parameter="prompt_token_ids", reason="not_proved")
        return tool_call_id(self._prompt, getattr(request, "seed", None), position)
