"""Data parallel ranks on two cards: whichever serves, the answer is that of one engine. Real servers, over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from side_by_side import FEW_GRAPHS, PROBES, promise, receipt, serve_all  # noqa: E402

from vllm_deterministic.serving.replay import replay  # noqa: E402
from vllm_deterministic.verify.probes import Answer, compare, run_load  # noqa: E402
from vllm_deterministic.verify.server import Server  # noqa: E402

RANKS = 2
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two cards")

TWO = ("--data-parallel-size", str(RANKS))
SIDES = {
    "ranks": ("--deterministic", *TWO, *FEW_GRAPHS),
    "alone": ("--deterministic", *FEW_GRAPHS),
    "no flag": (*TWO, *FEW_GRAPHS),
}
CARDS = {"ranks": "0,1", "alone": "1", "no flag": "0,1"}
RUNS = 12


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Server]]:
    with serve_all(tmp_path_factory.mktemp("ranks"), SIDES, cards=CARDS) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(servers: Mapping[str, Server]) -> Callable[[str], dict[str, list[Answer]]]:
    """A side's answers to every probe, among others."""
    made: dict[str, dict[str, list[Answer]]] = {}

    def answers(side: str) -> dict[str, list[Answer]]:
        endpoint = servers[side].endpoint
        if side not in made:
            made[side] = {
                p.name: asyncio.run(run_load(endpoint, p, RUNS, concurrency=4, neighbours=48)) for p in PROBES
            }
        return made[side]

    return answers


def of_each_rank(server: Server) -> list[float]:
    return [server.metric("vllm:request_success_total", engine=str(rank)) for rank in range(RANKS)]


def test_they_promise_what_one_engine_promises(servers: Mapping[str, Server]) -> None:
    there, alone = promise(servers["ranks"]), promise(servers["alone"])
    assert (there["engines"], alone["engines"]) == (RANKS, 1)
    assert there["fingerprint"] == alone["fingerprint"]


def test_whichever_rank_serves(servers: Mapping[str, Server], loaded: Callable[[str], Any]) -> None:
    before = of_each_rank(servers["ranks"])
    found, alone = loaded("ranks"), loaded("alone")
    served = [new - old for new, old in zip(of_each_rank(servers["ranks"]), before, strict=True)]
    tokens = sum(len(answer.token_ids) for answers in found.values() for answer in answers)
    print(f"requests of each rank: {served}; {tokens} tokens compared with one engine's")
    assert min(served) > 0.2 * sum(served)
    for name, answers in found.items():
        assert compare([*answers, *alone[name]]).identical, name


def test_a_receipt_of_either_rank_is_that_of_one_engine(servers: Mapping[str, Server]) -> None:
    want = receipt(servers["alone"])
    for rank in range(RANKS):
        before = of_each_rank(servers["ranks"])[rank]
        assert receipt(servers["ranks"], extra_headers={"X-data-parallel-rank": str(rank)}) == want
        assert of_each_rank(servers["ranks"])[rank] == before + 1
    assert replay(want, servers["ranks"].url).same_bits
    other = dataclasses.replace(PROBES[1], seed=12)
    again = asyncio.run(run_load(servers["ranks"].endpoint, other, 1, concurrency=1, neighbours=0))
    first = asyncio.run(run_load(servers["ranks"].endpoint, PROBES[1], 1, concurrency=1, neighbours=0))
    assert not compare([*again, *first]).identical  # the comparison sees another seed


def test_control_without_the_flag_the_answers_differ(loaded: Callable[[str], Any]) -> None:
    assert not all(compare(answers).identical for answers in loaded("no flag").values())
