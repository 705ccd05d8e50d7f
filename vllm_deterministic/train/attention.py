"""Causal attention over packed sequences: what both devices share."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from vllm_deterministic.train.sequences import Packed

__all__ = ["Attention"]


@dataclass(frozen=True)
class Attention(abc.ABC):
    """Attention over packed sequences, each from its own first token.

    heads, kv_heads, size: of the model. dtype: the server's. The pages are laid out as in a server that prefills all
    sequences in one step, one after the other; the server's answer does not depend on the step.
    """

    page: ClassVar[int]  # slots of the server's KV-cache page

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

    @cached_property
    def pages(self) -> list[int]:
        """Of each sequence."""
        return [-(-length // self.page) for length in self.packed.lengths]

    @cached_property
    def block_table(self) -> torch.Tensor:
        """[sequences, pages] i32: each sequence's pages, zeros behind them."""
        table = torch.zeros(len(self.pages), max(self.pages), dtype=torch.int32)
        first = 0
        for row, pages in enumerate(self.pages):
            table[row, :pages] = torch.arange(first, first + pages, dtype=torch.int32)
            first += pages
        return table.to(self.packed.device)

    @cached_property
    def slots(self) -> torch.Tensor:
        """[rows] i64: where each row's key and value are kept."""
        slots, first = [], 0
        for length, pages in zip(self.packed.lengths, self.pages, strict=True):
            slots.append(first * self.page + torch.arange(length))
            first += pages
        return torch.cat(slots).to(self.packed.device)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """[sequences] i32: rows of each."""
        return torch.tensor(self.packed.lengths, dtype=torch.int32).to(self.packed.device)

    @cached_property
    def starts(self) -> torch.Tensor:
        """[sequences + 1] i32: first row of each, and the end."""
        return torch.nn.functional.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))

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
