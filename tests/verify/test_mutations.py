"""`verify --level standard` finds every planted fault; `verify` sees HTTP only, and names the family that did.

Each fault is first shown observable by a direct probe, written without the probe families.
docs/reports/verify-mutations.txt is made by `REPORT=docs/reports/verify-mutations.txt scripts/test --slow FILE`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from vllm_deterministic.verify import verify
from vllm_deterministic.verify.probes import Answer, Endpoint, Probe, ask, compare, hang_up, run_load, score
from vllm_deterministic.verify.server import Server, serve

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import planted_faults  # noqa: E402

pytestmark = [pytest.mark.serving, pytest.mark.slow]

OPTIONS = ("--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "64", "--enforce-eager")
PROMPT = "The lighthouse keeper counts the steps, the lamps and the ships, and then he writes down what he saw: "
GREEDY = Probe("greedy", PROMPT * 3, max_tokens=48, logprobs=3, extra_body={"ignore_eos": True})
SEEDED = dataclasses.replace(GREEDY, temperature=0.8, seed=7)
NUCLEUS = dataclasses.replace(SEEDED, temperature=1.0, top_p=0.95)
LONG = dataclasses.replace(GREEDY, prompt=PROMPT * 24, max_tokens=16)
LONGEST = dataclasses.replace(GREEDY, prompt=PROMPT * 70, logprobs=0)


def _salted(probe: Probe, salt: str) -> Probe:
    return dataclasses.replace(probe, extra_body={**probe.extra_body, "cache_salt": salt})


def _loaded(probe: Probe) -> Callable[[Endpoint], Awaitable[list[Answer]]]:
    async def asking(endpoint: Endpoint) -> list[Answer]:
        return await ask(endpoint, probe) + await run_load(endpoint, probe, 6, 2, 16, longest_words=60)

    return asking


def _twice(probe: Probe) -> Callable[[Endpoint], Awaitable[list[Answer]]]:
    async def asking(endpoint: Endpoint) -> list[Answer]:
        return await ask(endpoint, probe) + await ask(endpoint, probe)

    return asking


async def _cached(endpoint: Endpoint) -> list[Answer]:
    """A prompt computed whole, and the same with all but its last page in the cache."""
    return await ask(endpoint, _salted(LONG, "a")) + await ask(endpoint, _salted(LONG, "a"))


async def _stale(endpoint: Endpoint) -> list[Answer]:
    """A prompt alone, and after one that differs in the 60th token."""
    cold = await ask(endpoint, _salted(LONG, "b"))
    ids = list(cold[0].prompt_token_ids)
    ids[60] = ids[61]
    await ask(endpoint, _salted(dataclasses.replace(LONG, prompt=ids), "c"))
    return cold + await ask(endpoint, _salted(LONG, "c"))


def _read(probe: Probe) -> Callable[[Endpoint], Awaitable[list[Answer]]]:
    async def asking(endpoint: Endpoint) -> list[Answer]:
        (answer,) = await ask(endpoint, probe)
        plain = dataclasses.replace(answer, top_logprobs=())
        read = await score(endpoint, answer.prompt_token_ids, answer.token_ids)
        return [plain, dataclasses.replace(plain, logprobs=read)]

    return asking


async def _streamed(endpoint: Endpoint) -> list[Answer]:
    return await ask(endpoint, GREEDY) + await ask(endpoint, dataclasses.replace(GREEDY, stream=True))


async def _second_choice(endpoint: Endpoint) -> list[Answer]:
    two = dataclasses.replace(SEEDED, n=2)
    return [(await ask(endpoint, two))[1], (await ask(endpoint, two))[1]]


async def _after_abort(endpoint: Endpoint) -> list[Answer]:
    before = await ask(endpoint, SEEDED)
    async with endpoint.client() as client:
        await hang_up(endpoint, dataclasses.replace(SEEDED, max_tokens=400), 3, client)
    await asyncio.sleep(0.5)
    return before + await ask(endpoint, SEEDED)


async def _after_pause(endpoint: Endpoint) -> list[Answer]:
    await ask(endpoint, SEEDED)
    before = await ask(endpoint, SEEDED)
    await asyncio.sleep(2.5)
    return before + await ask(endpoint, SEEDED)


async def _by_chat(endpoint: Endpoint) -> list[Answer]:
    chat = dataclasses.replace(SEEDED, chat=True, logprobs=0)
    spoken = await ask(endpoint, chat)
    written = await ask(endpoint, dataclasses.replace(chat, chat=False, prompt=spoken[0].prompt_token_ids))
    return [dataclasses.replace(one, top_logprobs=(), tokens=()) for one in (*spoken, *written)]


# Fault -> a direct probe that sees it, and the families of which one must name it.
FAULTS: dict[str, tuple[Callable[[Endpoint], Awaitable[list[Answer]]], set[str]]] = {
    "untiled-linear": (_loaded(GREEDY), {"repeat", "batch"}),
    "batch-top-p": (_loaded(NUCLEUS), {"batch"}),
    "seed-from-arrival": (_twice(SEEDED), {"repeat"}),
    "noise-from-row": (_loaded(SEEDED), {"batch"}),
    "chunk-norm": (_cached, {"batch", "burst", "order", "prefix", "chunks"}),
    "stale-prefix": (_stale, {"prefix"}),
    "tie-order": (_loaded(dataclasses.replace(GREEDY, logprobs=2)), {"batch", "logprobs"}),
    "rounded-prompt-logprobs": (_read(dataclasses.replace(GREEDY, logprobs=0)), {"scored"}),
    "tiles-of-many-rows": (_read(LONGEST), {"scored", "prefix"}),
    "stream-rounding": (_streamed, {"stream"}),
    "choice-seeds": (_second_choice, {"choices"}),
    "abort-leak": (_after_abort, {"aborts"}),
    "idle-noise": (_after_pause, {"repeat", "pause"}),
    "chat-temperature": (_by_chat, {"endpoints"}),
}


@pytest.fixture
def server_with(tmp_path: Path) -> Iterator[Callable[[str], object]]:
    """Starts a deterministic server with a fault; the fault's plugin exists on this server's path only."""
    from vllm_deterministic.models import prepare_default_model

    path = planted_faults.server_path(tmp_path)

    def start(fault: str) -> object:
        environment = {
            "PYTHONPATH": path,
            planted_faults.VARIABLE: fault,
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        model = prepare_default_model(dtype="bfloat16")
        return serve(model, *OPTIONS, "--deterministic", env=environment, log=tmp_path / "server.log")

    return start


def _direct(server: Server, probe: Callable[[Endpoint], Awaitable[list[Answer]]]) -> bool:
    return not compare(asyncio.run(probe(server.endpoint))).identical


def test_every_fault_is_tried() -> None:
    # With one thread nothing is cut; tests/serving/test_threads.py runs five and seven.
    assert set(FAULTS) == set(planted_faults.NAMES) - {"uncut-activation"}
    assert len(FAULTS) >= 8


def test_without_a_fault_nothing_is_found(server_with, said_of) -> None:
    """The control: no direct probe sees anything, and `standard` says the same."""
    with server_with("") as server:
        for name, (probe, _) in FAULTS.items():
            assert not _direct(server, probe), name
        report = verify(server.base_url, level="standard", require=("all",))
    said_of("none", report)
    assert report.verdict == "same", report.headline


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_standard_finds(server_with, said_of, fault: str) -> None:
    probe, families = FAULTS[fault]
    with server_with(fault) as server:
        assert _direct(server, probe), "not observable: replace this fault"
        report = verify(server.base_url, level="standard", fail_fast=True)
    said_of(fault, report)
    assert report.verdict == "differs", [(one.name, one.verdict, one.reason) for one in report.families]
    assert set(report.found_by) & families, report.found_by
