"""Latency under load with and without `--deterministic`: two servers on one card that take turns at the same traffic.

The traffic is `vllm bench serve`'s: prompts of random tokens that arrive at random times, some rates, and prompts that
share long prefixes. Both sides get the same prompts at the same times. A ratio is the median of the rounds'.

usage: benchmarks/online.py MODEL [--rounds 2] [--seconds 12] [--rates 2 8 24] [--serve="OPTIONS OF vllm serve"]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import machine, write

from vllm_deterministic.verify.server import Server, serve

SIDES: dict[str, list[str]] = {"default": [], "ours": ["--deterministic"]}
METRICS = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")


def traffic(rates: list[float]) -> dict[str, tuple[float, list[str]]]:
    """What is asked -> (requests a second, options of `vllm bench serve`)."""
    random = ["--dataset-name", "random", "--random-input-len", "512", "--random-output-len", "96"]
    random += ["--random-range-ratio", "0.5"]
    shared = ["--dataset-name", "prefix_repetition", "--prefix-repetition-num-prefixes", "4"]
    shared += ["--prefix-repetition-prefix-len", "4000", "--prefix-repetition-suffix-len", "64"]
    found = {f"{rate:g} requests/s": (rate, random) for rate in rates}
    rate = rates[len(rates) // 2]
    return {**found, f"{rate:g} requests/s, shared prefixes": (rate, [*shared, "--prefix-repetition-output-len", "48"])}


def measure(server: Server, model: str, rate: float, options: list[str], seconds: float, seed: int) -> dict[str, float]:
    """One run of `vllm bench serve`: METRICS and the output tokens per second."""
    count = max(8, round(rate * seconds))
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai",
            "--base-url", server.url, "--model", model, "--served-model-name", server.model,
            "--request-rate", str(rate), "--num-prompts", str(count), "--seed", str(seed), "--ignore-eos",
            "--disable-tqdm", "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99",
            "--save-result", "--result-dir", folder, "--result-filename", "r.json", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
        result = json.loads((Path(folder) / "r.json").read_text())
    if result["failed"]:
        sys.exit(f"{result['failed']} of {count} requests failed")
    return {name: result[name] for name in (*METRICS, "output_throughput")}


def points(seen: dict[str, list[dict[str, dict[str, float]]]]) -> list[dict[str, Any]]:
    found = []
    for what, rounds in seen.items():
        for metric in (*METRICS, "output_throughput"):
            pairs = [(turn["default"][metric], turn["ours"][metric]) for turn in rounds]
            rate = metric == "output_throughput"
            peer, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(b / a if rate else a / b for a, b in pairs)
            unit = "tokens/s" if rate else "ms"
            name = "output tokens" if rate else metric.removesuffix("_ms").replace("_", " ").replace("median", "p50")
            row = {"what": f"{what}: {name}", "unit": unit, "peer": round(peer, 2), "ours": round(ours, 2)}
            found.append({**row, "ratio": round(ratio, 3), "rounds": len(pairs)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=12, help="of traffic a turn")
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 8, 24], help="requests per second")
    parser.add_argument("--serve", default="", help="options of vllm serve, for both sides")
    parser.add_argument("--logs", type=Path, default=Path(".cache/online-logs"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "online.json")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    asked = traffic(args.rates)
    seen: dict[str, list[dict[str, dict[str, float]]]] = {what: [] for what in asked}
    said = [Path(args.model).name, *sys.argv[2:]]
    report = {
        **machine("torch", "triton", "vllm"),
        "command": shlex.join(["python", "benchmarks/online.py", *said]),
        "date": datetime.date.today().isoformat(),
    }
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                serve(args.model, *flags, *shlex.split(args.serve), log=args.logs / f"{name}.log", timeout=900)
            )
            for name, flags in SIDES.items()
        }
        for turn in range(-1, args.rounds):
            for what, (rate, options) in asked.items():
                both = {}
                for name in list(servers) if turn % 2 else list(servers)[::-1]:
                    seconds = args.seconds if turn >= 0 else 2  # the first turn warms up
                    both[name] = measure(servers[name], args.model, rate, options, seconds, seed=turn + 2)
                if turn >= 0:
                    seen[what].append(both)
            if turn >= 0:
                write(args.out, {**report, "points": points(seen)})
            print(f"round {turn + 1} of {args.rounds}", flush=True)
    for row in points(seen):
        print(f"{row['what']:48s} {row['peer']:10.2f} {row['ours']:10.2f} {row['unit']:9s} {row['ratio']:.3f}")


if __name__ == "__main__":
    main()
