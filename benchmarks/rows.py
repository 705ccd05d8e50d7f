"""What works row by row beside the products: norms and the sampler, vLLM's default against ours.

Device time of CUDA graphs; the sides take turns, and the ratio is the median over the turns, with a bootstrap interval
of 95 %. Norms: vLLM's native definition as Inductor compiles it, for a dynamic number of rows. Sampler: vLLM's V2
kernels for requests with seeds, on logits of 151,936 tokens; FlashInfer's beside them where it is installed. "launched"
is wall time of calls that are not in a graph, as vLLM's sampler is not.

usage: benchmarks/rows.py [--repeats 11] [--only norm sampler scores] [--out benchmarks/results/rows.json]
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vllm
from bootstrap import interval
from rich.console import Console
from rich.table import Table
from vllm_deterministic.kernels.gemm import certify
from vllm_deterministic.kernels.norm import rms
from vllm_deterministic.kernels.sampling.draw import draw
from vllm_deterministic.kernels.sampling.scores import Scores
from vllm_deterministic.kernels.sampling.select import thresholds
from vllm_deterministic.kernels.timing import Timed

VOCAB = 151936
EPSILON = 1e-6
TOKENS = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)
ROWS = (1, 8, 32, 64, 128, 256, 512)

Call = Callable[[], object]


def turns(what: str, unit: str, repeats: int, sides: dict[str, Callable[[], float]]) -> dict[str, Any]:
    """One point. Each side gives the seconds of one measurement."""
    for measure in sides.values():
        measure()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in sorted(sides, reverse=bool(turn % 2)):
            times[name].append(sides[name]() * 1e6)
    ratios = [peer / ours for peer, ours in zip(times["default"], times["ours"], strict=True)]
    low, high = interval(ratios)
    median = {name: round(statistics.median(values), 2) for name, values in times.items()}
    point = {
        "what": what, "unit": unit, "peer": median["default"], "ours": median["ours"],
        "ratio": round(statistics.median(ratios), 4), "low": round(low, 4), "high": round(high, 4),
        "others": {name: value for name, value in median.items() if name not in ("default", "ours")},
    }  # fmt: skip
    print(json.dumps(point), flush=True)
    return point


def graphed(calls: list[Call], before: Call = lambda: None) -> Callable[[], float]:
    """Seconds a call, in one graph of `calls`; `before` is run ahead of the clock."""
    before()
    timed = Timed(calls)

    def measure() -> float:
        before()
        return timed.seconds()

    return measure


def launched(calls: list[Call], before: Call) -> Callable[[], float]:
    def measure() -> float:
        before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / len(calls)

    return measure


# --- norms --------------------------------------------------------------------------------------------------------
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, as vLLM's native one writes it: [tokens, heads, size]."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def rotated(norm: Any, qkv: torch.Tensor, place: torch.Tensor, weight: torch.Tensor, table: torch.Tensor) -> Any:
    """Qwen3-8B's q and k on their way into attention: 32 and 8 heads of 128 out of the fused projection."""
    cos, sin = table.index_select(0, place).unsqueeze(1).chunk(2, dim=-1)
    q, k = qkv[:, :4096].unflatten(1, (32, 128)), qkv[:, 4096:5120].unflatten(1, (8, 128))
    return rope(norm(q, weight, EPSILON), cos, sin), rope(norm(k, weight, EPSILON), cos, sin)


def compiled(
    function: Callable[..., Any], by_token: list[torch.Tensor], fixed: list[torch.Tensor]
) -> Callable[..., Any]:
    """Compiled once, with the largest number of tokens at hand and any number allowed, as vLLM does."""
    torch._dynamo.reset()
    for operand in by_token:
        torch._dynamo.mark_dynamic(operand, 0)
    graph = torch.compile(function, fullgraph=True)
    graph(*by_token, *fixed)
    return graph


def norms(repeats: int) -> Iterator[dict[str, Any]]:
    from vllm import ir

    native, native_add = (getattr(ir.ops, name).impls["native"].impl_fn for name in ("rms_norm", "fused_add_rms_norm"))
    most = TOKENS[-1]
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    cases: dict[str, tuple[Any, Any, list[torch.Tensor], list[torch.Tensor]]] = {}
    for size in (1024, 4096):
        x, residual, weight = make(most, size), make(most, size), make(size)
        plain = (lambda x, w: native(x, w, EPSILON), lambda x, w: rms.rms_norm(x, w, EPSILON))
        added = (
            lambda x, r, w: native_add(x, r, w, EPSILON),
            lambda x, r, w: rms.fused_add_rms_norm(x, r, w, EPSILON),
        )
        cases[f"rms_norm, hidden {size}"] = (*plain, [x], [weight])
        cases[f"fused_add_rms_norm, hidden {size}"] = (*added, [x, residual], [weight])
    place = torch.arange(most, device="cuda")
    heads = ([make(most, 6144), place], [make(128), make(most, 128)])
    cases["q/k norm and RoPE, 32 + 8 heads of 128"] = (partial(rotated, native), partial(rotated, rms.rms_norm), *heads)
    for name, (default, ours, by_token, fixed) in cases.items():
        functions = {side: compiled(f, by_token, fixed) for side, f in (("default", default), ("ours", ours))}
        for tokens in TOKENS:
            operands = [*(operand[:tokens] for operand in by_token), *fixed]
            calls = 16 if tokens <= 512 else 4
            sides = {side: graphed([partial(f, *operands)] * calls) for side, f in functions.items()}
            yield turns(f"{name}, {tokens} tokens", "us", repeats, sides)


