"""The contract on the wire, over HTTP with the `openai` client: fingerprints, demands, receipts, replay."""

from __future__ import annotations

import asyncio
import contextlib
import json

import openai
import pytest

from vllm_deterministic import cli
from vllm_deterministic.serving.receipts import first_divergence
from vllm_deterministic.serving.replay import choices_of, find_receipt, replay
from vllm_deterministic.verify.probes import run_load

pytestmark = pytest.mark.serving

MAIN = "det-bf16-compiled-2048"
main = pytest.mark.parametrize("config", [MAIN])
other = pytest.mark.parametrize("config", ["det-f32-eager-2048-small-random"])
plain = pytest.mark.parametrize("config", ["plain-bf16-eager-2048"])

ELSEWHERE = "vd1-" + "0" * 32
RECEIPT = {"deterministic": {"receipt": True}, "return_token_ids": True}
MESSAGES = [{"role": "user", "content": "Name three colours."}]


def client(server, kind=openai.OpenAI):
    http = {openai.OpenAI: openai.DefaultHttpxClient, openai.AsyncOpenAI: openai.DefaultAsyncHttpxClient}[kind]
    return kind(base_url=server.base_url, api_key="EMPTY", max_retries=0, http_client=http(trust_env=False))


def described(server):
    """The body of GET /deterministic."""
    return client(server).get(f"{server.url}/deterministic", cast_to=object)


def completion(server, **options):
    body = {"model": server.model, "prompt": "The map shows", "max_tokens": 12, "temperature": 0.8} | options
    return client(server).completions.create(**body)


def chat(server, **options):
    body = {"model": server.model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0.8} | options
    return client(server).chat.completions.create(**body)


def reseeded(receipt):
    body = receipt.request.body | {"seed": receipt.request.body["seed"] + 1}
    return receipt.model_copy(update={"request": receipt.request.model_copy(update={"body": body})})


@pytest.fixture(scope="session")
def receipt_of_main(servers):
    """Made while MAIN runs for the other tests, which need not start again for the one that replays it elsewhere."""
    return find_receipt(completion(servers.get(MAIN), max_tokens=32, extra_body=RECEIPT).model_dump_json())


@main
def test_every_answer_and_chunk_carries_the_fingerprint(servers, config):
    server = servers.get(config)
    there = described(server)
    fingerprint = there["fingerprint"]
    assert there["parts"]["numerics.dtype"] == "bfloat16"
    assert there["parts"]["numerics_id"].startswith("v1-")
    assert {"linear", "attention"} <= set(there["parts"]["numerics.trees"])
    assert {shape["operator"] for shape in there["certified"]} == {"linear", "attention"}
    assert there["versions"]["vllm_deterministic"]
    assert "LoRA" in there["refused"]
    for ask in (completion, chat):
        assert ask(server).system_fingerprint == fingerprint
        for extra in ({}, {"stream_options": {"include_usage": True}}):
            chunks = list(ask(server, stream=True, **extra))
            assert len(chunks) > 10
            assert {chunk.system_fingerprint for chunk in chunks} == {fingerprint}

    async def asynchronously():
        async with client(server, openai.AsyncOpenAI) as own:
            return await own.completions.create(model=server.model, prompt="x", max_tokens=1)

    assert asyncio.run(asynchronously()).system_fingerprint == fingerprint
    response = client(server).responses.create(model=server.model, input="Hi", max_output_tokens=4)
    assert response.metadata["system_fingerprint"] == fingerprint
    assert client(server).models.list().model_extra["deterministic"]["fingerprint"] == fingerprint


