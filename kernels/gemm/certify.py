"""Certification of a linear layer's schedules: bit for bit against the reference, on this card, for every row count.

The operands are hard data, all kinds as rows of one matrix. Few rows are run on all of them in turn, and each larger
count on a window that starts elsewhere, so that a row meets many positions and neighbours. Float32 outputs are compared
where the schedule can give them, since rounding to 16 bits hides most of a wrong order, and the outputs in the served
type as well: they come from another compiled kernel.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from vllm_deterministic.kernels import certificates
from vllm_deterministic.kernels.certificates import Certificate
from vllm_deterministic.kernels.gemm.hard_data import hard_operands
from vllm_deterministic.kernels.gemm.schedules import Schedule, name_of
from vllm_deterministic.kernels.gemm.tree import Problem

from vllm_deterministic.errors import CertificationError

__all__ = ["EVERY_M", "certificate", "certify", "machine", "row_counts"]

# Every row count up to here is run; above, one in STRIDE and the largest.
EVERY_M = 1024
STRIDE = 128
_OFFSETS = 40  # windows start at rows 0 to 39
_KINDS = 8  # of rows in the hard data

Reference = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", torch.dtype], torch.Tensor]


@functools.cache
def machine(device: int) -> dict[str, str]:
    """What the bits of a schedule may depend on: the card, the libraries and their sources here."""
    from vllm_deterministic.kernels.gemm import cublaslt

    card = certificates.card(device, Path(__file__).parent)
    return {**card, "cublaslt": str(cublaslt.version()), "workspace": "0"}


def row_counts(max_m: int) -> list[int]:
    """The row counts that are run: every one up to EVERY_M, then one in STRIDE, and max_m."""
    counts = {*range(1, min(max_m, EVERY_M) + 1), *range(EVERY_M + STRIDE, max_m, STRIDE), max_m}
    return sorted(counts - {0})


def certify(
    problem: Problem,
    schedules: Sequence[tuple[Schedule, Iterable[int]]],
    device: torch.device,
    reference: Reference | None = None,
) -> tuple[dict[str, list[tuple[int, int]]], dict[str, str]]:
    """Runs each schedule at each of its row counts. Returns (name -> certified row counts, name -> first difference).

    A schedule that is one kernel is dropped whole for any difference: off the tree somewhere, it has lost its claim.
    Where a library picks a kernel for each row count, the row counts that differ are left out, and the first is named.
    A row count that cannot be run is left out as well. For a schedule made of whole tiles, a certified row count stands
    for the others whose tiles it fills.
    Raises CertificationError where the reference itself is off: not exact on integers, or beyond its error bound.
    """
    schedules = [(schedule, sorted(set(counts))) for schedule, counts in schedules]
    most = max((counts[-1] for _, counts in schedules if counts), default=0)
    x, weight, bias = hard_operands(most + _OFFSETS, problem.n, problem.k, problem.dtype, device)
    given = bias if problem.bias else None
    if reference is None:
        from vllm_deterministic.kernels.gemm.reference import bit_reference

        reference = bit_reference
    _check_reference(reference, x, weight, problem)
    certified: dict[str, list[tuple[int, int]]] = {}
    dropped: dict[str, str] = {}
    # Full width is checked to EVERY_M rows only: the sums are the same code above, and they would need gigabytes.
    passes = [(torch.float32, EVERY_M)] if problem.dtype != torch.float32 else []
    passes.append((problem.dtype, most))
    survivors = {name_of(schedule): set(counts) for schedule, counts in schedules}
    for out_dtype, limit in passes:
        rows = min(most, limit) + _OFFSETS
        expected = reference(x[:rows], weight, given, out_dtype)
        out = torch.empty_like(expected)
        for schedule, counts in schedules:
            name = name_of(schedule)
            tried = [m for m in counts if m <= limit and m in survivors[name]]
            unable, differing = _run(schedule, tried, x, weight, given, expected, out)
            if differing:
                m, elements = next(iter(differing.items()))
                lost = "dropped" if schedule.one_kernel else f"{len(differing)} row counts left out"
                at = f"M = {m}, {str(out_dtype)[6:]} output"
                dropped.setdefault(name, f"{lost}; {at}: {elements} of {m * problem.n} elements differ")
                survivors[name] -= survivors[name] if schedule.one_kernel else set(differing)
            if unable and out_dtype == problem.dtype:  # an algorithm may serve its own type and not float32
                m, why = next(iter(unable.items()))
                dropped.setdefault(name, f"{len(unable)} row counts cannot be run; M = {m}: {why}")
                survivors[name] -= set(unable)
    for schedule, _ in schedules:
        name = name_of(schedule)
        if survivors[name]:
            certified[name] = certificates.intervals(_covered(schedule, survivors[name]))
    return certified, dropped


def _covered(schedule: Schedule, counts: set[int]) -> set[int]:
    """The row counts whose tiles are those of a certified one."""
    ran = {schedule.rows(m) for m in counts}
    return {m for m in range(1, max(counts) + 1) if m in counts or schedule.rows(m) in ran}


def _windows(m: int) -> range:
    """Where a run of m rows starts: few rows walk over all kinds of data, many meet them all at once."""
    if m < _KINDS:
        return range(0, _OFFSETS, m)
    return range((37 * m) % _OFFSETS, _OFFSETS, _OFFSETS)


def _run(
    schedule: Schedule, counts: Sequence[int], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    expected: torch.Tensor, out: torch.Tensor,
) -> tuple[dict[int, str], dict[int, int]]:  # fmt: skip
    """(row counts that cannot be run -> why, row counts that differ -> how many elements do)."""
    from vllm_deterministic.kernels.gemm.reference import count_differing

    unable: dict[int, str] = {}
    differing = torch.zeros(len(counts), dtype=torch.int64, device=x.device)
    out.fill_(7.0)  # what a schedule leaves unwritten differs
    for at, m in enumerate(counts):
        for start in _windows(m):
            y = out[start : start + m]
            try:
                schedule.run(x[start : start + m], weight, bias, y)
            except Exception as reason:  # whatever a library or a compiler raises: what does not run is not certified
                unable[m] = f"{type(reason).__name__}: {reason}"
                break
            count_differing(y, expected[start : start + m], differing[at : at + 1])
    found = differing.tolist()
    return unable, {m: bad for m, bad in zip(counts, found, strict=True) if bad}


def _check_reference(reference: Reference, x: torch.Tensor, weight: torch.Tensor, problem: Problem) -> None:
    """Holds the reference against float64: exact on integers, within its bound elsewhere."""
    from vllm_deterministic.kernels.gemm.reference import error_bound, exact

    # 64 columns of 24 rows: every kind of data three times, against a float64 product that stays small.
    rows, columns = x[:24], weight[: min(64, problem.n)].contiguous()
    y = reference(rows, columns, None, torch.float32).double()
    truth, bound = exact(rows, columns), error_bound(rows, columns)
    # A sum that may overflow on its way has no bound: partial sums stay below sum|ab|.
    finite = bound / (problem.k * 2.0**-21) < 2.0**127
    small = (columns.double() * 4).round().clamp(-8, 8).to(columns.dtype)
    whole = reference(rows[4::8], small, None, torch.float32).double()
    # Results below the smallest normal number may be flushed: one such number per term.
    slack = bound + problem.k * 2.0**-126
    if not torch.equal(whole, exact(rows[4::8], small)) or bool(((y - truth).abs() > slack)[finite].any()):
        raise CertificationError(
            f"linear layer {problem}: the reference kernel itself is wrong on this card: inexact on integers or beyond "
            "the error bound of its tree. Check the card and its driver (compute-sanitizer, nvidia-smi -q)"
        )


def certificate(
    problem: Problem, schedules: Sequence[tuple[Schedule, Iterable[int]]], device: torch.device, *, fresh: bool = False
) -> Certificate:
    """The cached certificate of exactly these schedules on this machine, or a new one. fresh: never the cached one."""
    asked = {name_of(schedule): sorted(set(counts)) for schedule, counts in schedules}
    shape = {**problem.shape, "asked": certificates.digest(asked)}
    key = {"operator": "linear", "tree": problem.tree.digest, "shape": shape, "machine": machine(device.index or 0)}
    if not fresh and (known := certificates.load(Certificate(**key, schedules={}).key)) is not None:
        return known
    start = time.perf_counter()
    with torch.cuda.device(device):
        certified, dropped = certify(problem, schedules, device)
    found = Certificate(**key, schedules=certified, dropped=dropped, seconds=time.perf_counter() - start)
    certificates.store(found)
    return found
