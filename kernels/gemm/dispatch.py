"""Which certified schedule runs a linear layer of M rows, and the operator that torch.compile and CUDA graphs see.

`prepare` certifies a shape once; `linear` then looks its plan up. The look-up is inside the operator, so a compiled
graph holds one node for every M, and a captured CUDA graph the kernel that was chosen when it was captured.
"""

from __future__ import annotations

import bisect
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from vllm_deterministic.kernels.certificates import Certificate
from vllm_deterministic.kernels.gemm.certify import certificate, row_counts
from vllm_deterministic.kernels.gemm.schedules import Schedule, parse
from vllm_deterministic.kernels.gemm.tables import Table, table_for
from vllm_deterministic.kernels.gemm.tree import Problem

from vllm_deterministic.errors import CertificationError

__all__ = ["Plan", "linear", "plan", "prepare"]

logger = logging.getLogger("vllm.deterministic")

# More rows at once are no faster per row, and certifying them would need gigabytes beside the weights.
MOST_ROWS = 8192

Choice = tuple[Schedule, int]  # a schedule, and the certified row count it is run at


@dataclass(frozen=True)
class Plan:
    """What runs at each M: certified schedules alone, in the table's order of preference.

    certified: schedule -> the row counts it may be run at, as inclusive intervals, ascending.
    """

    problem: Problem
    table: Table
    certified: Mapping[Schedule, Sequence[tuple[int, int]]]
    _chosen: dict[int, Choice] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, problem: Problem, table: Table, found: Certificate) -> Plan:
        """Raises CertificationError where no schedule is left."""
        certified = {parse(name): spans for name, spans in found.schedules.items()}
        if not certified:
            lost = "; ".join(f"{name}: {why}" for name, why in found.dropped.items()) or "none could be run"
            raise CertificationError(
                f"linear layer {problem}: no schedule is on the reduction tree on this machine ({lost}). "
                "This card, driver or library version cannot serve it deterministically"
            )
        return cls(problem, table, certified)

    @functools.cached_property
    def most(self) -> int:
        """The largest certified row count; more rows are run in pieces."""
        return max(last for spans in self.certified.values() for _, last in spans)

    def choose(self, m: int) -> Choice:
        """The schedule for m <= most rows, and the certified row count, at least m, at which it is run."""
        choice = self._chosen.get(m)
        if choice is None:
            choice = self._chosen[m] = _choose(m, self.table, self.certified)
        return choice

    def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        """Writes the product of any number of rows into y, through certified row counts alone. x: [M, K], y: [M, N]."""
        m = x.shape[0]
        if m > self.most:
            for start in range(0, m, self.most):
                self.run(x[start : start + self.most], weight, bias, y[start : start + self.most])
            return
        schedule, rows = self.choose(m)
        if rows == m:
            schedule.run(x, weight, bias, y)
            return
        wide = x.new_zeros(rows, x.shape[1])
        wide[:m] = x
        out = y.new_empty(rows, y.shape[1])
        schedule.run(wide, weight, bias, out)
        y.copy_(out[:m])


def _choose(m: int, table: Table, certified: Mapping[Schedule, Sequence[tuple[int, int]]]) -> Choice:
    preferred = next(schedules for most, schedules in table if m <= most)
    for schedule in (*preferred, *certified):
        if schedule in certified and _next_certified(certified[schedule], m) == m:
            return schedule, m
    # No schedule is certified at m itself: the one that needs the fewest empty rows.
    padded = [(rows, schedule) for schedule, spans in certified.items() if (rows := _next_certified(spans, m))]
    rows, schedule = min(padded, key=lambda choice: choice[0])
    return schedule, rows


def _next_certified(spans: Sequence[tuple[int, int]], m: int) -> int | None:
    """The smallest certified row count of at least m."""
    at = bisect.bisect_left(spans, m, key=lambda span: span[1])
    return max(m, spans[at][0]) if at < len(spans) else None


_plans: dict[tuple[int, int, torch.dtype, bool, int | None], Plan] = {}


def prepare(problem: Problem, max_m: int, device: torch.device, *, fresh: bool = False) -> Certificate:
    """Certifies a shape on this card, from the cache if it holds a certificate, and makes its plan.

    max_m: the largest number of rows to run at once, up to MOST_ROWS; more are run in pieces. Raises UnsupportedError
    for a dtype without a tree, CertificationError where no schedule is left.
    """
    tree = problem.tree  # refuses a dtype early
    table = table_for(problem, torch.cuda.get_device_name(device))
    counts = row_counts(min(max_m, MOST_ROWS))
    asked: dict[Schedule, set[int]] = {}
    first = 1
    for most, schedules in table:
        here = {m for m in counts if first <= m <= most}
        for schedule in schedules:
            if here and schedule.refusal(problem) is None:
                asked.setdefault(schedule, set()).update(here)
        first = most + 1
    found = certificate(problem, list(asked.items()), device, fresh=fresh)
    for name, why in found.dropped.items():
        logger.warning("linear layer %s, tree %s: %s is off the tree (%s)", problem, tree.digest[:8], name, why)
    _plans[problem.n, problem.k, problem.dtype, problem.bias, device.index] = Plan.of(problem, table, found)
    return found


def plan(weight: torch.Tensor, bias: torch.Tensor | None) -> Plan:
    """The plan of a weight's shape. Raises CertificationError where it was not prepared."""
    n, k = weight.shape
    try:
        return _plans[n, k, weight.dtype, bias is not None, weight.device.index]
    except KeyError:
        problem = Problem(n, k, weight.dtype, bias is not None)
        raise CertificationError(f"linear layer {problem} was never certified on {weight.device}: prepare it") from None


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.shape
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    # Rows may lie apart; inside a row the elements are neighbours, and rows start where 16-byte loads can.
    apart = rows.stride(0)
    fits = rows.stride(1) == 1 and (apart == k or (apart > k and apart * rows.itemsize % 16 == 0))
    if not fits or rows.data_ptr() % 16:
        rows = rows.clone(memory_format=torch.contiguous_format)
    y = x.new_empty(rows.shape[0], n)
    if rows.shape[0]:
        plan(weight, bias).run(rows, weight, bias, y)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# Defined on the library itself: torch.library.custom_op's checks around every call cost as much as a small product.
_library = torch.library.Library("vllm_deterministic", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear", _linear, "CUDA")
torch.library.register_fake("vllm_deterministic::linear", _linear_fake, lib=_library)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x @ weight.T + bias on the tree, by the fastest certified schedule for this number of rows.

    x: [..., K], any strides, any number of rows, zero included. weight: [N, K], contiguous.
    bias: [N] or None. All of one dtype on one card. Returns [..., N] of that dtype. A row's bits depend on that row,
    the weight and the bias alone. Raises ValueError for operands that do not fit, CertificationError for a shape that
    was not prepared.
    """
    fits = weight.dim() == 2 and x.dim() >= 1 and x.shape[-1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1]) and weight.is_contiguous()
    alike = {(t.dtype, t.device) for t in (x, weight, bias) if t is not None}
    if not fits or len(alike) > 1:
        said = ", ".join(
            f"{name} {tuple(t.shape)} stride {t.stride()} {t.dtype} on {t.device}"
            for name, t in (("x", x), ("weight", weight), ("bias", bias))
            if t is not None
        )
        raise ValueError(
            f"a linear layer needs x [..., K], a contiguous weight [N, K], bias [N], one dtype and one card; got {said}"
        )
    return torch.ops.vllm_deterministic.linear(x, weight, bias)