@main
def test_demands(servers, config):
    server = servers.get(config)
    mine = described(server)["fingerprint"]
    for allowed in ("require", True, False, None, {"require": mine}, {"require": True}):
        assert chat(server, max_tokens=1, extra_body={"deterministic": allowed}).system_fingerprint == mine
    for stream in (False, True):
        with pytest.raises(openai.ConflictError) as conflict:
            completion(server, stream=stream, extra_body={"deterministic": {"require": ELSEWHERE}})
        assert mine in str(conflict.value)
        assert ELSEWHERE in str(conflict.value)
        for ask in (completion, chat):
            with pytest.raises(openai.BadRequestError) as refusal:
                ask(server, stream=stream, extra_body={"deterministic": {"demand": True}})
            assert refusal.value.param == "deterministic.demand"


@plain
def test_a_server_without_the_flag_promises_nothing(servers, config):
    server = servers.get(config)
    for ask in (completion, chat):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as refusal:
                ask(server, stream=stream, extra_body={"deterministic": "require"})
            assert refusal.value.param == "deterministic"
        # The control: it answers who asks for nothing, as vLLM does.
        answer = ask(server, extra_body={"deterministic": False})
        assert answer.system_fingerprint.startswith("vllm-")
    with pytest.raises(openai.NotFoundError):
        described(server)


@main
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("ask", [completion, chat])
def test_receipts_are_of_the_answer(servers, config, ask, n):
    """Built from the answer by the client, the chains are those that the server gave; streamed, they are the same."""
    server = servers.get(config)
    logprobs = {"logprobs": True} if ask is chat else {"logprobs": 0}
    answer = ask(server, n=n, extra_body=RECEIPT, **logprobs)
    receipt = find_receipt(answer.model_dump_json())
    assert choices_of(answer.model_dump()) == (receipt.prompt.digest, receipt.choices)
    assert [choice.tokens for choice in receipt.choices] == [12] * n
    assert isinstance(receipt.request.body["seed"], int)
    assert receipt.fingerprint == answer.system_fingerprint

    # Neither streaming nor logprobs asked for: the same receipt, and the answer says no logprobs.
    *_, last = ask(server, n=n, stream=True, extra_body=RECEIPT)
    streamed = find_receipt(last.model_dump_json())
    assert streamed.choices == receipt.choices
    without = ask(server, n=n, extra_body=RECEIPT)
    assert all(choice.logprobs is None for choice in without.choices)
    assert find_receipt(without.model_dump_json()).choices == receipt.choices

    # The control: an answer that was altered or cut is not the receipt's.
    altered = answer.model_dump()
    altered["choices"][0]["token_ids"][5] += 1
    parted = first_divergence(receipt.choices[0], choices_of(altered)[1][0])
    assert (parted.position, parted.what) == (5, "tokens")


