"""What a device must bring: the server's operators, forward and backward, on its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from vllm_deterministic.train.attention import Attention
from vllm_deterministic.train.sequences import Packed

__all__ = ["Device", "Weights", "device_of"]

Tensors = Sequence[torch.Tensor]


class Weights(Protocol):
    """Weights [N, K] and biases [N] in the server's dtype, as they were when the forward began."""

    def products(self, x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """x @ weight.T + bias: the server's bits, [rows, size] for each size, a single one as wide as the server pads
        it. x: [rows, K]."""

    def input_gradient(self, dys: Tensors) -> torch.Tensor:
        """The sum of dy @ weight, [rows, K], on certified trees as well: a row's gradient does not depend on the other
        rows. dys: as `Device.joined` gives them."""


class Device(Protocol):
    """The operators of one kind of device. Modules cpu.py and cuda.py are such."""

    DTYPES: Sequence[torch.dtype]
    """Of the servers whose bits it has."""

    def stacks(
        self, weights: list[torch.nn.Parameter], biases: list[torch.nn.Parameter]
    ) -> list[list[torch.nn.Parameter]]:
        """The parameters of a linear layer in the order of their gradients: those in one list are stacked."""

    def snapshot(
        self, operands: Sequence[Tensors], dtype: torch.dtype, padded: int, last: Weights | None
    ) -> Weights: ...

    def joined(self, dys: Tensors) -> Tensors:
        """The gradients of a linear layer's results, stacked as its parameters are."""

    def add_products(self, sums: Tensors, dys: Tensors, x: torch.Tensor, spans: Sequence[slice]) -> None:
        """Adds the gradients of weights and biases to `sums`, in their dtype, span after span."""

    def add_rows(self, total: torch.Tensor, terms: torch.Tensor, spans: Sequence[slice]) -> None:
        """Adds the terms of a vector [size] up, span after span. terms: [rows, size] or [rows, heads, size]."""

    def add_embeddings(self, total: torch.Tensor, dy: torch.Tensor, ids: torch.Tensor, spans: Sequence[slice]) -> None:
        """total[ids[r]] += dy[r], span after span. ids: [rows] i64."""

    def norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The norm of x + residual, and the rounded sum where there is a residual."""

    def norm_gradient(
        self,
        dy: torch.Tensor,
        dtotal: torch.Tensor | None,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of x + residual, and the terms of the weight's, f32, of x's shape. Row by row, in f32."""

    def silu_and_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, [rows, d]."""

    def silu_and_mul_gradient(
        self, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of gate and up, computed in f32 and rounded once."""

    def attention(self, packed: Packed, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> Attention: ...

    def spans(self, packed: Packed) -> Iterable[slice]:
        """The rows whose logits are in memory at once."""

    def scores(
        self, logits: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The targets' log-probabilities as the sampler gives them, [rows] f32, and what `probabilities` needs."""

    def probabilities(self, kept: torch.Tensor, temperature: float) -> torch.Tensor:
        """[rows, vocabulary] f32, a tensor of its own."""


def device_of(kind: str) -> Device:
    """The operators for tensors on "cpu" or "cuda". Raises ImportError where vLLM lacks what they are made of."""
    module: Any
    if kind == "cpu":
        from vllm_deterministic.train import cpu as module
    else:
        from vllm_deterministic.train import cuda as module
    return module  # type: ignore[no-any-return]
