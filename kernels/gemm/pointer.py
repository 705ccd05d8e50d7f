"""Few rows: weights streamed past the rows through ordinary loads, each program a strip of the weight.

With few rows the time is that of reading the weight once. What matters is that enough bytes are under way: `block_k`
times `num_stages` decides that, and `rows_n` how evenly the strips cover the card's multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from vllm_deterministic.kernels.gemm.tree import Problem

__all__ = ["Pointer"]


# m is a plain number in the compiled code: one binary runs every number of rows.
@triton.jit(do_not_specialize=["m"])
def _pointer_kernel(
    x, w, bias, y, m, n, k, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS_N: tl.constexpr,
    SWAP: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.program_id(0) * ROWS_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    mask_m = rm < m
    mask_n = (tl.arange(0, BLOCK_N) < ROWS_N) & (rn < n)
    xp = x + rm[:, None].to(tl.int64) * stride_xm + rk[None, :]
    wp = w + rn[:, None].to(tl.int64) * k + rk[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):  # k ascending, one accumulator; masked products are +0 and change nothing
        if EVEN_K:
            a = tl.load(xp, mask=mask_m[:, None], other=0.0)
            b = tl.load(wp, mask=mask_n[:, None], other=0.0, eviction_policy="evict_first")
        else:
            mask_k = rk[None, :] < k - start
            a = tl.load(xp, mask=mask_m[:, None] & mask_k, other=0.0)
            b = tl.load(wp, mask=mask_n[:, None] & mask_k, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(b, a.T, acc, input_precision="ieee") if SWAP else tl.dot(a, b.T, acc, input_precision="ieee")
        xp += BLOCK_K
        wp += BLOCK_K
    if SWAP:
        acc = acc.T
    if HAS_BIAS:
        acc += tl.load(bias + rn, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    yp = y + rm[:, None].to(tl.int64) * n + rn[None, :]
    tl.store(yp, acc.to(y.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@dataclass(frozen=True)
class Pointer:
    """One program takes block_m rows of x and rows_n rows of the weight, in a tile of block_m x block_n.

    rows_n < block_n: the tile's other rows stay empty, so that a weight of few rows still reaches every multiprocessor.
    swap: the weight's rows stand where the instruction is wide (64 for wgmma), the few rows of x where it is narrow.
    """

    block_m: int
    block_n: int
    block_k: int
    rows_n: int
    swap: bool
    num_warps: int
    num_stages: int

    family = "pointer"
    one_kernel = True

    def refusal(self, problem: Problem) -> str | None:
        """Why this schedule cannot run the problem; None where it can."""
        return None

    def rows(self, m: int) -> int:
        """The row count whose instructions are executed for m rows: whole tiles, empty rows being zeros."""
        return triton.cdiv(m, self.block_m) * self.block_m

    def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        """Writes the product into y. x: [M, K], rows of any stride; weight [N, K], y [M, N], bias [N]: contiguous."""
        m, k = x.shape
        n = weight.shape[0]
        _pointer_kernel[(triton.cdiv(n, self.rows_n), triton.cdiv(m, self.block_m))](
            x, weight, weight if bias is None else bias, y, m, n, k, x.stride(0),
            self.block_m, self.block_n, self.block_k, self.rows_n, self.swap, k % self.block_k == 0, bias is not None,
            num_warps=self.num_warps, num_stages=self.num_stages,
        )  # fmt: skip
