"""Linear layers on CPU: one reduction tree out of a library that has several, and the schedules that stay on it.

A CPU matrix library (oneDNN) chooses its blocking by the number of rows, and with the blocking the order in which a
row's products are summed. So a row's bits depend on how many rows travel with it. The tree is therefore defined by an
execution that anybody can repeat: **a tile of 32 rows, one thread, zero rows as padding**. A row count is *certified*
where the library gives that tree's bits at any position of a call of that size; a call of any size is then made of
certified calls only, by padding up and by cutting into tiles. Which of them, is a matter of speed alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_deterministic.errors import CertificationError

__all__ = [
    "MAX_TILE",
    "REFERENCE_ROWS",
    "Gemm",
    "RowSchedule",
    "certified_row_counts",
    "hard_rows",
    "reference",
    "schedule",
]

REFERENCE_ROWS = 32
# Calls of more rows are no faster per row, and every count up to the tile has to be certified. The head of a large
# vocabulary is certified to 64 rows only: above, checking would take longer than starting the server.
MAX_TILE = 128
MAX_TILE_LARGE = 64
LARGE_WEIGHT = 4_000_000

# (x [rows, K], y [rows, N]): writes the product into y. The library call under certification, its weight inside.
Gemm = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class RowSchedule:
    """How many rows the library is called with, for each number of real rows.

    padded: padded[m - 1] is the certified row count that m real rows are run with, for m = 1 ... tile.
    tile: the largest certified count; more rows are cut into tiles of this many.
    """

    padded: tuple[int, ...]

    @property
    def tile(self) -> int:
        return len(self.padded)

    def run(self, gemm: Gemm, x: torch.Tensor, y: torch.Tensor) -> None:
        """Writes the product of any number of rows, on the tree. x: [rows, K], y: [rows, N], both contiguous."""
        rows = x.shape[0]
        if rows > self.tile:
            for start in range(0, rows, self.tile):
                self.run(gemm, x[start : start + self.tile], y[start : start + self.tile])
            return
        padded = self.padded[rows - 1] if rows else 0
        if padded == rows:
            gemm(x, y)
            return
        wide = x.new_zeros(padded, x.shape[1])
        wide[:rows] = x
        out = y.new_empty(padded, y.shape[1])
        gemm(wide, out)
        y.copy_(out[:rows])


def hard_rows(rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """[rows, k] data on which a different order of summation shows in the rounded result.

    Cycles through: normal, heavy-tailed, cancelling pairs, wide exponents, small integers (exact in every order: these
    must agree even between trees), subnormals, and one row with NaN and infinities, which must stay in its row.
    """
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    tail = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    exponents = torch.randint(-40, 40, (rows, k), generator=generator).double()
    kind = torch.arange(rows) % 6
    data = base.clone()
    data[kind == 1] *= (3 * tail[kind == 1]).exp()
    cancelling = base[kind == 2]
    half = cancelling[:, : k // 2]
    cancelling[:, k // 2 : 2 * (k // 2)] = -half * (1 + 2**-7)
    data[kind == 2] = cancelling * 100
    data[kind == 3] *= torch.exp2(exponents[kind == 3])
    data[kind == 4] = (base[kind == 4] * 4).round().clamp(-8, 8)
    data[kind == 5] *= 2.0**-126
    if rows > 16:
        data[13, : min(3, k)] = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=torch.float64)[
            : min(3, k)
        ]
    return data.to(dtype)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """torch.equal, with NaN equal to NaN: a NaN's payload is not part of an answer."""
    return torch.equal(left.nan_to_num(), right.nan_to_num()) and torch.equal(left.isnan(), right.isnan())


def reference(gemm: Gemm, x: torch.Tensor, n: int) -> torch.Tensor:
    """The tree's bits, [rows, n], for x: tiles of 32 rows, the last one zero-padded, on one thread."""
    y = x.new_empty(x.shape[0], n)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        RowSchedule((REFERENCE_ROWS,) * REFERENCE_ROWS).run(gemm, x, y)
    finally:
        torch.set_num_threads(threads)
    return y


def max_tile(n: int, k: int) -> int:
    """The largest row count to certify for a weight of [n, k]."""
    return MAX_TILE if n * k <= LARGE_WEIGHT else MAX_TILE_LARGE


def certified_row_counts(gemm: Gemm, x: torch.Tensor, n: int, max_rows: int) -> tuple[int, ...]:
    """The row counts up to `max_rows` at which `gemm` gives the tree's bits.

    x: hard data, more than `max_rows` rows; n: width of the product. Rounding hides most of a wrong order, so small
    counts walk over all of x and large ones over two windows that start at different places: each row meets several
    positions and neighbours.
    Raises CertificationError when not even the reference's own tile is stable under this process's number of threads.
    """
    expected = reference(gemm, x, n)
    last = x.shape[0]
    out = torch.empty_like(expected)

    def on_the_tree(start: int, stop: int) -> bool:
        gemm(x[start:stop], out[start:stop])
        return _same_bits(out[start:stop], expected[start:stop])

    certified = []
    for rows in range(1, max_rows + 1):
        starts = range(0, last - rows + 1, rows) if rows <= 8 else (0, (37 * rows) % (last - rows + 1))
        if all(on_the_tree(start, start + rows) for start in starts):
            certified.append(rows)
    if REFERENCE_ROWS not in certified:
        raise CertificationError(
            f"linear layer [rows, {x.shape[1]}] x [{x.shape[1]}, {n}] {x.dtype}: the library's "
            f"{REFERENCE_ROWS}-row product changes its bits between 1 and {torch.get_num_threads()} threads or between "
            "positions; run with fewer threads (VLLM_CPU_OMP_THREADS_BIND)"
        )
    return tuple(certified)


def schedule(gemm: Gemm, x: torch.Tensor, n: int, certified: Sequence[int]) -> RowSchedule:
    """The fastest way, as timed here, to run each number of rows through a certified count.

    Every candidate gives the same bits, so timing cannot change an answer. Only counts up to 16 are timed: there a call
    reads the weight and a few rows more are nearly free; above, the next certified count is the fastest.
    """
    counts = sorted(certified)
    seconds = {count: _seconds(gemm, x[:count], n) for count in counts if count <= 16}
    padded = []
    for rows in range(1, counts[-1] + 1):
        nearest = next(count for count in counts if count >= rows)
        rivals = [count for count in seconds if count > nearest]
        best = min(rivals, key=seconds.__getitem__, default=nearest)
        # 10 %: below that the clock of a shared machine decides, and padding costs a copy.
        faster = nearest in seconds and rivals and seconds[best] < 0.9 * seconds[nearest]
        padded.append(best if faster else nearest)
    return RowSchedule(tuple(padded))


def _seconds(gemm: Gemm, x: torch.Tensor, n: int, repeats: int = 5) -> float:
    y = x.new_empty(x.shape[0], n)
    gemm(x, y)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        gemm(x, y)
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]
