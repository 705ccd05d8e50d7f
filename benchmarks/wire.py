"""Price of the fingerprint and of receipts on CPU: tokens per second with and without them, side by side.

Two deterministic servers on the same cores, the one that waits stopped (SIGSTOP): one as it is, one whose middleware
hands every request through, so that nothing is stamped or recorded. Four ways to ask take turns in each round, with
new prompts of one length: the bare server, ours without receipts, ours with a receipt for each answer, and ours with
the logprobs of the answer's tokens, which a receipt is made of.

usage: benchmarks/wire.py MODEL [--rounds 25]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import random
import shlex
import signal
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bootstrap import interval
from cpu import awake, cpu_name, prompt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_deterministic.verify.server import Server, serve

CONCURRENT = 16
TOKENS = 64
OPTIONS = ("--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "32", "--deterministic")
WANTED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "receipt": {"deterministic": {"receipt": True}},
    "logprobs": {"logprobs": 0},
}
# Server, and what is asked for.
WAYS = [("bare", "nothing"), ("ours", "nothing"), ("ours", "receipt"), ("ours", "logprobs")]
# A plugin of vLLM that exists on the bare server's PYTHONPATH only.
BARE = """
def plant():
    from vllm_deterministic.integration.contract_middleware import Contract
    async def hand_through(self, scope, receive, send):
        await self.app(scope, receive, send)
    Contract.__call__ = hand_through
"""


def bare_path(folder: Path) -> str:
    """A folder for PYTHONPATH with the plugin that takes the middleware's work out."""
    (folder / "bare_wire.py").write_text(BARE)
    about = folder / "bare_wire-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bare-wire\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nbare_wire = bare_wire:plant\n")
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


async def generate(server: Server, rng: random.Random, stream: bool, wanted: str) -> float:
    """Generated tokens per second of equal requests sent together, streamed or whole.

    wanted: "nothing", "receipt" or "logprobs" besides the answer's text.
    """
    endpoint = server.endpoint
    extra: dict[str, Any] = {"ignore_eos": True, **WANTED[wanted]}
    prompts = [prompt(rng, 32) for _ in range(CONCURRENT)]
    async with endpoint.client() as client:

        async def one(ids: list[int]) -> bool:
            options = {"model": endpoint.model, "max_tokens": TOKENS, "temperature": 0, "extra_body": extra}
            answer: Any = await client.completions.create(prompt=ids, stream=stream, **options)
            last = [chunk async for chunk in answer][-1] if stream else answer
            return getattr(last, "deterministic", None) is not None

        start = time.perf_counter()
        given = await asyncio.gather(*(one(ids) for ids in prompts))
        seconds = time.perf_counter() - start
    if set(given) != {wanted == "receipt"}:
        raise RuntimeError(f"receipts: asked for {wanted}, given {set(given)}")
    return CONCURRENT * TOKENS / seconds


def measure(model: str, rounds: int, logs: Path) -> dict[bool, list[list[float]]]:
    """For whole and for streamed answers, the rates of each round, in the order of WAYS."""
    logs.mkdir(parents=True, exist_ok=True)
    rates: dict[bool, list[list[float]]] = {False: [], True: []}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = {}
        for name, env in (("bare", {"PYTHONPATH": bare_path(folder)}), ("ours", {})):
            env = {"VLLM_CPU_KVCACHE_SPACE": "1", **env}
            server = stack.enter_context(serve(model, *OPTIONS, env=env, log=logs / f"wire-{name}.log", timeout=900))
            stack.callback(os.killpg, server.pid, signal.SIGCONT)  # a stopped process cannot end politely
            os.killpg(server.pid, signal.SIGSTOP)
            sides[name] = server
        for turn in track(range(-1, rounds), description="wire"):
            for stream, found in rates.items():
                rate = {}
                for step in range(len(WAYS)):
                    name, wanted = way = WAYS[(step + turn) % len(WAYS)]
                    with awake(sides[name]):
                        rng = random.Random(f"{stream}{turn}{way}")
                        rate[way] = asyncio.run(generate(sides[name], rng, stream, wanted))
                if turn >= 0:  # the first round warms up
                    found.append([rate[way] for way in WAYS])
    return rates


def points_of(rates: dict[bool, list[list[float]]]) -> list[dict[str, Any]]:
    """Each of the comparisons, for whole and for streamed answers."""
    points = []
    for stream, found in rates.items():
        delivery = "streamed" if stream else "whole"
        for what, peer, ours in (
            ("fingerprint against none", 0, 1),
            ("receipts against none, one server", 1, 2),
            ("fingerprint and receipts against neither", 0, 2),
            ("receipts against the same tokens' logprobs", 3, 2),
        ):
            ratios = [rate[ours] / rate[peer] for rate in found]
            low, high = interval(ratios, 10_000)
            points.append(
                {
                    "what": f"{what}: {CONCURRENT} concurrent, {delivery}",
                    "unit": "tokens/s",
                    "peer": round(statistics.median(rate[peer] for rate in found), 1),
                    "ours": round(statistics.median(rate[ours] for rate in found), 1),
                    "ratio": round(statistics.median(ratios), 4),
                    "low": round(low, 4),
                    "high": round(high, 4),
                    "rounds": len(found),
                    "ratios": [round(ratio, 3) for ratio in ratios],
                }
            )
    return points


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face id or folder")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "wire.json")
    parser.add_argument("--logs", type=Path, default=Path(".cache/benchmark-logs"))
    args = parser.parse_args()
    points = points_of(measure(args.model, args.rounds, args.logs))
    report = {
        "card": cpu_name(),
        "driver": f"Linux {platform.release()}",
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "vllm-deterministic")},
        "command": shlex.join(["benchmarks/wire.py", Path(args.model).name, "--rounds", str(args.rounds)]),
        "date": datetime.date.today().isoformat(),
        "points": points,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("what", "without", "with", "ratio", "95 %")
    for point in points:
        rates = [str(point[name]) for name in ("peer", "ours", "ratio")]
        table.add_row(point["what"], *rates, f"{point['low']} to {point['high']}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
