"""The probe engine without a server: what counts as a difference, and that nothing of an answer is lost on the way."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from subprocess import run
from threading import Thread

import httpx
import openai
import pytest

from vllm_deterministic.verify import probes
from vllm_deterministic.verify.probes import Answer, Endpoint, Probe, ask, by_choice, compare, digest, neighbour

ANSWER = Answer(
    text="a b",
    token_ids=(5, 6),
    tokens=("a", " b"),
    logprobs=(-0.25, -1.5),
    top_logprobs=((("a", -0.25),), ((" b", -1.5), (" c", -2.0))),
    finish_reason="length",
)


def test_equal_answers():
    result = compare([ANSWER] * 3)
    assert result.identical
    assert (result.runs, result.distinct_texts, result.distinct_logprobs, result.distinct_digests) == (3, 1, 1, 1)
    assert result.first_text_divergence is result.first_logprob_divergence is None


def test_one_bit_of_one_logprob_is_a_difference():
    nudged = replace(ANSWER, logprobs=(-0.25, -1.5 - 2**-23))
    result = compare([ANSWER, nudged, ANSWER])
    assert not result.identical
    assert (result.distinct_texts, result.distinct_logprobs) == (1, 2)
    assert (result.first_text_divergence, result.first_logprob_divergence) == (None, 1)


def test_signed_zero_is_a_difference():
    assert (
        compare([replace(ANSWER, logprobs=(0.0, -1.5)), replace(ANSWER, logprobs=(-0.0, -1.5))]).distinct_logprobs == 2
    )


def test_earliest_divergence_and_length():
    longer = replace(ANSWER, token_ids=(5, 6, 7), text="a b c")
    other = replace(ANSWER, token_ids=(9, 6), text="x b")
    assert compare([ANSWER, longer]).first_text_divergence == 2
    assert compare([ANSWER, longer, other]).first_text_divergence == 0
    assert compare([ANSWER, longer, other]).distinct_texts == 3


def test_without_token_ids_texts_are_compared():
    bare = Answer("abc")
    assert compare([bare, Answer("abd")]).first_text_divergence == 2


@pytest.mark.parametrize(
    "change",
    [
        {"text": "a c"},
        {"token_ids": (5, 7)},
        {"tokens": ("a", "b")},
        {"logprobs": (-0.25, -1.5000001)},
        {"top_logprobs": ((("a", -0.25),), ((" b", -1.5), (" d", -2.0)))},
        {"finish_reason": "stop"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_digest_sees(change):
    assert digest(replace(ANSWER, **change)) != digest(ANSWER)


def test_digest_ignores_what_is_not_the_answer():
    assert digest(replace(ANSWER, index=3, seeds=(1,), prompt_token_ids=(1, 2))) == digest(ANSWER)


def test_digest_is_the_same_in_every_process():
    """Python randomises hash(); a digest that is written down must not depend on it."""
    code = "from vllm_deterministic.verify.probes import *; print(digest(Answer('a', (1,), ('a',), (-0.1,))))"
    printed = {run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert printed == {digest(Answer("a", (1,), ("a",), (-0.1,))) + "\n"}


def test_choices_are_compared_one_by_one():
    mixed = [ANSWER, replace(ANSWER, index=1, text="other")] * 2
    with pytest.raises(ValueError, match="by_choice"):
        compare(mixed)
    assert {index: compare(answers).identical for index, answers in by_choice(mixed).items()} == {0: True, 1: True}
    with pytest.raises(ValueError, match="no answers"):
        compare([])


def test_neighbours_are_reproducible_and_unseeded():
    first, second = ([neighbour(random.Random(7)) for _ in range(1)] for _ in range(2))
    assert first == second
    many = [neighbour(random.Random(seed)) for seed in range(100)]
    assert all(one.seed is None for one in many)
    assert len({one.max_tokens for one in many}) > 10
    assert {one.stream for one in many} == {True, False}
    assert {one.temperature == 0 for one in many} == {True, False}


ENDPOINT = Endpoint("http://127.0.0.1:1/v1", "m")


def test_request_says_only_what_was_asked():
    body = Probe("p", [1, 2], max_tokens=3, logprobs=None).request(replace(ENDPOINT, token_ids=False))
    assert body == {"model": "m", "prompt": [1, 2], "max_tokens": 3, "temperature": 0.0, "n": 1}
    chat = Probe("p", "hi", chat=True, logprobs=2, seed=1, stream=True, extra_body={"top_k": 5}).request(ENDPOINT)
    assert chat["messages"] == [{"role": "user", "content": "hi"}]
    assert (chat["logprobs"], chat["top_logprobs"], chat["stream"], chat["seed"]) == (True, 2, True, 1)
    assert chat["extra_body"] == {"return_token_ids": True, "top_k": 5}


@pytest.mark.parametrize(
    "probe", [Probe("p"), Probe("p", "x", messages=[{"role": "user", "content": "x"}]), Probe("p", [1], chat=True)]
)
def test_request_that_makes_no_sense(probe):
    with pytest.raises(ValueError, match="probe 'p'"):
        probe.request(ENDPOINT)


# --- a stand-in for the server: one answer of two choices, delivered in the four ways ------------------------------
VALUE = -0.10011976957321167
PIECES = [("Hel", 11, VALUE), ("lo", 12, -2.5)]


def _completion_choice(index: int, pieces: list, finish: str | None) -> dict:
    names = [text for text, _, _ in pieces]
    scores = [value for _, _, value in pieces]
    logprobs = {
        "tokens": names,
        "token_logprobs": scores,
        "top_logprobs": [{"Z": -9.5, text: value} for text, _, value in pieces],
        "text_offset": [0] * len(pieces),
    }
    ids = [token for _, token, _ in pieces]
    text = "".join(names)
    return {"index": index, "text": text, "logprobs": logprobs, "token_ids": ids, "finish_reason": finish}


def _chat_choice(index: int, pieces: list, finish: str | None, said: str) -> dict:
    content = [
        {
            "token": text,
            "bytes": None,
            "logprob": value,
            "top_logprobs": [
                {"token": name, "logprob": at, "bytes": None} for name, at in ((text, value), ("Z", -9.5))
            ],
        }
        for text, _, value in pieces
    ]
    return {
        "index": index,
        said: {"role": "assistant", "content": "".join(text for text, _, _ in pieces)},
        "logprobs": {"content": content},
        "token_ids": [token for _, token, _ in pieces],
        "finish_reason": finish,
    }


class _Events(httpx.AsyncByteStream):
    def __init__(self, chunks: list[dict]) -> None:
        self._lines = [*(json.dumps(chunk) for chunk in chunks), "[DONE]"]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for line in self._lines:
            yield f"data: {line}\n\n".encode()


def _serve(request: httpx.Request) -> httpx.Response:
    body = json.loads(request.content)
    chat = request.url.path.endswith("/chat/completions")
    if body.get("use_beam_search"):
        error = {"message": "no", "type": "BadRequestError", "param": "use_beam_search", "code": 400}
        return httpx.Response(400, json={"error": error})
    head = {"id": "1", "created": 1, "model": "m", "object": "x"}
    indices = range(body["n"])
    if not body.get("stream"):
        make = (lambda i, p, f: _chat_choice(i, p, f, "message")) if chat else _completion_choice
        choices = [make(index, PIECES, "stop") for index in indices]
        return httpx.Response(
            200, headers={probes.SEED_HEADER: "41,42"}, json={**head, "prompt_token_ids": [1, 2], "choices": choices}
        )
    make = (lambda i, p, f: _chat_choice(i, p, f, "delta")) if chat else _completion_choice
    chunks = [
        {**head, "prompt_token_ids": [1, 2] if at == 0 else None, "choices": [make(index, [piece], finish)]}
        for at, (piece, finish) in enumerate(zip(PIECES, (None, "stop"), strict=True))
        for index in indices
    ]
    return httpx.Response(
        200, headers={"content-type": "text/event-stream", probes.SEED_HEADER: "41,42"}, stream=_Events(chunks)
    )


@pytest.fixture
def client() -> openai.AsyncOpenAI:
    transport = httpx.AsyncClient(transport=httpx.MockTransport(_serve))
    return openai.AsyncOpenAI(base_url=ENDPOINT.base_url, api_key="EMPTY", http_client=transport, max_retries=0)


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("n", [1, 2])
def test_ask_reads_the_whole_answer(client, chat, stream, n):
    answers = asyncio.run(ask(ENDPOINT, Probe("p", "hi", chat=chat, stream=stream, n=n, temperature=1.0), client))
    assert answers == [
        Answer(
            text="Hello",
            token_ids=(11, 12),
            tokens=("Hel", "lo"),
            logprobs=(VALUE, -2.5),
            top_logprobs=((("Hel", VALUE), ("Z", -9.5)), (("Z", -9.5), ("lo", -2.5))),
            finish_reason="stop",
            index=index,
            prompt_token_ids=(1, 2),
            seeds=(41, 42),
        )
        for index in range(n)
    ]


def test_ask_raises_a_refusal(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        asyncio.run(ask(ENDPOINT, Probe("p", "hi", extra_body={"use_beam_search": True}), client))
    assert refusal.value.param == "use_beam_search"


def test_run_load_asks_as_often_as_it_was_told(client, monkeypatch):
    monkeypatch.setattr(Endpoint, "client", lambda self: client)
    answers = asyncio.run(probes.run_load(ENDPOINT, Probe("p", "hi"), repeats=5, concurrency=2, neighbours=3))
    assert len(answers) == 5
    assert compare(answers).identical


def test_importing_the_engine_loads_no_vllm():
    code = (
        "import sys, vllm_deterministic.verify.probes, vllm_deterministic.verify.server; "
        "print([name for name in ('vllm', 'torch', 'transformers') if name in sys.modules])"
    )
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_connection_that_was_idle_is_not_used_again() -> None:
    """A server closes it at a time of its own. Control: one that was not idle is."""
    ports = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            ports.append(self.client_address[1])
            said = b'{"object": "list", "data": []}'
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None:
            pass

    async def ask_thrice(port: int) -> None:
        async with Endpoint(f"http://127.0.0.1:{port}/v1", "m").client() as client:
            await client.models.list()
            await client.models.list()
            await asyncio.sleep(1.5)
            await client.models.list()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        asyncio.run(ask_thrice(server.server_address[1]))
        server.shutdown()
    first, again, later = ports
    assert first == again != later
