"""Price of `--deterministic` on CPU: tokens per second of the same vLLM with and without the flag, side by side.

Both servers run on the same cores and take turns within each short round, so a slow minute of a shared machine slows
both; the one that waits is stopped (SIGSTOP). Where a process's memory happens to lie moves its speed by some percent,
so each mode is measured with several pairs of fresh servers. The ratio is the median of the rounds' ratios, with its
95 % bootstrap interval.

usage: benchmarks/cpu.py MODEL [--starts 2] [--rounds 9] [--modes bfloat16-compiled ...]
Modes that are not measured keep their points in the results file, if the machine and the versions are the same.
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
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bootstrap import interval
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_deterministic.verify.server import Server, serve

MODES = ("bfloat16-compiled", "bfloat16-eager", "float32-compiled", "float32-eager")
DECODE_TOKENS = 32
PREFILL_TOKENS = 1500
RESAMPLES = 10_000


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


@contextlib.contextmanager
def awake(server: Server) -> Iterator[Server]:
    """Lets the server's processes run inside the block only."""
    os.killpg(server.pid, signal.SIGCONT)
    try:
        yield server
    finally:
        os.killpg(server.pid, signal.SIGSTOP)


def pair_of_servers(model: str, mode: str, rounds: int, logs: Path, start: int) -> dict[str, list[tuple[float, float]]]:
    """Per work, the (default, deterministic) tokens per second of each round, from one fresh pair of servers."""
    dtype, how = mode.split("-")
    options = ["--dtype", dtype, "--max-model-len", "2048", "--max-num-seqs", "32"]
    options += ["--enforce-eager"] if how == "eager" else []
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    rates: dict[str, list[tuple[float, float]]] = {what: [] for what in WORK}
    with contextlib.ExitStack() as stack:
        sides: list[Server] = []
        for name, flags in (("default", []), ("deterministic", ["--deterministic"])):
            log = logs / f"{mode}-{name}-{start}.log"
            server = stack.enter_context(serve(model, *options, *flags, env=env, log=log, timeout=900))
            stack.callback(os.killpg, server.pid, signal.SIGCONT)  # a stopped process cannot end politely
            os.killpg(server.pid, signal.SIGSTOP)
            sides.append(server)
        for turn in track(range(-1, rounds), description=f"{mode}, start {start + 1}"):
            for what, work in WORK.items():
                order = sides if turn % 2 else sides[::-1]
                found = {}
                for side in order:
                    # The same prompts for both sides; new ones each round, so that no prefix is found in the cache.
                    with awake(side):
                        found[side.pid] = asyncio.run(work(side, random.Random(f"{what}{start}/{turn}")))
                if turn >= 0:  # the first round warms up
                    rates[what].append((found[sides[0].pid], found[sides[1].pid]))
    return rates


def measure(model: str, mode: str, starts: int, rounds: int, logs: Path) -> list[dict[str, Any]]:
    """The points of one mode."""
    logs.mkdir(parents=True, exist_ok=True)
    pairs = [pair_of_servers(model, mode, rounds, logs, start) for start in range(starts)]
    points = []
    for what in WORK:
        rates = [rate for pair in pairs for rate in pair[what]]
        ratios = [ours / peer for peer, ours in rates]
        low, high = interval(ratios, RESAMPLES)
        points.append(
            {
                "what": f"{mode.replace('-', ' ')}: {what}",
                "unit": "tokens/s",
                "peer": round(statistics.median(peer for peer, _ in rates), 1),
                "ours": round(statistics.median(ours for _, ours in rates), 1),
                "ratio": round(statistics.median(ratios), 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "starts": starts,
                "rounds": rounds,
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
        )
    return points


def with_other_modes(report: dict[str, Any], old: Path, modes: list[str]) -> dict[str, Any]:
    """The report, with the points of other modes that an earlier report of the same machine and versions has."""
    earlier = json.loads(old.read_text()) if old.exists() else {"points": []}
    if any(earlier.get(name) != report[name] for name in ("card", "driver", "versions")):
        return report
    measured = tuple(mode.replace("-", " ") + ":" for mode in modes)
    kept = [point for point in earlier["points"] if not point["what"].startswith(measured)]
    order = [mode.replace("-", " ") for mode in MODES]
    points = sorted([*kept, *report["points"]], key=lambda point: order.index(point["what"].partition(":")[0]))
    return {
        **report,
        "command": f"{earlier['command']}; {report['command']}" if kept else report["command"],
        "points": points,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face id or folder")
    parser.add_argument("--starts", type=int, default=2, help="pairs of fresh servers")
    parser.add_argument("--rounds", type=int, default=9, help="rounds with each pair")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    parser.add_argument("--logs", type=Path, default=Path(".cache/benchmark-logs"))
    args = parser.parse_args()
    points = [point for mode in args.modes for point in measure(args.model, mode, args.starts, args.rounds, args.logs)]
    report = {
        "card": cpu_name(),
        "driver": f"Linux {platform.release()}",
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "vllm-deterministic")},
        "command": shlex.join(["benchmarks/cpu.py", Path(args.model).name, *sys.argv[2:]]),
        "date": datetime.date.today().isoformat(),
        "points": points,
    }
    report = with_other_modes(report, args.out, args.modes)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("what", "default", "deterministic", "ratio", "95 %")
    for point in points:
        spread = f"{point['low']} to {point['high']}"
        table.add_row(point["what"], str(point["peer"]), str(point["ours"]), str(point["ratio"]), spread)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
