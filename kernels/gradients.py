"""Gradients on a card: of norms and SiLU row by row, of a weight row after row.

A weight's gradient is one chain for each of its elements: the rows of a sequence in tiles of 64 from its own first row,
one sequence after the other, into one f32 accumulator that begins with the gradient so far. A tile's missing rows are
zeros and change nothing. So a sum that is interrupted between two sequences and goes on later has the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .norm.rms import tile

__all__ = ["add_product", "norm_gradient", "silu_and_mul_gradient"]

_ROWS = 64  # of a sequence in one step of the chain; a part of the order


@triton.jit(do_not_specialize=["rows"])
def _norm_gradient(
    DY, DTOTAL, X, RESIDUAL, WEIGHT, DX, TERMS, rows, epsilon, divisor,
    SIZE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows; all contiguous. Layouts and order of a row's sums as in norm/rms.py."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    mask = (row < rows)[:, None] & (column < SIZE)[None, :]
    here = row[:, None] * SIZE + column[None, :]
    x = tl.load(X + here, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        x += tl.load(RESIDUAL + here, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(DY + here, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + column, mask=column < SIZE, other=0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / divisor + epsilon)[:, None]
    normed = x * scale
    scaled = dy * weight.to(tl.float32)[None, :]
    dx = (scaled - normed * (tl.sum(scaled * normed, axis=1) / divisor)[:, None]) * scale
    if DTOTAL is not None:
        dx += tl.load(DTOTAL + here, mask=mask, other=0.0).to(tl.float32)
    tl.store(DX + here, dx.to(DX.dtype.element_ty), mask=mask)
    tl.store(TERMS + here, dy * normed.to(weight.dtype).to(tl.float32), mask=mask)


def norm_gradient(
    dy: torch.Tensor, dtotal: torch.Tensor | None, x: torch.Tensor, residual: torch.Tensor | None,
    weight: torch.Tensor, epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(the gradient of x + residual plus dtotal, of x's dtype; the terms of the weight's, f32), of x's shape.

    dy: gradient of norm/rms.py's result, dtotal: of its sum. All [..., size], weight [size], on one card.
    """
    size = x.shape[-1]
    operands = [None if t is None else t.contiguous() for t in (dy, dtotal, x, residual, weight)]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    terms = torch.empty_like(dx, dtype=torch.float32)
    rows = dx.numel() // size
    each, padded, warps = tile(size)
    _norm_gradient[(triton.cdiv(rows, each),)](
        *operands, dx, terms, rows, epsilon, float(size), size, each, padded, num_warps=warps
    )
    return dx, terms


@triton.jit(do_not_specialize=["elements"])
def _silu_and_mul_gradient(DY, GATE, UP, DGATE, DUP, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    gate = tl.load(GATE + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(UP + at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    tl.store(DGATE + at, dgate.to(DGATE.dtype.element_ty), mask=mask)
    tl.store(DUP + at, (dy * (gate * sigmoid)).to(DUP.dtype.element_ty), mask=mask)


def silu_and_mul_gradient(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, where dy is that of silu(gate) * up. All of one shape and dtype, on one card."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(gate.numel(), 2048),)
    _silu_and_mul_gradient[grid](dy, gate, up, dgate, dup, gate.numel(), 2048, num_warps=8)
    return dgate, dup


@triton.jit(do_not_specialize=["tiles"])
def _add_product(
    DY, X, SUM, TILES, tiles, n, k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of the weight; neighbours share rows of dy or x."""
    across, down = tl.cdiv(k, BLOCK_K), tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (GROUP * across)
    high = tl.minimum(down - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    rn = (group * GROUP + within % high) * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = within // high * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    here = rn[:, None].to(tl.int64) * k + rk[None, :]
    inside = (rn < n)[:, None] & (rk < k)[None, :]
    total = tl.load(SUM + here, mask=inside, other=0.0)
    for i in range(tiles):  # ascending
        first = tl.load(TILES + 2 * i).to(tl.int64)
        real = row < tl.load(TILES + 2 * i + 1)
        dy = tl.load(DY + (first + row)[:, None] * n + rn[None, :], mask=real[:, None] & (rn < n)[None, :], other=0.0)
        x = tl.load(X + (first + row)[:, None] * k + rk[None, :], mask=real[:, None] & (rk < k)[None, :], other=0.0)
        total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
    tl.store(SUM + here, total, mask=inside)


@functools.lru_cache(64)
def _tiles(spans: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """[tiles, 2] i32: first row of each tile, and how many there are."""
    found = [(row, min(_ROWS, stop - row)) for start, stop in spans for row in range(start, stop, _ROWS)]
    return torch.tensor(found, dtype=torch.int32).to(device)


def add_product(total: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, spans: Sequence[slice]) -> None:
    """total += dy.T @ x over the rows of the spans, in their order. total: [N, K] f32, contiguous; dy: [rows, N] and
    x: [rows, K], of one dtype, f32, bf16 or fp16. All on one card."""
    dy, x = dy.contiguous(), x.contiguous()
    tiles = _tiles(tuple((rows.start, rows.stop) for rows in spans), x.device)
    n, k = total.shape
    high, wide = (128, 256) if x.element_size() == 2 else (64, 64)
    grid = (triton.cdiv(n, high) * triton.cdiv(k, wide),)
    _add_product[grid](dy, x, total, tiles, len(tiles), n, k, high, wide, _ROWS, 8, num_warps=8, num_stages=3)
