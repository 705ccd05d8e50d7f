"""Price of the fingerprint and of receipts on CPU: tokens per second with and without them, on one server.

Three ways to ask take turns in each round, in an order drawn anew, with new prompts of one length: bare (a plugin of
this file hands the request past our middleware, so nothing is stamped or recorded), with the fingerprint, and with a
receipt for each answer.

Two rates: tokens per second of time, as a client sees it, and per second that the server's processes spent on a
processor. Idle processes of vLLM's spend some waiting: with a core to spare the first one is the server's throughput,
pinned to one core, which the processes share, both are.

`--join` adds the rounds of an earlier results file, of the same model, machine and versions, to those of this run.

usage: benchmarks/wire.py MODEL [--rounds 25] [--join results/wire.json]
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai
import psutil
from bootstrap import interval
from cpu import cpu_name, prompt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_deterministic.verify.server import Server, serve

CONCURRENT = 16
TOKENS = 64
OPTIONS = ("--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "32", "--deterministic")
WAYS: dict[str, dict[str, Any]] = {
    "bare": {"extra_headers": {"x-bare": "1"}},
    "fingerprint": {},
    "receipt": {"extra_body": {"deterministic": {"receipt": True}}},
}
# "whole" or "streamed" -> the rounds: way -> tokens per second and per processor second.
Rates = dict[str, list[dict[str, tuple[float, float]]]]
# A plugin of vLLM that exists on this benchmark's PYTHONPATH only.
BARE = """
def plant():
    from vllm_deterministic.integration.contract_middleware import Contract
    ours = Contract.__call__
    async def call(self, scope, receive, send):
        bare = any(name == b"x-bare" for name, _ in scope.get("headers", ()))
        await (self.app(scope, receive, send) if bare else ours(self, scope, receive, send))
    Contract.__call__ = call
"""


def bare_path(folder: Path) -> str:
    """A folder for PYTHONPATH with the plugin that lets some requests past the middleware."""
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


async def generate(
    server: Server, client: openai.AsyncOpenAI, rng: random.Random, stream: bool, way: str
) -> tuple[float, float]:
    """Generated tokens per second and per processor second of equal requests sent together, streamed or whole."""
    prompts = [prompt(rng, 32) for _ in range(CONCURRENT)]
    asked = WAYS[way]
    options: dict[str, Any] = {"model": server.model, "max_tokens": TOKENS, "temperature": 0, **asked}
    options["extra_body"] = {"ignore_eos": True, **asked.get("extra_body", {})}

    async def one(ids: list[int]) -> bool:
        answer: Any = await client.completions.create(prompt=ids, stream=stream, **options)
        last = [chunk async for chunk in answer][-1] if stream else answer
        return getattr(last, "deterministic", None) is not None

    spent, start = processor_seconds(server), time.perf_counter()
    given = await asyncio.gather(*(one(ids) for ids in prompts))
    seconds, spent = time.perf_counter() - start, processor_seconds(server) - spent
    if set(given) != {way == "receipt"}:
        raise RuntimeError(f"receipts: asked {way}, given {set(given)}")
    return round(CONCURRENT * TOKENS / seconds, 2), round(CONCURRENT * TOKENS / spent, 2)


async def rounds_of(server: Server, rounds: int, start: int) -> Rates:
    """start: the number of the first round, which its prompts and the order of the ways are drawn from."""
    rates: Rates = {"whole": [], "streamed": []}
    async with server.endpoint.client() as client:
        for turn in track(range(start - 2, start + rounds), description="wire"):
            for answers, found in rates.items():
                rng = random.Random(f"{answers}{turn}")
                ways = rng.sample(sorted(WAYS), len(WAYS))
                rate = {way: await generate(server, client, rng, answers == "streamed", way) for way in ways}
                if turn >= start:  # the first rounds warm up
                    found.append(rate)
    return rates


def measure(model: str, rounds: int, start: int, logs: Path) -> Rates:
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": bare_path(Path(folder))}
        with serve(model, *OPTIONS, env=env, log=logs / "wire.log", timeout=900) as server:
            return asyncio.run(rounds_of(server, rounds, start))


COMPARED = (
    ("fingerprint against none", "bare", "fingerprint"),
    ("receipts against fingerprint alone", "fingerprint", "receipt"),
    ("fingerprint and receipts against neither", "bare", "receipt"),
)


def points_of(rates: Rates) -> list[dict[str, Any]]:
    """Each of the comparisons, for whole and for streamed answers, in both rates."""
    points = []
    for (answers, found), (what, peer, ours), kind in itertools.product(rates.items(), COMPARED, (0, 1)):
        ratios = [rate[ours][kind] / rate[peer][kind] for rate in found]
        low, high = interval(ratios, 10_000)
        points.append(
            {
                "what": f"{what}: {CONCURRENT} concurrent, {answers}",
                "unit": ("tokens/s", "tokens/processor second")[kind],
                "peer": round(statistics.median(rate[peer][kind] for rate in found), 1),
                "ours": round(statistics.median(rate[ours][kind] for rate in found), 1),
                "ratio": round(statistics.median(ratios), 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "rounds": len(found),
            }
        )
    return points


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face id or folder")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "wire.json")
    parser.add_argument("--logs", type=Path, default=Path(".cache/benchmark-logs"))
    parser.add_argument("--join", type=Path, help="results whose rounds are added to this run's")
    args = parser.parse_args()
    name = Path(args.model).name
    setting = {
        "card": f"{cpu_name()}, {len(os.sched_getaffinity(0))} of them used",
        "driver": f"Linux {platform.release()}",
        "versions": {each: version(each) for each in ("vllm-cpu", "torch", "vllm-deterministic")},
    }
    commands = [shlex.join(["benchmarks/wire.py", name, "--rounds", str(args.rounds)])]
    earlier: Rates = {"whole": [], "streamed": []}
    if args.join:
        joined = json.loads(args.join.read_text())
        same = all(joined[key] == value for key, value in setting.items())
        if not same or shlex.split(joined["command"])[1] != name or "rates" not in joined:
            parser.error(f"{args.join} is of another model, machine or version, or does not say its rounds' rates")
        earlier = joined["rates"]
        commands = [joined["command"], f"{commands[0]} --join {args.join.name}"]
    measured = measure(args.model, args.rounds, len(earlier["whole"]), args.logs)
    rates = {answers: earlier[answers] + found for answers, found in measured.items()}
    points = points_of(rates)
    report = {
        **setting,
        "command": " && ".join(commands),
        "date": datetime.date.today().isoformat(),
        "points": points,
        "rates": rates,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("what", "unit", "without", "with", "ratio", "95 %")
    for point in points:
        figures = [str(point[key]) for key in ("unit", "peer", "ours", "ratio")]
        table.add_row(point["what"], *figures, f"{point['low']} to {point['high']}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
