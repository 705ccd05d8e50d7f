"""What the server computes token by token between its matrix products: norms, rotation, activation.

Forward, they are the server's own functions. Backward, each row's gradient is computed from that row alone, in f32, and
rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm import _custom_ops as ops

from vllm_deterministic.train.device import Device
from vllm_deterministic.train.gradients import fold
from vllm_deterministic.train.sequences import Packed

__all__ = ["RMSNorm", "rotate", "silu_and_mul"]


class RMSNorm:
    """vLLM's RMSNorm with the weight of one of the model's norms. dtype: the server's."""

    def __init__(self, norm: Any, eps: float, device: Device, dtype: torch.dtype) -> None:
        self.norm, self.eps, self.device, self.dtype = norm, eps, device, dtype

    def __call__(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        """x: [rows, H] or [rows, heads, H], normalised over the last dimension."""
        return _Norm.apply(x, None, self, packed, self.norm.weight)[0]

    def after_adding(
        self, x: torch.Tensor, residual: torch.Tensor, packed: Packed
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, taken before the sum is rounded, and the rounded sum."""
        return _Norm.apply(x, residual, self, packed, self.norm.weight)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm, packed: Packed, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = weight.detach().to(norm.dtype)
        ctx.norm, ctx.packed, ctx.adding = norm, packed, residual is not None
        ctx.save_for_backward(x, scale, *([residual] if residual is not None else []))
        y, total = norm.device.norm(x, residual, scale, norm.eps)
        if total is None:
            total = x.new_empty(0)
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dtotal: torch.Tensor) -> Any:
        x, scale, *added = ctx.saved_tensors
        residual, dsum = (added[0], dtotal) if ctx.adding else (None, None)
        dx, terms = ctx.norm.device.norm_gradient(dy, dsum, x, residual, scale, ctx.norm.eps)
        if not ctx.needs_input_grad[4]:
            return dx, dx if ctx.adding else None, None, None, None

        def add(sums: Sequence[torch.Tensor], spans: Sequence[slice]) -> None:
            ctx.norm.device.add_rows(sums[0], terms, spans)

        (dweight,) = fold(ctx.norm, [[ctx.norm.norm.weight]], ctx.packed, add)
        return dx, dx if ctx.adding else None, None, None, dweight


def rotate(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of q and k, [rows, heads * head]; cos_sin: vLLM's table; head: size of one."""
    return _Rotate.apply(q, k, positions, cos_sin, head)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, head: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(positions, cos_sin)
        ctx.head = head
        return _rotated(q, k, positions, cos_sin, head)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        positions, cos_sin = ctx.saved_tensors
        cos, sin = cos_sin.chunk(2, dim=-1)
        back = torch.cat((cos, -sin), dim=-1)  # a rotation's transpose turns the other way
        return *_rotated(dq, dk, positions, back, ctx.head), None, None, None


def _rotated(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (part.clone(memory_format=torch.contiguous_format) for part in (q, k))
    ops.rotary_embedding(positions, q, k, head, cos_sin, True)
    return q, k


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor, device: Device) -> torch.Tensor:
    """silu(gate) * up, [rows, d]."""
    return _SiluAndMul.apply(gate, up, device)


class _SiluAndMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, device: Device) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.device = device
        return device.silu_and_mul(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return *ctx.device.silu_and_mul_gradient(dy, *ctx.saved_tensors), None
