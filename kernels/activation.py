"""SiLU on CPU: a row's bits do not see how many other rows travel with it.

PyTorch computes most elements of a loop with vector instructions and the last ones, which do not fill a vector, with
scalar code that rounds differently. A large loop it deals out to the threads in equal shares: where a share ends within
a row, that row gets scalar elements in its middle. Here every share is made of whole rows.
"""

from __future__ import annotations

import functools

import torch

from vllm_deterministic.errors import CertificationError

__all__ = ["certify", "silu", "whole_rows"]

# PyTorch's at::internal::GRAIN_SIZE: a loop of n elements is shared among ceil(n / GRAIN) threads, as far as there are.
GRAIN = 32768
# Row counts that are certified: all that fit, so many at most.
MOST_COUNTS = 64


def whole_rows(rows: int, width: int, threads: int) -> int:
    """The largest number of `rows` whose equal shares among the threads end between rows. 1 for a row above GRAIN."""
    if width > GRAIN:
        return 1  # a row alone is shared always at the same places
    counts = range(rows, 0, -1)
    return next(count for count in counts if count % max(1, min(threads, -(-count * width // GRAIN))) == 0)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x). x: [rows, width] f32 or bf16, may be a slice of wider rows. Returns [rows, width], contiguous."""
    rows, width = x.shape
    threads = torch.get_num_threads()
    if rows == 0 or whole_rows(rows, width, threads) == rows:  # always so while decoding, where each call counts
        return torch.nn.functional.silu(x)
    out = torch.empty((rows, width), dtype=x.dtype)
    start = 0
    while start < rows:
        stop = start + whole_rows(rows - start, width, threads)
        torch.ops.aten.silu.out(x[start:stop], out=out[start:stop])
        start = stop
    return out


@functools.cache
def certify(width: int, dtype: torch.dtype, threads: int) -> None:
    """Raises CertificationError unless rows of this width have the bits that they have alone, in calls of many sizes.

    The rule above is PyTorch's own affair, so it is checked at start, at the server's number of threads.
    """
    most = threads * -(-GRAIN // width) + threads + 1  # all threads work, and some rows are left over
    x = torch.randn(most, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)[:, :width]
    expected = torch.cat([silu(row) for row in x.split(1)])
    step = -(-most // MOST_COUNTS)
    wrong = [rows for rows in range(most, 0, -step) if not torch.equal(silu(x[-rows:]), expected[-rows:])]
    if wrong:
        raise CertificationError(
            f"SiLU of width {width} in {dtype}: in batches of {sorted(wrong)[:8]} rows, with {threads} threads, a row "
            "has other bits than alone; run with another number of threads (VLLM_CPU_OMP_THREADS_BIND)"
        )