# --- sampler ------------------------------------------------------------------------------------------------------
SETTINGS: dict[str, tuple[float, int | None, float | None]] = {
    "greedy": (0.0, None, None),
    "T 0.8": (0.8, None, None),
    "top-p 0.95": (0.8, None, 0.95),
    "top-k 50": (0.8, 50, None),
    "top-k 50, top-p 0.9": (0.8, 50, 0.9),
}


def peers() -> dict[str, Callable[..., object]]:
    """(logits, requests, temperatures, seeds, positions, k, p) -> tokens, vLLM's way. FlashInfer's sampler, which vLLM
    takes where nobody in a batch brought a seed or is greedy, only where it is installed and can be built."""
    from vllm.v1.sample.ops import topk_topp_sampler as ops
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    def default(x: Any, requests: Any, hot: Any, seeds: Any, places: Any, k: Any, p: Any) -> object:
        x = ops.apply_top_k_top_p(x, k, p)
        return gumbel_sample(x, requests, hot, seeds, places, apply_temperature=False, is_drafting=False)

    found: dict[str, Callable[..., object]] = {"default": default}
    try:
        ops.flashinfer_sample(torch.zeros(1, 64, device="cuda"), None, torch.full((1,), 0.5, device="cuda"))
    except Exception as missing:
        print(f"without FlashInfer: {missing!r}")
    else:
        found["flashinfer"] = lambda x, requests, hot, seeds, places, k, p: ops.flashinfer_sample(x, k, p)
    return found


def our_sampler(x: Any, requests: Any, hot: Any, seeds: Any, places: Any, k: Any, p: Any) -> object:
    return draw(x, requests, hot, seeds, places, thresholds(x, k, p))


def restore(work: list[torch.Tensor], source: torch.Tensor) -> None:
    """vLLM drops logits in place."""
    for copy in work:
        copy.copy_(source)


def sampler(repeats: int) -> Iterator[dict[str, Any]]:
    all_sides = {**peers(), "ours": our_sampler}
    for rows, (name, (temperature, limit, nucleus)) in itertools.product(ROWS, SETTINGS.items()):
        generator = torch.Generator("cuda").manual_seed(rows)
        source = torch.randn(rows, VOCAB, generator=generator, device="cuda").mul_(2.5).bfloat16()
        if temperature:
            source = source.float().div_(temperature)
        work = [source.clone() for _ in range(4 if rows <= 128 else 2)]
        requests = torch.arange(rows, device="cuda", dtype=torch.int32)
        k = None if limit is None else torch.full((rows,), limit, device="cuda", dtype=torch.int32)
        p = None if nucleus is None else torch.full((rows,), nucleus, device="cuda")
        hot = torch.full((rows,), temperature, device="cuda")
        rest = (requests, hot, requests.long() * 12345, requests.long() * 100, k, p)
        measured = {}
        for side, function in all_sides.items():
            if side == "flashinfer" and k is None and p is None:
                continue
            try:
                calls = [partial(function, x, *rest) for x in work]
                measured[side] = graphed(calls, partial(restore, work, source))
            except Exception as reason:
                print(f"{side} cannot be captured: {reason!r}")
        yield turns(f"sampler: {name}, {rows} rows", "us", repeats, measured)
        if rows in (1, 64) and name in ("greedy", "top-k 50, top-p 0.9"):
            work = [source.clone() for _ in range(16)]
            plain = {
                side: launched([partial(all_sides[side], x, *rest) for x in work], partial(restore, work, source))
                for side in ("default", "ours")
            }
            yield turns(f"sampler, launched: {name}, {rows} rows", "us", repeats, plain)


def our_scores(x: torch.Tensor, n: int, sampled: torch.Tensor) -> object:
    found = Scores(x, sampled, n)
    return found.logprobs(torch.cat((sampled.unsqueeze(-1), found.best), dim=1))


def scores(repeats: int) -> Iterator[dict[str, Any]]:
    from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

    for rows, n in itertools.product(ROWS, (0, 5, 20)):
        x = torch.randn(rows, VOCAB, device="cuda").mul_(2.5).bfloat16()
        operands = (x, n, torch.arange(rows, device="cuda") * 100)
        sides = {
            side: graphed([partial(function, *operands)] * 4)
            for side, function in (("default", compute_topk_scores), ("ours", our_scores))
        }
        yield turns(f"scores: top {n}, {rows} rows", "us", repeats, sides)


PARTS = {"norm": norms, "sampler": sampler, "scores": scores}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rows.json")
    args = parser.parse_args()
    points = []
    for part in args.only:
        for point in PARTS[part](args.repeats):
            points.append({"part": part, **point})
            report(args.out, points, args)
    summary(points)
    return 0


def report(path: Path, points: list[dict[str, Any]], args: argparse.Namespace) -> None:
    facts = certify.machine(0)
    content = {
        "card": facts["card"],
        "driver": facts["driver"],
        "versions": {"vllm": vllm.__version__, "torch": facts["torch"], "triton": facts["triton"]},
        "command": shlex.join(["benchmarks/rows.py", "--repeats", str(args.repeats), "--only", *args.only]),
        "date": datetime.date.today().isoformat(),
        "points": points,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def summary(points: list[dict[str, Any]]) -> None:
    table = Table("part", "points", "default / ours", "worst")
    for part in dict.fromkeys(point["part"] for point in points):
        some = [point for point in points if point["part"] == part]
        worst = min(some, key=lambda point: point["ratio"])
        mean = statistics.geometric_mean(point["ratio"] for point in some)
        table.add_row(part, str(len(some)), f"{mean:.3f}", f"{worst['ratio']} ({worst['what']})")
    console = Console(width=160)
    console.print(table)
    for point in points:
        if point["high"] < 0.97:
            console.print(f"short: {point['what']}: {point['ratio']} [{point['low']}, {point['high']}]")


if __name__ == "__main__":
    sys.exit(main())
