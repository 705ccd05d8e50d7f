"""Conversations with tools, two turns of them: the first turn's call, its id included, is the second turn's prompt.

The model calls no tool of its own accord: it is made to, by tool_choice or, where that leaves the choice to it, by a
grammar. The chat template writes the ids of the calls into the prompt, as those of many models do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from pathlib import Path

import openai
import pytest

from vllm_deterministic import policy
from vllm_deterministic.serving.replay import find_receipt, replay
from vllm_deterministic.verify.server import serve

pytestmark = [pytest.mark.serving, pytest.mark.slow]

ARGUMENTS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Rome", "Lima"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "The weather of a city.", "parameters": ARGUMENTS}
QUESTION = "How will the weather be in Rome and in Oslo?"
CHOICES = ("required", "named", "auto")
# Two calls in the parser's own form.
_ARGUMENTS = r'\{"city": "(Oslo|Rome|Lima)", "days": [1-9]\}'
_HERMES = rf'<tool_call>\n\{{"name": "weather", "arguments": {_ARGUMENTS}\}}\n</tool_call>'
TWICE = {"hermes": rf"{_HERMES}\n{_HERMES}"}


@dataclasses.dataclass(frozen=True)
class Told:
    """What a conversation was: id, name and arguments of each call, then the second turn, bit by bit.

    prompt: the second turn's token ids; Responses tell their number alone, and no logprobs.
    """

    calls: tuple[tuple[str, str, str], ...]
    answer: str
    logprobs: tuple[float, ...] = ()
    prompt: tuple[int, ...] | int = 0


class Conversation:
    """One question to one server, asked in two turns."""

    def __init__(self, server, parser, choice, question=QUESTION, **sampling):
        self.server, self.choice, self.question = server, choice, question
        self.sampling = {"temperature": 0.8, "seed": 5} | sampling
        self.twice = {"structured_outputs": {"regex": TWICE[parser]}} if choice == "auto" else {}
        # A strict tool has a grammar of its own, which where the choice is free may end after one call.
        self.weather = {**WEATHER, "strict": choice != "auto"}

    @contextlib.asynccontextmanager
    async def client(self):
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(
            base_url=self.server.base_url, api_key="x", max_retries=0, http_client=http
        ) as client:
            yield client

    async def chat(self, stream: bool) -> Told:
        tools = [{"type": "function", "function": self.weather}]
        named = {"type": "function", "function": {"name": "weather"}}
        messages = [{"role": "user", "content": self.question}]
        common = {"model": self.server.model, "tools": tools, **self.sampling}
        async with self.client() as client:
            first = await client.chat.completions.create(
                messages=messages, tool_choice=named if self.choice == "named" else self.choice, stream=stream,
                max_tokens=160, extra_body=self.twice, **common,
            )  # fmt: skip
            calls = await streamed(first) if stream else first.choices[0].message.model_dump()["tool_calls"]
            messages.append({"role": "assistant", "tool_calls": calls})
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": "12 degrees"} for call in calls]
            second = await client.chat.completions.create(
                messages=messages, tool_choice="none", max_tokens=16, logprobs=True,
                extra_body={"return_token_ids": True}, **common,
            )  # fmt: skip
        choice = second.choices[0]
        return Told(
            tuple((call["id"], call["function"]["name"], same(call["function"]["arguments"])) for call in calls),
            choice.message.content,
            tuple(token.logprob for token in choice.logprobs.content),
            tuple(second.prompt_token_ids),
        )

    async def responses(self, stream: bool) -> Told:
        tools = [{"type": "function", **self.weather}]
        named = {"type": "function", "name": "weather"}
        messages = [{"role": "user", "content": self.question}]
        sampling = {name: value for name, value in self.sampling.items() if name != "seed"}
        common = {"model": self.server.model, "tools": tools, **sampling}
        seed = {"seed": self.sampling["seed"]}
        async with self.client() as client:
            first = await client.responses.create(
                input=messages, tool_choice=named if self.choice == "named" else self.choice, stream=stream,
                max_output_tokens=160, extra_body=seed | self.twice, **common,
            )  # fmt: skip
            if stream:
                first = [event async for event in first][-1].response
            calls = [item for item in first.output if item.type == "function_call"]
            messages += [call.model_dump(exclude_none=True) for call in calls]
            messages += [{"type": "function_call_output", "call_id": c.call_id, "output": "12 degrees"} for c in calls]
            second = await client.responses.create(
                input=messages, tool_choice="none", max_output_tokens=16, extra_body=seed, **common
            )
        told = tuple((call.call_id, call.name, same(call.arguments)) for call in calls)
        return Told(told, second.output_text, prompt=second.usage.input_tokens)


async def streamed(chunks) -> list[dict]:
    """The calls that a stream of chunks brings piece by piece."""
    calls: list[dict] = []
    async for chunk in chunks:
        for piece in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
            if piece.index == len(calls):
                name = piece.function.name
                calls.append({"id": piece.id, "type": "function", "function": {"name": name, "arguments": ""}})
            calls[piece.index]["function"]["arguments"] += piece.function.arguments or ""
    return calls


def same(arguments: str) -> str:
    """vLLM writes a whole call's arguments anew and streams them as the model wrote them: their spaces differ."""
    return json.dumps(json.loads(arguments), sort_keys=True)


