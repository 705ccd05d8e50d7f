"""Servers of one model side by side, the model made up, and what is asked of each of them over HTTP."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import made_up
import openai

from vllm_deterministic.serving.receipts import Receipt
from vllm_deterministic.serving.replay import find_receipt
from vllm_deterministic.verify.probes import Probe
from vllm_deterministic.verify.server import Server, serve

NAME = "served"
# Each leaves room on the card for the others.
ROOM = ("--max-model-len", "4096", "--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(3 << 30))
FEW_GRAPHS = ("--cudagraph-capture-sizes", "1", "2", "4", "8", "16", "32", "64")

IDS = [100 + (7919 * step) % 30_000 for step in range(1537)]
PROBES = (
    Probe("greedy", IDS[:257], max_tokens=64, logprobs=0, extra_body={"ignore_eos": True}),
    Probe("seeded", IDS[9:90], max_tokens=64, temperature=0.8, seed=11, logprobs=5, extra_body={"ignore_eos": True}),
    Probe("long", IDS, max_tokens=32, logprobs=0, extra_body={"ignore_eos": True}),
)


@contextlib.contextmanager
def serve_all(
    folder: Path,
    sides: Mapping[str, Sequence[str]],
    model: str = "llama",
    checkpoint: str | None = None,
    cards: Mapping[str, str] | None = None,
) -> Iterator[Mapping[str, Server]]:
    """Side -> its server, all started at once. sides: side -> options; cards: side -> the cards that it sees.

    model: one of `made_up`'s, unless a checkpoint's folder is named.
    """
    path = os.environ.get("PYTHONPATH", "")
    given: tuple[str, ...] = (checkpoint or str(folder / model), "--served-model-name", NAME, *ROOM)
    if checkpoint is None:
        made_up.write(folder)
        path = made_up.door(folder)
        given += ("--load-format", "dummy")
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(sides)) as pool:

        def start(side: str) -> Server:
            name = side.replace(" ", "-")
            environment = {
                "PYTHONPATH": path,
                "VLLM_CACHE_ROOT": str(folder / f"cache-{name}"),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "HF_HUB_OFFLINE": "1",
            }
            if cards is not None:
                environment["CUDA_VISIBLE_DEVICES"] = cards[side]
            served = serve(*given, *sides[side], env=environment, log=folder / f"{name}.log", timeout=300)
            return stack.enter_context(served)

        yield dict(zip(sides, pool.map(start, sides), strict=True))


def client(server: Server) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=server.base_url, api_key="x", max_retries=0, http_client=http)


def promise(server: Server) -> Any:
    return client(server).get(f"{server.url}/deterministic", cast_to=object)


def receipt(server: Server, **options: Any) -> Receipt:
    answer = client(server).completions.create(
        model=NAME, prompt=IDS[:300], max_tokens=64, temperature=0.8,
        extra_body={"ignore_eos": True, "deterministic": {"require": True, "receipt": True}}, **options,
    )  # fmt: skip
    return find_receipt(answer.model_dump_json())