@main
def test_receipt_of_an_answer_that_its_text_ends(servers, config):
    """A stop string is seen by the HTTP server, not by the engine; with and without logprobs asked for."""
    server = servers.get(config)
    text = completion(server).choices[0].text
    stop = text[len(text) // 2 :][:4]
    ended = completion(server, stop=[stop], logprobs=0, extra_body=RECEIPT)
    assert ended.choices[0].finish_reason == "stop"
    receipt = find_receipt(ended.model_dump_json())
    assert choices_of(ended.model_dump()) == (receipt.prompt.digest, receipt.choices)
    assert 0 < receipt.choices[0].tokens < 12
    *_, last = completion(server, stop=[stop], stream=True, extra_body=RECEIPT)
    assert find_receipt(last.model_dump_json()).choices == receipt.choices


@main
def test_metrics_count(servers, config):
    server = servers.get(config)
    names = ("requests", "refused_requests", "receipts")

    def refused():
        with pytest.raises(openai.BadRequestError):
            completion(server, extra_body={"deterministic": "maybe"})

    refused()  # a counter with labels shows nothing before its first
    completion(server, max_tokens=1, extra_body={"deterministic": False})
    declined = server.metric('vllm_deterministic_requests_total{asked="declined"}')
    completion(server, max_tokens=1, extra_body={"deterministic": False})
    assert server.metric('vllm_deterministic_requests_total{asked="declined"}') == declined + 1
    before = [server.metric(f"vllm_deterministic_{name}_total") for name in names]
    completion(server, extra_body=RECEIPT)
    refused()
    after = [server.metric(f"vllm_deterministic_{name}_total") for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1, 1]
    assert server.metric("vllm_deterministic_certified_shapes") > 0
    assert server.metric('vllm_deterministic_schedules{state="certified"}') > 32
    assert server.metric('vllm_deterministic_schedules{state="dropped"}') >= 0
    assert server.metric("vllm_deterministic_certification_seconds") > 0
    for result in ("same", "differs", "failed"):  # no self-check was asked for
        assert server.metric(f'vllm_deterministic_self_checks_total{{result="{result}"}}') == 0
    assert server.log.read_text(errors="replace").count("schedules certified and") == 1


REFUSED = {
    "malformed": ({"deterministic": {"demand": True}}, "deterministic.*"),
    "other_fingerprint": ({"deterministic": {"require": ELSEWHERE}}, "deterministic.require"),
    "not_proved": ({"use_beam_search": True, "n": 2}, "use_beam_search"),
    "receipt": (RECEIPT, "deterministic.receipt"),
}


@main
def test_refusals_are_counted_by_reason(servers, config):
    """Each by its own reason, once, and none of them as a request answered under the promise."""
    server = servers.get(config)

    def counted():
        found = {}
        for reason, (_, field) in REFUSED.items():
            name = f'vllm_deterministic_refused_requests_total{{field="{field}",reason="{reason}"}}'
            with contextlib.suppress(KeyError):
                found[reason] = server.metric(name)
        return found

    answered = server.metric("vllm_deterministic_requests_total")
    for reason, (body, _) in REFUSED.items():
        before = counted()
        with pytest.raises(openai.APIStatusError):
            completion(server, prompt=["a", "b"], temperature=0, extra_body=body)
        assert counted() == {**before, reason: before.get(reason, 0) + 1}
    assert server.metric("vllm_deterministic_requests_total") == answered


@main
def test_receipt_of_several_prompts_is_refused(servers, config):
    with pytest.raises(openai.BadRequestError) as refusal:
        completion(servers.get(config), prompt=["a", "b"], extra_body=RECEIPT)
    assert refusal.value.param == "deterministic.receipt"


@main
@pytest.mark.usefixtures("receipt_of_main")
def test_replay_gives_the_same_bits_under_load(servers, probes, config, tmp_path, capsys):
    server = servers.get(config)
    path = tmp_path / "answer.json"
    path.write_text(chat(server, extra_body=RECEIPT).model_dump_json())

    async def crowded():
        load = asyncio.create_task(run_load(server.endpoint, probes["greedy"], repeats=2, neighbours=24))
        await asyncio.sleep(0.5)
        result = await asyncio.to_thread(replay, find_receipt(path.read_text()), server.url)
        await load
        return result

    result = asyncio.run(crowded())
    assert (result.same_bits, result.reasons) == (True, [])
    assert cli.main(["replay", str(path), "--url", server.url]) == 0
    assert "same bits" in capsys.readouterr().out
    # The control: a receipt that says something else is caught.
    changed = json.loads(path.read_text())
    changed["deterministic"]["receipt"]["choices"][0] |= {"digest": "0", "token_chain": ["0"] * 12}
    path.write_text(json.dumps(changed))
    assert cli.main(["replay", str(path), "--url", server.base_url]) == 1
    assert "tokens from position 0" in capsys.readouterr().out


@other
def test_replay_elsewhere_says_why_it_differs(servers, receipt_of_main, config):
    server = servers.get(config)
    result = replay(receipt_of_main, server.url, model=server.model)
    assert not result.same_bits
    assert {"numerics.dtype", "numerics.compile_mode", "settings.unseeded", "weights"} <= set(result.reasons)
    # The control: with its own seed drawn at random, the receipt names it, and the replay gives the same bits.
    own = find_receipt(completion(server, extra_body=RECEIPT).model_dump_json())
    assert replay(own, server.url).same_bits
    assert not replay(reseeded(own), server.url).same_bits