@contextlib.contextmanager
def served(model, parser: str, log: Path, *options: str):
    template = Path(__file__).with_name("tools.jinja")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", parser, "--chat-template", str(template))
    sizes = ("--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager")
    with serve(model("bfloat16"), *sizes, *tools, *options, env={"VLLM_CPU_KVCACHE_SPACE": "1"}, log=log) as server:
        yield server


@pytest.fixture(scope="module", params=sorted(TWICE))
def parser(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(servers, model, parser, tmp_path_factory):
    servers.stop()
    with served(model, parser, tmp_path_factory.mktemp("tools") / "log", "--deterministic") as running:
        yield running


def test_the_list_is_the_proof():
    assert set(policy.TOOL_CALL_PARSERS) == set(TWICE)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_two_turns(server, parser, api, choice):
    """Whole and streamed, alone and with neighbours that call tools as well: one conversation."""
    mine = Conversation(server, parser, choice)
    others = [Conversation(server, parser, CHOICES[i % 3], f"And in {i} days?", seed=i) for i in range(6)]

    async def told() -> tuple[list[Told], list[Told]]:
        alone = [await getattr(mine, api)(stream) for stream in (False, True)]
        together = await asyncio.gather(
            *(getattr(mine, api)(stream) for stream in (False, True)),
            *(other.chat(True) for other in others),
            *(other.responses(False) for other in others),
        )
        return [*alone, *together[:2]], together[2:]

    tellings, neighbours = asyncio.run(told())
    assert len(set(tellings)) == 1
    calls = tellings[0].calls
    assert len(calls) == (2 if choice == "auto" else 1)
    # Ids are of one answer: no other question's, none twice.
    ids = [call[0] for call in calls]
    assert len({*ids}) == len(ids)
    assert not {*ids} & {call[0] for one in neighbours for call in one.calls}


def test_other_seeds_have_other_ids(server, parser):
    async def told() -> set[str]:
        conversations = [Conversation(server, parser, "required", seed=seed) for seed in (1, 2, 3)]
        return {(await one.chat(False)).calls[0][0] for one in conversations}

    assert len(asyncio.run(told())) == 3


def test_receipts_of_tool_calls(server):
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=server.base_url, api_key="x", max_retries=0, http_client=http) as client:
        common = {
            "model": server.model, "messages": [{"role": "user", "content": QUESTION}], "tool_choice": "required",
            "tools": [{"type": "function", "function": {**WEATHER, "strict": True}}], "max_tokens": 160,
            "temperature": 0.8, "extra_body": {"deterministic": {"receipt": True}},
        }  # fmt: skip
        answer = client.chat.completions.create(**common)
        *_, last = client.chat.completions.create(stream=True, **common)
        receipt = find_receipt(answer.model_dump_json())
        assert find_receipt(last.model_dump_json()).choices == receipt.choices
        assert replay(receipt, server.url).same_bits

        with pytest.raises(openai.BadRequestError) as several:
            client.chat.completions.create(n=2, **common)
        assert several.value.param == "n"
        with pytest.raises(openai.BadRequestError) as built_in:
            client.responses.create(model=server.model, input="Hi", tools=[{"type": "web_search"}])
        assert built_in.value.param == "tools"


def test_control(servers, model, tmp_path):
    """Without the flag each call has another id, so that the second turn has another prompt and other logprobs."""
    servers.stop()
    with served(model, "hermes", tmp_path / "log") as server:
        for api in ("chat", "responses"):
            for choice in CHOICES:
                mine = Conversation(server, "hermes", choice)
                first, second = (asyncio.run(getattr(mine, api)(False)) for _ in range(2))
                assert not {call[0] for call in first.calls} & {call[0] for call in second.calls}
                assert first.logprobs != second.logprobs or api == "responses"
