"""What the server computes token by token between its matrix products: norms, rotation, activation.

Forward, they are the server's own functions. Backward, each row's gradient is computed from that row alone, in f32, and
rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import ir

from vllm_deterministic.kernels import activation
from vllm_deterministic.train.gradients import fold
from vllm_deterministic.train.sequences import Packed

__all__ = ["RMSNorm", "rotate", "silu_and_mul"]


class RMSNorm:
    """vLLM's RMSNorm with the weight of one of the model's norms. dtype: the server's."""

    def __init__(self, norm: Any, eps: float, dtype: torch.dtype) -> None:
        self.norm, self.eps, self.dtype = norm, eps, dtype

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
        if residual is None:
            y = ir.ops.rms_norm.impls["native"].impl_fn(x, scale, norm.eps)
            total = x.new_empty(0)
            ctx.mark_non_differentiable(total)
            return y, total
        return ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, scale, norm.eps)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dtotal: torch.Tensor) -> Any:
        x, scale, *residual = ctx.saved_tensors
        total = x.float() + residual[0].float() if ctx.adding else x.float()
        # As the forward rounds: 1/rms of the unrounded sum, over the last dimension, in torch's order for a row.
        rstd = torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + ctx.norm.eps)
        normed = total * rstd
        dy = dy.float()
        scaled = dy * scale.float()
        dx = (scaled - normed * (scaled * normed).mean(dim=-1, keepdim=True)) * rstd
        if ctx.adding:
            dx = dx + dtotal.float()
        dx = dx.to(x.dtype)
        if not ctx.needs_input_grad[4]:
            return dx, dx if ctx.adding else None, None, None, None
        terms = (
            (dy * normed.to(scale.dtype).float()).flatten(1, -2) if dy.ndim > 2 else dy * normed.to(scale.dtype).float()
        )

        def add(sums: Sequence[torch.Tensor], rows: slice) -> None:
            sums[0].add_(terms[rows].reshape(-1, terms.shape[-1]).sum(dim=0))

        (dweight,) = fold(ctx.norm, [[ctx.norm.norm.weight]], ctx.packed, add)
        return dx, dx if ctx.adding else None, None, None, dweight


def rotate(
    qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, sizes: Sequence[int], head: int
) -> torch.Tensor:
    """Rotary embedding of the q and k parts of qkv [rows, q + k + v]; sizes: (q, k, v); cos_sin: vLLM's table."""
    return _Rotate.apply(qkv, positions, cos_sin, tuple(sizes), head)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, sizes: tuple[int, ...], head: int
    ) -> torch.Tensor:
        ctx.save_for_backward(positions, cos_sin)
        ctx.sizes, ctx.head = sizes, head
        return _rotated(qkv, positions, cos_sin, sizes, head)

    @staticmethod
    def backward(ctx: Any, dqkv: torch.Tensor) -> Any:
        positions, cos_sin = ctx.saved_tensors
        cos, sin = cos_sin.chunk(2, dim=-1)
        back = torch.cat((cos, -sin), dim=-1)  # a rotation's transpose turns the other way
        return _rotated(dqkv, positions, back, ctx.sizes, ctx.head), None, None, None, None


def _rotated(
    qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, sizes: Sequence[int], head: int
) -> torch.Tensor:
    turned = qkv.clone(memory_format=torch.contiguous_format)
    q, k, _ = turned.split(list(sizes), dim=-1)
    ops.rotary_embedding(positions, q, k, head, cos_sin, True)
    return turned


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x = [gate, up], [rows, 2 d] -> [rows, d]."""
    return _SiluAndMul.apply(x)


class _SiluAndMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        d = x.shape[-1] // 2
        return activation.silu(x[..., :d]) * x[..., d:]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        d = x.shape[-1] // 2
        gate, up, dy = x[..., :d].float(), x[..., d:].float(), dy.float()
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return torch.cat((dgate, dy * torch.nn.functional.silu(gate)), dim=-1).to(x.dtype)
