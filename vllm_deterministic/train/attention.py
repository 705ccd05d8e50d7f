"""Causal attention over packed sequences: what both devices share."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch

from vllm_deterministic.train.sequences import Packed

__all__ = ["Attention"]


@dataclass(frozen=True)
class Attention(abc.ABC):
    """Attention over packed sequences, each from its own first token.

    heads, kv_heads, size: of the model. dtype: the server's.
    """

    packed: Packed
    heads: int
    kv_heads: int
    size: int
    dtype: torch.dtype

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q: [rows, heads * size], k and v: [rows, kv_heads * size], rotated; returns [rows, heads * size]."""
        return _Attention.apply(q, k, v, self)

    @property
    def scale(self) -> float:
        return float(self.size**-0.5)

    @abc.abstractmethod
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The server's bits."""

    @abc.abstractmethod
    def backward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of q, k and v, each of its operand's shape and dtype."""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.attention = attention
        return attention.forward(q, k, v)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        return *ctx.attention.backward(*ctx.saved_tensors, dout.contiguous()), None
