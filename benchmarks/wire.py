"""Price of the fingerprint and of receipts on CPU: tokens per second with and without them, side by side.

Two deterministic servers on the same cores, the one that waits stopped (SIGSTOP): one as it is, one whose middleware
hands every request through, so that nothing is stamped or recorded. Three ways to ask take turns in each round, with
new prompts of one length: the bare server, ours without receipts, and ours with a receipt for each answer.

Two rates: tokens per second of time, as a client sees it, and per second that the server's processes spent on a
processor, which somebody else's work on the machine moves less. Pinned to one core, which the processes share, the
second one is the server's throughput; with cores to spare it counts what idle processes spend waiting, too.

usage: benchmarks/wire.py MODEL [--rounds 25]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
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

import psutil
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
}
# Server, and what is asked for.
WAYS = [("bare", "nothing"), ("ours", "nothing"), ("ours", "receipt")]
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


def processor_seconds(server: Server) -> float:
    """What the server's processes have spent on processors, by the clocks that Linux keeps of other processes."""
    parent = psutil.Process(server.pid)
    scheduled = 2  # CPUCLOCK_SCHED of Linux's posix-timers
    return sum(time.clock_gettime(~one.pid << 3 | scheduled) for one in (parent, *parent.children(recursive=True)))


async def generate(server: Server, rng: random.Random, stream: bool, wanted: str) -> tuple[float, float]:
    """Generated tokens per second and per processor second of equal requests sent together, streamed or whole.

    wanted: "nothing" or "receipt" besides the answer's text.
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

        spent, start = processor_seconds(server), time.perf_counter()
        given = await asyncio.gather(*(one(ids) for ids in prompts))
        seconds, spent = time.perf_counter() - start, processor_seconds(server) - spent
    if set(given) != {wanted == "receipt"}:
        raise RuntimeError(f"receipts: asked for {wanted}, given {set(given)}")
    return CONCURRENT * TOKENS / seconds, CONCURRENT * TOKENS / spent


def measure(model: str, rounds: int, logs: Path) -> dict[bool, list[list[tuple[float, float]]]]:
    """For whole and for streamed answers, the two rates of each round, in the order of WAYS."""
    logs.mkdir(parents=True, exist_ok=True)
    rates: dict[bool, list[list[tuple[float, float]]]] = {False: [], True: []}
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


COMPARED = (
    ("fingerprint against none", 0, 1),
    ("receipts against none, one server", 1, 2),
    ("fingerprint and receipts against neither", 0, 2),
)


def points_of(rates: dict[bool, list[list[tuple[float, float]]]]) -> list[dict[str, Any]]:
    """Each of the comparisons, for whole and for streamed answers, in both rates."""
    points = []
    for (stream, found), (what, peer, ours), kind in itertools.product(rates.items(), COMPARED, (0, 1)):
        ratios = [rate[ours][kind] / rate[peer][kind] for rate in found]
        low, high = interval(ratios, 10_000)
        points.append(
            {
                "what": f"{what}: {CONCURRENT} concurrent, {'streamed' if stream else 'whole'}",
                "unit": ("tokens/s", "tokens/processor second")[kind],
                "peer": round(statistics.median(rate[peer][kind] for rate in found), 1),
                "ours": round(statistics.median(rate[ours][kind] for rate in found), 1),
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
        "card": f"{cpu_name()}, {len(os.sched_getaffinity(0))} of them used",
        "driver": f"Linux {platform.release()}",
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "vllm-deterministic")},
        "command": shlex.join(["benchmarks/wire.py", Path(args.model).name, "--rounds", str(args.rounds)]),
        "date": datetime.date.today().isoformat(),
        "points": points,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("what", "unit", "without", "with", "ratio", "95 %")
    for point in points:
        rates = [str(point[name]) for name in ("unit", "peer", "ours", "ratio")]
        table.add_row(point["what"], *rates, f"{point['low']} to {point['high']}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
