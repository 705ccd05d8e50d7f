"""Latency under load with and without `--deterministic`: two servers on one card that take turns at the same traffic.

The traffic is `vllm bench serve`'s: prompts of random tokens that arrive at random times, some rates, and prompts that
share long prefixes. Both sides get the same prompts at the same times. A ratio is the median of the rounds'.

usage: benchmarks/online.py MODEL [--rounds 2] [--seconds 12] [--rates 2 8 24] [--serve="OPTIONS OF vllm serve"]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import shlex
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from report import machine, write

from vllm_deterministic.verify.server import Server, free_port, serve

SIDES: dict[str, list[str]] = {"default": [], "ours": ["--deterministic"]}
HIT_RATE = "prefix-cache hit rate"
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
    """One run of `vllm bench serve`, in this process, which has read its modules.

    Returns METRICS, the output tokens per second, and the share of prompt tokens found in the prefix cache.
    """
    from vllm.benchmarks import serve as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    bench.add_cli_args(parser)
    count = max(8, round(rate * seconds))
    asked = [
        "--backend", "openai", "--base-url", server.url, "--model", model, "--served-model-name", server.model,
        "--request-rate", str(rate), "--num-prompts", str(count), "--seed", str(seed), "--ignore-eos", "--disable-tqdm",
        "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", *options,
    ]  # fmt: skip
    cache = [f"vllm:prefix_cache_{what}_total" for what in ("hits", "queries")]
    before = [server.metric(name) for name in cache]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = bench.main(parser.parse_args(asked))
    hits, queries = (server.metric(name) - was for name, was in zip(cache, before, strict=True))
    if result["failed"]:
        sys.exit(f"{result['failed']} of {count} requests failed:\n{said.getvalue()[-3000:]}")
    return {**{name: result[name] for name in (*METRICS, "output_throughput")}, HIT_RATE: hits / max(queries, 1)}


def points(seen: dict[str, list[dict[str, dict[str, float]]]]) -> list[dict[str, Any]]:
    found = []
    for what, rounds in seen.items():
        for metric in (*METRICS, "output_throughput", *([HIT_RATE] if "shared" in what else [])):
            pairs = [(turn["default"][metric], turn["ours"][metric]) for turn in rounds]
            more_is_better = metric not in METRICS
            peer, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(b / a if more_is_better else a / b for a, b in pairs)
            unit = {"output_throughput": "tokens/s", HIT_RATE: "of prompt tokens"}.get(metric, "ms")
            name = (
                metric.removesuffix("_ms").replace("_throughput", " tokens").replace("_", " ").replace("median", "p50")
            )
            row = {"what": f"{what}: {name}", "unit": unit, "peer": round(peer, 3), "ours": round(ours, 3)}
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
        # Side by side: a start is mostly compilation, of which each side has its own.
        pool = stack.enter_context(ThreadPoolExecutor(len(SIDES)))
        common, first = shlex.split(args.serve), free_port()  # both ask before either binds: two ports in a row
        starts = {}
        for at, (name, flags) in enumerate(SIDES.items()):
            server = serve(args.model, *flags, *common, port=first + at, log=args.logs / f"{name}.log", timeout=900)
            starts[name] = pool.submit(stack.enter_context, server)
        servers = {name: start.result() for name, start in starts.items()}
        print("both servers are up", flush=True)
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
        print(f"{row['what']:48s} {row['peer']:10.2f} {row['ours']:10.2f} {row['unit']:16s} {row['ratio']:.3f}")


if __name__ == "__main__":
    main()
