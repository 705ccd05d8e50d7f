"""The point of it all, over HTTP: a live server's log-probabilities are the trainer's, before and after an update."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

pytest.importorskip("vllm")
from vllm_deterministic import policy
from vllm_deterministic.errors import DeterministicError, UnsupportedError
from vllm_deterministic.models import prepare_default_model
from vllm_deterministic.serving.replay import find_receipt
from vllm_deterministic.train import LiveServer, accumulate, deterministic_forward, logprobs
from vllm_deterministic.verify.probes import Answer, Probe, ask
from vllm_deterministic.verify.server import Server, serve

pytestmark = [pytest.mark.serving, pytest.mark.usefixtures("one_thread")]
UPDATES = ("--weight-transfer-config", '{"backend": "safetensors"}')
# Token ids that every model here has. The last prompt has more keys than a prefill's attention would take in one tile.
PROMPTS = [[5 + token % 490 for token in range(length)] for length in (3, 40, 150, 700)]


def started(folder: Path, dtype: str, log: Path, *more: str) -> Any:
    options = ("--dtype", dtype, "--max-model-len", "1024", "--deterministic", "--enforce-eager", *UPDATES, *more)
    return serve(folder, *options, env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}, log=log)


SERVED = (
    "small-float32",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("SmolLM2-float32", "SmolLM2-bfloat16", "ranks-float32")),
)
RANKS = ("--data-parallel-size", "2", "--api-server-count", "1")


@pytest.fixture(scope="module", params=SERVED)
def server(
    request: pytest.FixtureRequest, make: Any, save: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of two layers with random weights, in the slow set one of SmolLM2 (the same operators) and two data
    parallel ranks, both of which every update must reach."""
    size, dtype = request.param.split("-")
    scratch = tmp_path_factory.mktemp("train")
    if size == "SmolLM2":
        folder = prepare_default_model(dtype=dtype)
    else:
        folder = scratch / "model"
        save(make("Llama"), folder)
    with started(folder, dtype, scratch / "server.log", *(RANKS if size == "ranks" else ())) as running:
        yield running


@pytest.fixture
def model(server: Server) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(server.model, dtype="auto")


def sampled(server: Server, max_tokens: int = 32) -> list[Answer]:
    """Two answers to each prompt at once, at temperature 1: 256 tokens."""
    probes = [
        Probe(str(i), prompt, None, max_tokens, 1.0, 7 + i, n=2, logprobs=0, extra_body={"ignore_eos": True})
        for i, prompt in enumerate(PROMPTS)
    ]

    async def all_at_once() -> list[list[Answer]]:
        return list(await asyncio.gather(*(ask(server.endpoint, probe) for probe in probes)))

    return [answer for answers in asyncio.run(all_at_once()) for answer in answers]


def whole(answers: list[Answer]) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompt and answer, and the prompts' lengths."""
    ids = [[*answer.prompt_token_ids, *answer.token_ids] for answer in answers]
    return ids, [len(answer.prompt_token_ids) for answer in answers]


def unequal(answers: list[Answer], scores: list[torch.Tensor]) -> int:
    """How many tokens got another log-probability. JSON carries every bit of an f32."""
    return sum(
        int((torch.tensor(answer.logprobs, dtype=torch.float64) != score.double()).sum())
        for answer, score in zip(answers, scores, strict=True)
    )


@torch.no_grad()
def test_the_samplers_logprobs_are_the_trainers(server, model):
    answers = sampled(server)
    ids, first = whole(answers)
    assert len({answer.token_ids for answer in answers}) == len(answers)
    with deterministic_forward(model):
        LiveServer(server.url).check(model)
        assert unequal(answers, logprobs(model, ids, first)) == 0
        for size in (1, 4):
            parts = [logprobs(model, ids[at : at + size], first[at : at + size]) for at in range(0, len(ids), size)]
            assert unequal(answers, [score for part in parts for score in part]) == 0
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(each)) + each for each in ids])
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in ids])
        scores = model(padded, attention_mask=mask).logits.log_softmax(-1, dtype=torch.float32)
        chosen = scores[:, :-1].gather(-1, padded[:, 1:, None]).squeeze(-1)
        assert unequal(answers, [row[-len(a.token_ids) :] for row, a in zip(chosen, answers, strict=True)]) == 0


@torch.no_grad()
def test_transformers_own_forward_differs(server, model):
    """The negative control."""
    answers = sampled(server)
    ids, first = whole(answers)
    scores = []
    for each, at in zip(ids, first, strict=True):
        logits = model(torch.tensor([each])).logits[0, at - 1 : -1].log_softmax(-1, dtype=torch.float32)
        scores.append(logits.gather(-1, torch.tensor(each[at:])[:, None]).squeeze(1))
    assert unequal(answers, scores) > 0


@pytest.mark.slow  # minutes on two cores
def test_an_update_in_place(server, model):
    live = LiveServer(server.url)
    before = sampled(server)
    ids, first = whole(before)
    with deterministic_forward(model):
        old = live.check(model)
        weights = live.description()["parts"]["weights"]
        accumulate(model, ids, lambda i, scores: -scores.mean(), first)
        with torch.no_grad():
            kept = [parameter.clone() for parameter in model.parameters()]
            for parameter in model.parameters():
                parameter.add_(parameter.grad.sign() * parameter.abs() * -(2**-6))
        with pytest.raises(UnsupportedError, match="weights"):
            live.check(model)

        # A long request is under way while the update comes: it is answered by the old weights, all of it.
        late: list[Answer] = []
        long = Probe("long", PROMPTS[1], None, 200, 1.0, 3, logprobs=0, extra_body={"ignore_eos": True})
        running = threading.Thread(target=lambda: late.extend(asyncio.run(ask(server.endpoint, long))))
        running.start()
        while running.is_alive() and server.metric("vllm:num_requests_running") == 0:
            pass
        new = live.send_weights(model)
        running.join()
        assert new != old
        assert_promised(server, new, instead_of=old)
        assert live.description()["parts"]["weights"] != weights

        after = sampled(server)  # the same prompts: a cached prefix would carry the old weights
        ids, first = whole(after)
        with torch.no_grad():
            assert unequal(after, logprobs(model, ids, first)) == 0
            for parameter, value in zip(model.parameters(), kept, strict=True):
                parameter.copy_(value)
            assert unequal(after, logprobs(model, ids, first)) > 0
            ids, first = whole(late)
            assert unequal(late, logprobs(model, ids, first)) == 0
        assert live.send_weights(model) == old
        assert sampled(server) == before


