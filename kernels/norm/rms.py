"""RMSNorm, with and without a residual to add first. Every row is reduced by the same compiled program.

Order of a row's sum of squares, in f32: a tile of ROWS x PADDED with a layout of lanes that the row's size and dtype
fix (below), and the tree over lanes and warps that Triton gives this tile. Nothing of it depends on how many rows there
are: their number is not specialised on, the last tile is masked, and a row's place in its tile changes neither its
lanes nor their order. For Triton to choose one layout, pointers and strides must be multiples of 16 bytes; others are
refused.

Rounding points are vLLM's native definition's: the residual sum is normalised unrounded and stored rounded; the
normalised row is rounded to the weight's dtype, multiplied, and rounded to the row's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from vllm_deterministic.kernels.compiled import Compiled, aligned

__all__ = ["LARGEST", "fused_add_rms_norm", "rms_norm", "tile"]

LARGEST = 16384  # elements of a row
_ALIGNED = 16  # bytes


def tile(size: int) -> tuple[int, int, int]:
    """(rows, padded size, warps) of a program, by its size alone. A part of the tree: changing it changes bits."""
    padded = triton.next_power_of_2(size)
    if padded <= 512:  # heads: several to a program
        return 2048 // padded, padded, 4
    return 1, padded, min(16, max(4, padded // 512))


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    X, RESIDUAL, WEIGHT, OUT, SUM, rows, x_outer, x_inner, r_outer, r_inner, epsilon, divisor,
    INNER: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows. Row r stands at outer r // INNER, inner r % INNER; OUT and SUM are contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    mask = (row < rows)[:, None] & (column < SIZE)[None, :]
    here = row[:, None] * SIZE + column[None, :]
    if WEIGHT is not None:
        # A copy for each row, so that no lanes have to exchange it; and kept ahead of the row by a barrier, or else the
        # assembler would move it below the sum, to be waited for once more.
        weight = tl.load(WEIGHT + tl.zeros_like(here) + column[None, :], mask=mask, other=0.0)
        tl.debug_barrier()
    x = tl.load(X + (row // INNER * x_outer + row % INNER * x_inner)[:, None] + column[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if RESIDUAL is not None:
        where = (row // INNER * r_outer + row % INNER * r_inner)[:, None] + column[None, :]
        x += tl.load(RESIDUAL + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(SUM + here, x.to(SUM.dtype.element_ty), mask=mask)
    mean = tl.sum(x * x, axis=1) / divisor
    x *= tl.rsqrt(mean + epsilon)[:, None]
    if WEIGHT is not None:
        x = x.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
        x = x.to(weight.dtype)
    tl.store(OUT + here, x.to(OUT.dtype.element_ty), mask=mask)


_compiled = Compiled(_rms_norm)


def _strides(x: torch.Tensor) -> tuple[int, int]:
    """(outer, inner) of x [..., size]: any view of two or three dimensions; more if contiguous."""
    if x.dim() > 3 or x.dim() == 1:
        x = x.view(-1, x.shape[-1])
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


class _Layout:
    """What a norm's launch needs to know of its operands besides the number of rows.

    Raises ValueError for shapes and strides that are not covered.
    """

    def __init__(self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None) -> None:
        self.size, unit = x.shape[-1], _ALIGNED // x.element_size()
        self.inner = x.shape[1] if x.dim() == 3 else 1
        strides = (*_strides(x), *((0, 0) if residual is None else _strides(residual)))
        operands = [t for t in (x, residual, weight) if t is not None]
        adjacent = all(t.stride(-1) == 1 for t in operands)
        if self.size > LARGEST or not adjacent or any(stride % unit for stride in (self.size, *strides)):
            said = [(tuple(t.shape), t.stride()) for t in operands]
            raise ValueError(f"a norm of these shapes and strides is not covered: {said}")
        self.tile = tile(self.size)[0]
        self.strides = strides

    def constants(self) -> dict[str, Any]:
        each, padded, warps = tile(self.size)
        shape = {"INNER": self.inner, "SIZE": self.size, "ROWS": each, "PADDED": padded}
        return {**shape, "num_warps": warps, "enable_fp_fusion": False}


# Outside of CUDA graphs each norm of each step comes here: what was covered once is looked up.
_layouts: dict[tuple[Any, ...], _Layout] = {}


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(out)
    others = [t if t is None else (t.dtype, t.stride()) for t in (residual, weight)]
    key = (x.get_device(), x.dtype, x.shape[1:], x.stride(), *others)
    layout = _layouts.get(key)
    if layout is None:
        layout = _layouts[key] = _Layout(x, residual, weight)
    rows = x.numel() // layout.size
    if not rows:
        return out, total
    if not aligned(x, residual, weight):
        raise ValueError(f"a norm of operands that do not start at multiples of {_ALIGNED} bytes is not covered")
    _compiled.launch(
        layout, (-(-rows // layout.tile), 1, 1),
        x, residual, weight, out, total, rows, *layout.strides, epsilon, float(layout.size), constants=layout.constants,
    )  # fmt: skip
    return out, total


def _norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    return _launch(x, None, weight, epsilon)[0]


def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, total = _launch(x, residual, weight, epsilon)
    assert total is not None
    return out, total


# Defined on the library itself, as the linear operator is: the checks of torch.library.custom_op cost too much.
_library = torch.library.Library("vllm_deterministic", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor? weight, float epsilon) -> Tensor")
_library.define("fused_add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float epsilon) -> (Tensor, Tensor)")
_library.impl("rms_norm", _norm, "CUDA")
_library.impl("fused_add_rms_norm", _add_norm, "CUDA")


@torch.library.register_fake("vllm_deterministic::rms_norm", lib=_library)
def _norm_fake(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("vllm_deterministic::fused_add_rms_norm", lib=_library)
def _add_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, [..., size] of x's dtype, contiguous.

    x: [..., size] f32, bf16 or fp16, a row contiguous, at most two dimensions before it unless contiguous.
    weight: [size] f32, bf16 or fp16, or None for ones. On one card. A row's bits depend on that row, weight and epsilon
    alone. Raises ValueError for rows over 16384 elements and for pointers or strides that are no multiples of 16 bytes.
    """
    return torch.ops.vllm_deterministic.rms_norm(x, weight, epsilon)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm of x + residual, that sum), the sum rounded to x's dtype. Operands and errors as for rms_norm."""
    return torch.ops.vllm_deterministic.fused_add_rms_norm(x, residual, weight, epsilon)
