"""Linear layers on CPU: one reduction tree out of a library that has several, and the schedules that stay on it.

A CPU matrix library (oneDNN) chooses its blocking by the number of rows, and with the blocking the order in which a
row's products are summed. So a row's bits depend on how many rows travel with it. The tree is therefore defined by an
execution that anybody can repeat: **a tile of 32 rows, one thread, zero rows as padding**. A row count is *certified*
where the library gives that tree's bits at any position of a call of that size; a call of any size is then made of
certified calls only, by padding up and by cutting into tiles. Which of them, is a matter of speed alone.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm_deterministic.kernels import certificates
from vllm_deterministic.kernels.certificates import Certificate

from vllm_deterministic.errors import CertificationError

__all__ = [
    "MAX_TILE",
    "REFERENCE_ROWS",
    "Found",
    "Gemm",
    "RowSchedule",
    "certified_row_counts",
    "certify",
    "hard_rows",
    "machine",
    "reference",
    "schedule",
]

logger = logging.getLogger("vllm.deterministic")

REFERENCE_ROWS = 32
# Calls of more rows are no faster per row, and every count up to the tile has to be certified. The head of a large
# vocabulary is certified to 64 rows only: above, checking would take longer than starting the server.
MAX_TILE = 128
MAX_TILE_LARGE = 64
LARGE_WEIGHT = 4_000_000
# What the tree is, for certificates. Whatever changes the reference's bits, or the check's strictness, changes this.
TREE = certificates.digest({"product": "packed library product", "rows": REFERENCE_ROWS, "threads": 1, "data": 2})
# Row counts up to this are timed: there a product waits for the weight, and some more rows make it faster, not slower.
TIMED_ROWS = 8
# While a model is served, a layer's weight comes from memory: the other layers have driven it out of the caches.
BEYOND_CACHE = 64 * 2**20
MOST_COPIES = 256  # a model of so small layers stays in the caches whole

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


@dataclass(frozen=True)
class Found:
    """Row counts on the tree and off it, as inclusive intervals, and the seconds it took to know."""

    certified: list[tuple[int, int]]
    dropped: list[tuple[int, int]]
    seconds: float


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
    # torch's own function: vLLM's CPU worker puts one in place of torch.set_num_threads that does nothing.
    torch._C.set_num_threads(1)
    try:
        RowSchedule((REFERENCE_ROWS,) * REFERENCE_ROWS).run(gemm, x, y)
    finally:
        torch._C.set_num_threads(threads)
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


def schedule(gemms: Sequence[Gemm], x: torch.Tensor, n: int, certified: Sequence[int]) -> RowSchedule:
    """The fastest way, as timed here, to run each number of rows through a certified count.

    gemms: products with different weights of one shape, more of them than the caches hold; x: rows to time with.
    Every candidate gives the same bits, so timing cannot change an answer. Above TIMED_ROWS the next certified count is
    taken.
    """
    counts = sorted(certified)
    seconds = _seconds(gemms, x, n, [count for count in counts if count <= TIMED_ROWS])
    padded = []
    for rows in range(1, counts[-1] + 1):
        nearest = next(count for count in counts if count >= rows)
        best = min((count for count in seconds if count > nearest), key=seconds.__getitem__, default=nearest)
        # 8 %: below that the clock of a shared machine decides, and padding costs a copy.
        faster = nearest in seconds and seconds[best] < 0.92 * seconds[nearest]
        padded.append(best if faster else nearest)
    return RowSchedule(tuple(padded))


def _seconds(
    gemms: Sequence[Gemm], x: torch.Tensor, n: int, counts: Sequence[int], rounds: int = 7
) -> dict[int, float]:
    """Seconds of one product at each row count, each weight read from memory.

    The counts take turns, and the least of the rounds counts: whatever else the machine does can only add to a time.
    """
    y = x.new_empty(x.shape[0], n)
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count, measured in times.items():
            rows, out = x[:count], y[:count]
            start = time.perf_counter()
            for gemm in gemms:
                gemm(rows, out)
            measured.append((time.perf_counter() - start) / len(gemms))
    return {count: min(measured) for count, measured in times.items()}


def machine(libraries: Mapping[str, str]) -> dict[str, str]:
    """What a product's bits may depend on here: processor, threads, library versions, the libraries' own variables."""
    info = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0] if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    processor = {name.strip(): value.strip() for name, value in facts.items()}
    kept = ("model name", "cpu family", "model", "stepping", "microcode", "cache size")
    return {
        **{name: processor.get(name, "") for name in kept},
        "flags": certificates.digest(sorted(processor.get("flags", "").split())),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        **{name: value for name, value in os.environ.items() if name.startswith(("ONEDNN_", "DNNL_"))},
        **libraries,
    }


def certify(
    pack: Callable[[torch.Tensor, torch.Tensor | None], Gemm],
    n: int,
    k: int,
    dtype: torch.dtype,
    has_bias: bool,
    libraries: Mapping[str, str],
) -> tuple[RowSchedule, Found]:
    """The schedule of every layer with a weight of [n, k], from the cached certificate where this machine has one.

    pack: the library's product with a packed weight [n, k] and bias [n]. libraries: versions that the product may
    depend on. Certified on a weight made here: a checkpoint's may be too tame to tell two trees apart. Raises
    CertificationError as `certified_row_counts` does.
    """
    start = time.perf_counter()
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype)
    bias = weight[:, 0].contiguous() if has_bias else None
    copies = min(max(2, BEYOND_CACHE // (weight.nbytes or 1)), MOST_COPIES)
    gemms = [pack(weight, bias) for _ in range(copies)]
    most = max_tile(n, k)
    x = hard_rows(most + 40, k, dtype)
    shape = {"n": n, "k": k, "dtype": str(dtype), "bias": has_bias, "max_rows": most}
    wanted = Certificate("linear", TREE, shape, machine(libraries), {})
    certificate = certificates.load(wanted.key)
    if certificate is None:
        counts = certified_row_counts(gemms[0], x, n, most)
        seconds = round(time.perf_counter() - start, 3)
        found = {"library": certificates.intervals(counts)}
        certificate = dataclasses.replace(wanted, schedules=found, seconds=seconds)
        certificates.store(certificate)
    certified = [c for first, last in certificate.schedules["library"] for c in range(first, last + 1)]
    chosen = schedule(gemms, x, n, certified)
    missing = sorted(set(range(1, most + 1)) - set(certified))
    took = time.perf_counter() - start
    logger.info(
        "linear %d x %d %s: %d of %d row counts are on the tree%s; 1 to %d rows run as %s (%.1f s, %d threads)",
        n, k, dtype, len(certified), most, f" (not {missing[:8]})" if missing else "", TIMED_ROWS,
        list(chosen.padded[:TIMED_ROWS]), took, torch.get_num_threads(),
    )  # fmt: skip
    return chosen, Found(certificates.intervals(certified), certificates.intervals(missing), took)
