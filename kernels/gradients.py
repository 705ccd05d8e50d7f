"""Gradients on a card: of norms and SiLU row by row, of what rows share one after the other.

A sequence's rows are taken in tiles of 64 from its own first row, a tile's missing rows being zeros, and one sequence
after the other. The gradient so far is where a sum begins, and it is f32: a sum that is interrupted between two
sequences and goes on later has the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .norm.rms import tile

__all__ = ["add_embeddings", "add_product", "add_rows", "norm_gradient", "silu_and_mul_gradient"]

_ROWS = 64  # of a sequence in one step of the chain; a part of the order
_END = tl.constexpr(1 << 30)  # where `_described` has every span end


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


@functools.lru_cache(64)
def _tiles(spans: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """[tiles, 2] i32: each tile's first row, and the end of its span."""
    found = [(row, stop) for start, stop in spans for row in range(start, stop, _ROWS)]
    return torch.tensor(found, dtype=torch.int32).to(device)


def _tiles_of(spans: Sequence[slice], device: torch.device) -> torch.Tensor:
    return _tiles(tuple((rows.start, rows.stop) for rows in spans), device)


@triton.jit
def _load(OPERAND, row, stop, column):
    """A tile of `_described`'s: rows from `row` on, zeros from `stop` on."""
    tile = OPERAND.load([_END, stop, row - stop + _END, column])
    return tl.reshape(tile, tile.shape[2:])


@triton.jit(do_not_specialize=["tiles"])
def _add_product(
    DY, X, SUM, TILES, tiles, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Grid: blocks of the weight; neighbours share rows of dy or x. Each element: one chain over the tiles."""
    across, down = tl.cdiv(k, BLOCK_K), tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (GROUP * across)
    high = tl.minimum(down - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    start_n = (group * GROUP + within % high) * BLOCK_N
    start_k = within // high * BLOCK_K
    rn, rk = start_n + tl.arange(0, BLOCK_N), start_k + tl.arange(0, BLOCK_K)
    here = rn[:, None].to(tl.int64) * k + rk[None, :]
    inside = (rn < n)[:, None] & (rk < k)[None, :]
    total = tl.load(SUM + here, mask=inside, other=0.0)
    for i in range(tiles):  # ascending
        row, stop = tl.load(TILES + 2 * i), tl.load(TILES + 2 * i + 1)
        dy, x = _load(DY, row, stop, start_n), _load(X, row, stop, start_k)
        total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
    tl.store(SUM + here, total, mask=inside)


def _described(x: torch.Tensor, columns: int) -> TensorDescriptor:
    """For TMA: boxes of _ROWS rows and so many columns, of which rows from any chosen one on are zeros.

    TMA fills a box with zeros beyond the end of a dimension, and that end is fixed. So the rows lie in two dimensions:
    row r of a span that ends at s is (s, _END - (s - r)), beyond the second one's end from r = s on. A third takes the
    _END rows off again, for addresses wrap around at 2**64.
    """
    if missing := -x.shape[1] % (16 // x.element_size()):  # rows start at multiples of 16 bytes
        x = torch.nn.functional.pad(x, (0, missing))
    x = x.contiguous()
    most, stride = 0x7FFF0000, x.stride(0)
    shape, strides = [most, most, _END.value, x.shape[1]], [2**34 - stride, stride, stride, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, _ROWS, columns])


def add_product(total: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, spans: Sequence[slice]) -> None:
    """total += dy.T @ x over the rows of the spans, in their order. total: [N, K] f32, contiguous; dy: [rows, N] and
    x: [rows, K], of one dtype, f32, bf16 or fp16. All on one card."""
    tiles = _tiles_of(spans, x.device)
    n, k = total.shape
    high, wide = (128, 256) if x.element_size() == 2 else (64, 64)
    grid = (triton.cdiv(n, high) * triton.cdiv(k, wide),)
    # The tiles' places go through the pipeline as well: of 7 stages the operands get 4.
    _add_product[grid](
        _described(dy, high), _described(x, wide), total, tiles, len(tiles), n, k, high, wide, 8, num_warps=8,
        num_stages=7,
    )  # fmt: skip


# The order of a tile's rows comes from the layout, which must not follow from an address.
@triton.jit(do_not_specialize=["size", "each"], do_not_specialize_on_alignment=["TERMS"])
def _sum_tiles(TERMS, PARTS, TILES, size, each, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (tiles, blocks of columns). The `each` terms of a row one after the other, then a tree over the rows."""
    row = tl.load(TILES + 2 * tl.program_id(0)) + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < tl.load(TILES + 2 * tl.program_id(0) + 1))[:, None] & (column < size)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(each):
        here = (row.to(tl.int64) * each + i)[:, None] * size + column[None, :]
        total += tl.load(TERMS + here, mask=mask, other=0.0).to(tl.float32)
    tl.store(PARTS + tl.program_id(0) * size + column, tl.sum(total, axis=0), mask=column < size)