def assert_promised(server: Server, fingerprint: str, instead_of: str) -> None:
    """Answers carry the fingerprint, receipts name the weights, and whoever demands the former ones is told."""
    now = LiveServer(server.url).description()
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=server.base_url, api_key="x", max_retries=0, http_client=http) as client:
        request: Any = {"model": server.model, "prompt": "The", "max_tokens": 1}
        answer = client.completions.create(**request, extra_body={"deterministic": {"receipt": True}})
        receipt = find_receipt(answer.model_dump_json())
        assert {answer.system_fingerprint, receipt.fingerprint, now["fingerprint"]} == {fingerprint}
        assert receipt.parts["weights"] == now["parts"]["weights"]
        with pytest.raises(openai.ConflictError):
            client.completions.create(**request, extra_body={"deterministic": {"require": instead_of}})


def test_a_trainer_of_other_arithmetic_is_told(server, model):
    other = torch.bfloat16 if model.dtype == torch.float32 else torch.float32
    if other == torch.bfloat16:
        with deterministic_forward(model, other), pytest.raises(UnsupportedError, match=r"numerics\.dtype"):
            LiveServer(server.url).check(model)
    with deterministic_forward(model), pytest.raises(DeterministicError, match="127"):
        LiveServer("http://127.0.0.1:9").check(model)


def test_half_an_update_is_no_update(server, model, tmp_path):
    """A file that is not the checkpoint's is refused, and the old weights can be put back."""
    from safetensors.torch import save_file

    live = LiveServer(server.url)
    with deterministic_forward(model):
        old = live.check(model)
        save_file({"model.norm.weight": model.model.norm.weight.detach()}, tmp_path / "part.safetensors")
        live._ask("POST", "/start_weight_update")
        with pytest.raises(DeterministicError):
            live._ask("POST", "/update_weights", {"update_info": {"path": str(tmp_path / "part.safetensors")}})
        assert live.send_weights(model) == old


@pytest.mark.parametrize("method", ["reload_weights", "reset_weights"])
def test_no_other_way_to_new_weights(server, method):
    """vLLM's own, behind the front end's back, is refused; the server goes on promising what it promised."""
    live = LiveServer(server.url)
    before, answers = live.description(), sampled(server, max_tokens=4)
    with pytest.raises(DeterministicError):
        live._ask("POST", "/collective_rpc", {"method": method})
    assert "weights are changed by vLLM's weight-update API" in server.log.read_text(errors="replace")
    assert live.description() == before
    assert sampled(server, max_tokens=4) == answers


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
@torch.no_grad()
def test_an_update_of_a_paused_server(server, model, mode):
    """What vLLM froze is answered by the old weights, all of it; the server stays paused until it is resumed."""
    live = LiveServer(server.url, timeout=120)
    probe = Probe("frozen", PROMPTS[0], None, 600, 1.0, 3, logprobs=0, extra_body={"ignore_eos": True})
    with concurrent.futures.ThreadPoolExecutor() as pool, deterministic_forward(model):

        def asked() -> concurrent.futures.Future[list[Answer]]:
            return pool.submit(lambda: asyncio.run(ask(server.endpoint, probe)))

        old = live.check(model)
        alone = asked().result()
        kept = [parameter.clone() for parameter in model.parameters()]
        frozen = [asked()] if mode == "keep" else []
        while frozen and not frozen[0].done() and server.metric("vllm:num_requests_running") == 0:
            pass
        live._ask("POST", f"/pause?mode={mode}")
        frozen.append(asked())
        concurrent.futures.wait(frozen, timeout=1)
        assert not any(answer.done() for answer in frozen)
        for parameter in model.parameters():
            parameter.mul_(1.25)
        assert live.send_weights(model) != old
        assert all(answer.result(60) == alone for answer in frozen)

        late = asked()
        concurrent.futures.wait([late], timeout=1)
        assert not late.done()
        live._ask("POST", "/resume")
        answers = late.result(60)
        assert unequal(answers, logprobs(model, *whole(answers))) == 0
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
        assert live.send_weights(model) == old
        assert asked().result() == alone


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@torch.no_grad()
def test_every_family_that_is_served(family, dtype, make, save, tmp_path):
    """Biased projections, normalised heads, a padded vocabulary: the small models, behind a server."""
    if f"{family}ForCausalLM" not in policy.ARCHITECTURES["cpu"]:
        pytest.skip(f"{family} is not served deterministically on CPU")
    model = make(family, dtype)
    save(model, tmp_path / "model")
    name = str(dtype).removeprefix("torch.")
    with started(tmp_path / "model", name, tmp_path / "log") as server, deterministic_forward(model):
        LiveServer(server.url).check(model)
        answers = sampled(server)
        ids, first = whole(answers)
        assert unequal(answers, logprobs(model, ids, first)) == 0
