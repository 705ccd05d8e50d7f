"""Data parallel ranks on two cards: whichever serves, the answer is that of one engine. Real servers, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
openai = pytest.importorskip("openai")
pytest.importorskip("vllm")

from vllm_deterministic.serving.receipts import Receipt  # noqa: E402
from vllm_deterministic.serving.replay import find_receipt, replay  # noqa: E402
from vllm_deterministic.verify.probes import Answer, Probe, compare, run_load  # noqa: E402
from vllm_deterministic.verify.server import Server, serve  # noqa: E402

RANKS = 2
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two cards")

HERE = Path(__file__).parent
OPTIONS = (
    "--load-format", "dummy", "--max-model-len", "4096", "--gpu-memory-utilization", "0.05",
    "--kv-cache-memory-bytes", str(3 << 30), "--served-model-name", "made-up",
    "--cudagraph-capture-sizes", "1", "2", "4", "8", "16", "32", "64",
)  # fmt: skip
TWO = ("--data-parallel-size", str(RANKS))
# Name -> options, and which cards it sees.
SIDES = {
    "ranks": (("--deterministic", *TWO), "0,1"),
    "alone": (("--deterministic",), "1"),
    "no flag": (TWO, "0,1"),
}
_IDS = [100 + (7919 * step) % 30_000 for step in range(1537)]
PROBES = (
    Probe("greedy", _IDS[:257], max_tokens=64, logprobs=0, extra_body={"ignore_eos": True}),
    Probe("seeded", _IDS[9:90], max_tokens=64, temperature=0.8, seed=11, logprobs=5, extra_body={"ignore_eos": True}),
    Probe("long", _IDS, max_tokens=32, logprobs=0, extra_body={"ignore_eos": True}),
)
RUNS = 12


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Server]]:
    """Every side's server, all at once."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, HERE / "made_up.py", folder], check=True)
    sys.path.insert(0, str(HERE))
    import made_up

    path = made_up.door(folder)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(SIDES)) as pool:

        def start(side: str) -> Server:
            options, cards = SIDES[side]
            environment = {
                "PYTHONPATH": path,
                "CUDA_VISIBLE_DEVICES": cards,
                "VLLM_CACHE_ROOT": str(folder / f"cache-{side.replace(' ', '-')}"),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "HF_HUB_OFFLINE": "1",
            }
            log = folder / f"{side.replace(' ', '-')}.log"
            served = serve(folder / "llama", *OPTIONS, *options, env=environment, timeout=300, log=log)
            return stack.enter_context(served)

        yield dict(zip(SIDES, pool.map(start, SIDES), strict=True))


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


def receipt(server: Server, rank: int | None = None) -> Receipt:
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=server.base_url, api_key="x", max_retries=0, http_client=http) as client:
        answer = client.completions.create(
            model="made-up", prompt=_IDS[:300], max_tokens=64, temperature=0.8, extra_headers=headers,
            extra_body={"ignore_eos": True, "deterministic": {"require": True, "receipt": True}},
        )  # fmt: skip
    return find_receipt(answer.model_dump_json())


def promise(server: Server) -> Any:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=server.url, api_key="x", max_retries=0, http_client=http) as client:
        return client.get("/deterministic", cast_to=object)


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
        assert receipt(servers["ranks"], rank) == want
        assert of_each_rank(servers["ranks"])[rank] == before + 1
    assert replay(want, servers["ranks"].url).same_bits
    other = dataclasses.replace(PROBES[1], seed=12)
    again = asyncio.run(run_load(servers["ranks"].endpoint, other, 1, concurrency=1, neighbours=0))
    first = asyncio.run(run_load(servers["ranks"].endpoint, PROBES[1], 1, concurrency=1, neighbours=0))
    assert not compare([*again, *first]).identical  # the comparison sees another seed


def test_control_without_the_flag_the_answers_differ(loaded: Callable[[str], Any]) -> None:
    assert not all(compare(answers).identical for answers in loaded("no flag").values())