@triton.jit(do_not_specialize=["tiles", "size"])
def _add_parts(SUM, PARTS, tiles, size, BLOCK: tl.constexpr):
    """Grid: blocks of columns. One tile after the other."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    total = tl.load(SUM + column, mask=mask, other=0.0).to(tl.float32)
    for i in tl.range(0, tiles, loop_unroll_factor=8):  # so that loads wait together; ascending all the same
        total += tl.load(PARTS + i * size + column, mask=mask, other=0.0)
    tl.store(SUM + column, total.to(SUM.dtype.element_ty), mask=mask)


def add_rows(total: torch.Tensor, terms: torch.Tensor, spans: Sequence[slice]) -> None:
    """total += the sum of the spans' rows, span after span, computed in f32. total: [size], contiguous; terms: [rows,
    size] or [rows, heads, size]. All on one card."""
    terms, size = terms.contiguous(), len(total)
    tiles = _tiles_of(spans, terms.device)
    parts = torch.empty(len(tiles), size, dtype=torch.float32, device=terms.device)
    block = 64
    blocks = triton.cdiv(size, block)
    each = terms[0].numel() // size
    _sum_tiles[(len(tiles), blocks)](terms, parts, tiles, size, each, _ROWS, block, num_warps=4)
    _add_parts[(blocks,)](total, parts, len(tiles), size, block, num_warps=2)


@triton.jit(do_not_specialize=["rows"])
def _add_embeddings(SUM, DY, TOKENS, ORDER, rows, size, BLOCK: tl.constexpr):
    """Grid: (places among the sorted tokens, blocks of columns). The first place of a token adds all its rows."""
    place = tl.program_id(0)
    token = tl.load(TOKENS + place)
    if tl.load(TOKENS + place - 1, mask=place > 0, other=-1) == token:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    here = SUM + token * size + column
    total = tl.load(here, mask=mask, other=0.0).to(tl.float32)
    more = True
    while more:
        total += tl.load(DY + tl.load(ORDER + place) * size + column, mask=mask, other=0.0).to(tl.float32)
        place += 1
        more = tl.load(TOKENS + place, mask=place < rows, other=-1) == token
    tl.store(here, total.to(SUM.dtype.element_ty), mask=mask)


def add_embeddings(total: torch.Tensor, dy: torch.Tensor, ids: torch.Tensor) -> None:
    """total[ids[r]] += dy[r], each token's rows ascending, computed in f32. total: [vocabulary, size], contiguous;
    dy: [rows, size]; ids: [rows] i64. All on one card."""
    tokens, order = ids.sort(stable=True)
    size = total.shape[1]
    grid = (len(ids), triton.cdiv(size, 1024))
    _add_embeddings[grid](total, dy.contiguous(), tokens, order, len(ids), size, 1024, num_warps=4)
