"""Linear layers on the GPU: default PyTorch against ours, vLLM's batch-invariant linear and batch_invariant_ops.

Each point is one CUDA graph a side, weights rotated through more than the L2 cache; the sides take turns, and the ratio
is the median over the turns, with a bootstrap interval of 95 %. vLLM's and batch_invariant_ops' kernels are measured
where they can be imported.

usage: benchmarks/gemm.py [--repeats 11] [--models Qwen3-8B ...] [--out benchmarks/results/gemm.json]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bootstrap import interval
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm_deterministic.kernels.gemm import certify, dispatch
from vllm_deterministic.kernels.gemm.schedules import name_of
from vllm_deterministic.kernels.gemm.tree import Problem
from vllm_deterministic.kernels.timing import Timed, copies_beyond_l2

# (N, K) as vLLM merges the layers, tensor parallelism 1.
MODELS = {
    model: dict(zip(("qkv", "o", "gate_up", "down", "lm_head"), shapes, strict=True))
    for model, shapes in {
        "Qwen3-8B": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)),
        "Qwen3-0.6B": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)),
        "Llama-3.1-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
        "Llama-3.1-70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (128256, 8192)),
    }.items()
}
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)

Product = Callable[[torch.Tensor, torch.Tensor], Any]


def peers() -> dict[str, Product]:
    """The systems compared with: PyTorch's default always, the batch-invariant ones where they are installed."""
    found: dict[str, Product] = {"default": torch.nn.functional.linear}
    for name, module, attribute in (
        ("vllm_batch_invariant", "vllm.model_executor.determinism.batch_invariant", "linear_batch_invariant"),
        ("batch_invariant_ops", "batch_invariant_ops.batch_invariant_ops", "matmul_persistent"),
    ):
        try:
            product = getattr(importlib.import_module(module), attribute)
        except ImportError:
            continue
        found[name] = product if attribute.startswith("linear") else lambda x, w, product=product: product(x, w.t())
    return found


def measure(problem: Problem, m: int, weights: list[torch.Tensor], sides: dict[str, Product], repeats: int) -> Any:
    """One point: microseconds of every side, and default / ours with its interval."""
    x = torch.randn(m, problem.k, device="cuda").to(problem.dtype)
    few = weights if m <= 1024 else weights[:2]
    graphs = {}
    for name, product in sides.items():
        graphs[name] = Timed([lambda w=w, product=product: product(x, w) for w in few])
        graphs[name].seconds()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(repeats):
        for name in sorted(graphs, reverse=bool(turn % 2)):
            times[name].append(graphs[name].seconds() * 1e6)
    ratios = [peer / ours for peer, ours in zip(times["default"], times["ours"], strict=True)]
    low, high = interval(ratios)
    schedule, rows = dispatch.plan(few[0], None).choose(m)
    median = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return {
        "unit": "us", "peer": median["default"], "ours": median["ours"], "ratio": round(statistics.median(ratios), 4),
        "low": round(low, 4), "high": round(high, 4), "n": problem.n, "k": problem.k, "m": m,
        "others": {name: value for name, value in median.items() if name not in ("default", "ours")},
        "schedule": name_of(schedule), "rows": rows,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gemm.json")
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    sides = {**peers(), "ours": dispatch.linear}
    layers: dict[tuple[int, int], list[str]] = {}
    for model in args.models:
        for layer, shape in MODELS[model].items():
            layers.setdefault(shape, []).append(f"{model} {layer}")
    points = []
    for (n, k), names in track(layers.items(), description="shapes"):
        problem = Problem(n, k, torch.bfloat16)
        sizes = [m for m in SIZES if m <= 1024 or n < 100_000]  # a vocabulary sees sampled rows only
        dispatch.prepare(problem, sizes[-1], device)
        copies = copies_beyond_l2(n * k * 2, device)
        weights = [torch.randn(n, k, device=device).to(problem.dtype) for _ in range(copies)]
        for m in sizes:
            what = f"{', '.join(names)} ({n}x{k}), M = {m}"
            points.append({"what": what, **measure(problem, m, weights, sides, args.repeats)})
        del weights
        torch.cuda.empty_cache()
        report(args.out, points, args)
    summary(points)
    return 0


def report(path: Path, points: list[Any], args: argparse.Namespace) -> None:
    facts = certify.machine(0)
    content = {
        "card": facts["card"],
        "driver": facts["driver"],
        "versions": {name: facts[name] for name in ("torch", "triton", "cublaslt")},
        "command": shlex.join(["benchmarks/gemm.py", "--repeats", str(args.repeats), "--models", *args.models]),
        "date": datetime.date.today().isoformat(),
        "points": points,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def summary(points: list[Any]) -> None:
    """The table people read: geometric means by size class, and every point that falls short of 0.97."""
    table = Table("M", "points", "default / ours", "worst", "vLLM batch-invariant / ours", "batch_invariant_ops / ours")
    for first, last in ((1, 32), (33, 512), (513, 8192), (1, 8192)):
        some = [point for point in points if first <= point["m"] <= last]
        if not some:
            continue

        def mean(name: str, some: list[Any] = some) -> str:
            values = [p["others"][name] / p["ours"] for p in some if name in p["others"]]
            return f"{statistics.geometric_mean(values):.3f}" if values else ""

        ratios = [point["ratio"] for point in some]
        table.add_row(
            f"{first}-{last}", str(len(some)), f"{statistics.geometric_mean(ratios):.4f}", f"{min(ratios):.3f}",
            mean("vllm_batch_invariant"), mean("batch_invariant_ops"),
        )  # fmt: skip
    console = Console(width=160)
    console.print(table)
    for point in points:
        if point["high"] < 0.97:
            console.print(
                f"short: {point['what']}: {point['ratio']} [{point['low']}, {point['high']}]", point["schedule"]
            )


if __name__ == "__main__":
    sys.exit(main())
