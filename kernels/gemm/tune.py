"""Finds the fastest schedule of a weight shape at each size of M on this card, and writes the card's table.

Tuning cannot change a bit: what it proposes is certified before it runs. So it may be run on one machine of a fleet and
not on another, again after an upgrade, or never.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from vllm_deterministic.kernels import certificates
from vllm_deterministic.kernels.gemm import cublaslt
from vllm_deterministic.kernels.gemm.certify import certify
from vllm_deterministic.kernels.gemm.pointer import Pointer
from vllm_deterministic.kernels.gemm.schedules import Schedule, name_of
from vllm_deterministic.kernels.gemm.tables import card_file
from vllm_deterministic.kernels.gemm.tma import Tma
from vllm_deterministic.kernels.gemm.tree import Problem
from vllm_deterministic.kernels.timing import Timed, copies_beyond_l2

__all__ = ["SIZES", "candidates", "compile_all", "tune", "write_table"]

# Where the fastest schedule changes: CUDA graph sizes below 512, powers of two above.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
FINALISTS = 3  # of each family


def _pointers() -> Iterator[Pointer]:
    """Weight strips: how many bytes are under way (block_k x stages) against how many programs share a processor."""
    for block_m in (16, 32, 64):
        for rows_n, block_k, stages in (
            (64, 64, 8), (64, 128, 4), (64, 128, 6), (64, 256, 3), (64, 256, 4),
            (32, 128, 4), (32, 128, 6), (32, 256, 3), (32, 256, 4),
            (16, 128, 8), (16, 256, 3), (16, 256, 4), (16, 256, 5), (16, 512, 2), (8, 128, 8), (8, 256, 4), (8, 256, 5),
        ):  # fmt: skip
            yield Pointer(block_m, 64, block_k, rows_n, True, 4, stages)
    for block_n, block_k, warps, stages in (
        (16, 256, 1, 8), (16, 256, 2, 5), (16, 256, 2, 8), (16, 256, 4, 5), (16, 256, 4, 8), (16, 256, 4, 12),
        (16, 512, 4, 3), (16, 512, 4, 4), (16, 512, 4, 6),
        (32, 128, 4, 8), (32, 256, 4, 4), (32, 256, 4, 5), (64, 128, 4, 6),
    ):  # fmt: skip
        yield Pointer(16, block_n, block_k, block_n, False, warps, stages)
    for block_m, block_n, block_k, stages in ((32, 16, 256, 4), (32, 32, 128, 6), (64, 32, 128, 5)):
        yield Pointer(block_m, block_n, block_k, block_n, False, 4, stages)


def _tmas() -> Iterator[Tma]:
    for block_m in (16, 32, 64, 128):
        for block_n, block_k, stages in (
            (64, 128, 6),
            (64, 128, 4),
            (64, 256, 3),
            (64, 256, 5),
            (128, 64, 6),
            (128, 128, 4),
        ):
            if (block_m + block_n) * block_k * 2 * stages < 220_000:
                yield Tma(block_m, block_n, block_k, 8, True, False, 4, stages)
    for block_m, block_n, block_k, warps, stages in (
        (64, 32, 128, 4, 6), (64, 64, 128, 4, 5), (64, 64, 64, 4, 8), (64, 128, 64, 4, 6), (64, 128, 128, 4, 4),
        (128, 32, 128, 4, 4), (128, 64, 64, 4, 6), (128, 64, 128, 4, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3), (256, 64, 64, 8, 4), (256, 128, 64, 8, 3),
    ):  # fmt: skip
        yield Tma(block_m, block_n, block_k, 8, False, False, warps, stages)
    for block_m, block_n, warps, stages in ((64, 256, 4, 4), (128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 4)):
        yield Tma(block_m, block_n, 64, 8, False, True, warps, stages)


def candidates(problem: Problem, m: int, device: int) -> list[Schedule]:
    """The schedules worth timing for m rows."""
    ours: list[Schedule] = []
    for schedule in (*_pointers(), *_tmas()):
        crowded = m > 4 * schedule.block_m if schedule.family == "pointer" else m > 64 and schedule.block_m < 64
        empty = schedule.block_m > 2 * max(16, m)
        strip = schedule.block_n * schedule.block_k <= problem.n * problem.k
        if not crowded and not empty and strip and schedule.refusal(problem) is None:
            ours.append(schedule)
    # The library ranks few algorithms for each size; one that it ranks for a neighbouring size is often faster here.
    near = [size for size in SIZES if m <= 4 * size and size <= 4 * m]
    library = [found for size in (m, *near) for found in cublaslt.candidates(problem, size, device)]
    return [*ours, cublaslt.CublasLt(), *dict.fromkeys(library)]


def _compile(schedule: Schedule, dtype: torch.dtype, bias: bool) -> str | None:
    x, weight = (torch.zeros(256, 1024, dtype=dtype, device="cuda") for _ in range(2))
    try:
        for out_dtype in (dtype, torch.float32):  # certification compares float32 outputs
            schedule.run(x, weight, weight[:, 0].contiguous() if bias else None, x.new_empty(256, 256, dtype=out_dtype))
    except Exception as reason:  # a tile that does not fit this card is no candidate, whatever the compiler calls it
        return f"{name_of(schedule)}: {type(reason).__name__}: {str(reason).split('. ')[0]}"
    return None


def compile_all(dtype: torch.dtype, bias: bool = False, processes: int | None = None) -> list[str]:
    """Compiles every Triton candidate into Triton's cache, in parallel. Returns what could not be compiled, and why.

    A compiled kernel does not depend on the shape, so this is done once for all of them.
    """
    jobs: list[Schedule] = [*_pointers(), *_tmas()]
    count = processes or min(16, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        failures = pool.map(_compile, jobs, [dtype] * len(jobs), [bias] * len(jobs), chunksize=4)
        return [failure for failure in failures if failure]


def tune(
    problem: Problem,
    device: torch.device,
    sizes: Sequence[int] = SIZES,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[int, list[tuple[float, Schedule]]]:
    """M -> (seconds, schedule) of the finalists, fastest first: each on the tree at this M, as checked here.

    Every candidate is timed once; the best of each family are timed again in turns, so that a card that slows down
    slows all of them.
    """
    n, k = problem.n, problem.k
    copies = copies_beyond_l2(n * k * problem.dtype.itemsize, device)
    weights = [torch.randn(n, k, device=device).to(problem.dtype) for _ in range(copies)]
    bias = torch.randn(n, device=device).to(problem.dtype) if problem.bias else None
    found = {}
    for m in sizes:
        x = torch.randn(m, k, device=device).to(problem.dtype)
        y = torch.empty(m, n, device=device, dtype=problem.dtype)
        turns = copies if m <= 1024 else 2

        def timed(schedule: Schedule, x: torch.Tensor = x, y: torch.Tensor = y, turns: int = turns) -> Timed | None:
            try:
                return Timed([lambda w=w: schedule.run(x, w, bias, y) for w in weights[:turns]])
            except Exception:  # not every tile fits every card; what cannot run is no candidate
                return None

        first = {}
        for schedule in candidates(problem, m, device.index or 0):
            if (graph := timed(schedule)) is not None:
                graph.seconds()
                first[schedule] = min(graph.seconds() for _ in range(2))
        ordered = sorted(first, key=first.__getitem__)
        families = {schedule.family for schedule in ordered}
        best = [s for family in families for s in [s for s in ordered if s.family == family][:FINALISTS]]
        on_the_tree, _ = certify(problem, [(schedule, [m]) for schedule in best], device)
        graphs = {s: graph for s in best if name_of(s) in on_the_tree and (graph := timed(s)) is not None}
        times: dict[Schedule, list[float]] = {schedule: [] for schedule in graphs}
        for turn in range(9):
            for schedule, graph in sorted(graphs.items(), key=lambda entry: name_of(entry[0]), reverse=bool(turn % 2)):
                times[schedule].append(graph.seconds())
        found[m] = sorted(
            ((statistics.median(t), schedule) for schedule, t in times.items()), key=lambda entry: entry[0]
        )
        progress(f"{problem}, M = {m}: {found[m][0][0] * 1e6:.1f} us, {name_of(found[m][0][1])}")
    return found


def write_table(
    results: dict[Problem, dict[int, list[tuple[float, Schedule]]]], card: str, path: Path | None = None
) -> Path:
    """Writes or extends a card's table, whole or not at all; by default the user's own. Returns its path.

    Each size keeps its fastest schedule and the fastest of another family, in case the first is off the tree elsewhere.
    """
    target = path or certificates.cache_dir() / "schedules" / card_file(card)
    target.parent.mkdir(parents=True, exist_ok=True)
    shapes = json.loads(target.read_text())["shapes"] if target.exists() else {}
    for problem, sizes in results.items():
        shapes[f"{problem.n}x{problem.k}"] = [[m, _two_families(entries)] for m, entries in sorted(sizes.items())]
    lines = ",\n".join(
        f'  "{shape}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for shape, rows in sorted(shapes.items())
    )
    text = f'{{\n "card": {json.dumps(card)},\n "shapes": {{\n{lines}\n }}\n}}\n'
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, target)
    return target


def _two_families(entries: Iterable[tuple[float, Schedule]]) -> list[str]:
    ordered = [schedule for _, schedule in entries]
    other = next((schedule for schedule in ordered if schedule.family != ordered[0].family), None)
    return [name_of(schedule) for schedule in (ordered[0], other) if schedule is not None]
