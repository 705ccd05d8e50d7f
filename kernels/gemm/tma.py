"""Middle and many rows: persistent programs walk the output's tiles, operands brought by the tensor memory accelerator.

The accelerator fills rows and columns beyond the operands with zeros and leaves results beyond y unwritten, so a tile
at the edge runs the instructions of a whole tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_deterministic.kernels.gemm.tree import Problem

__all__ = ["Tma"]


@triton.jit(do_not_specialize=["m"])
def _tma_kernel(
    x_desc, w_desc, y_desc, bias, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr, SWAP: tl.constexpr, HALVES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        # Groups of GROUP_M row tiles share a column of weights while it is in the L2 cache.
        group = tile // (GROUP_M * tiles_n)
        first_m = group * GROUP_M
        size_m = min(tiles_m - first_m, GROUP_M)
        start_m = (first_m + (tile % (GROUP_M * tiles_n)) % size_m) * BLOCK_M
        start_n = (tile % (GROUP_M * tiles_n)) // size_m * BLOCK_N
        acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, tl.cdiv(k, BLOCK_K)):  # k ascending, one accumulator
            a = x_desc.load([start_m, step * BLOCK_K])
            b = w_desc.load([start_n, step * BLOCK_K])
            acc = tl.dot(b, a.T, acc, input_precision="ieee") if SWAP else tl.dot(a, b.T, acc, input_precision="ieee")
        if SWAP:
            acc = acc.T
        if HAS_BIAS:
            rn = start_n + tl.arange(0, BLOCK_N)
            acc += tl.load(bias + rn, mask=rn < n, other=0.0).to(tl.float32)[None, :]
        if HALVES:  # the tile leaves in two halves, each needing half the shared memory
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            y_desc.store([start_m, start_n], left.to(y_desc.dtype))
            y_desc.store([start_m, start_n + BLOCK_N // 2], right.to(y_desc.dtype))
        else:
            y_desc.store([start_m, start_n], acc.to(y_desc.dtype))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@dataclass(frozen=True)
class Tma:
    """Tiles of block_m x block_n, group_m row tiles of one weight column in a row; swap as in `Pointer`."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    swap: bool
    halves: bool
    num_warps: int
    num_stages: int

    family = "tma"
    one_kernel = True

    def refusal(self, problem: Problem) -> str | None:
        """Why this schedule cannot run the problem; None where it can."""
        size = problem.dtype.itemsize
        for name, elements in (("K", problem.k), ("N", problem.n)):
            if elements * size % 16:
                return f"{name} = {elements}: a row must be a multiple of 16 bytes for the tensor memory accelerator"
        return None

    def rows(self, m: int) -> int:
        """The row count whose instructions are executed for m rows: whole tiles, empty rows being zeros."""
        return triton.cdiv(m, self.block_m) * self.block_m

    def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        """Writes the product into y, as `Pointer.run`; x's rows must start at multiples of 16 bytes."""
        m, k = x.shape
        n = weight.shape[0]
        x_desc = TensorDescriptor.from_tensor(x, [self.block_m, self.block_k])
        w_desc = TensorDescriptor.from_tensor(weight, [self.block_n, self.block_k])
        y_desc = TensorDescriptor.from_tensor(y, [self.block_m, self.block_n // (2 if self.halves else 1)])
        tiles = triton.cdiv(m, self.block_m) * triton.cdiv(n, self.block_n)
        programs = _multiprocessors(x.device)
        _tma_kernel[(min(programs, tiles),)](
            x_desc, w_desc, y_desc, weight if bias is None else bias, m, n, k,
            self.block_m, self.block_n, self.block_k, self.group_m, programs, self.swap, self.halves, bias is not None,
            num_warps=self.num_warps, num_stages=self.num_stages,
        )  # fmt: skip
