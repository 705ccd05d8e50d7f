"""Linear layers: forward and input gradient on the server's certified tree, weight gradient in gradients.py's order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from vllm_deterministic.integration import linear as served
from vllm_deterministic.train.gradients import fold
from vllm_deterministic.train.sequences import Packed

__all__ = ["Linear", "Snapshot", "add_product"]


class Snapshot:
    """A weight [N, K] and bias [N] in the server's dtype, as they were when the forward began."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    @cached_property
    def _forward(self) -> Any:
        return served.pack(self.weight, self.bias is not None)

    @cached_property
    def _backward(self) -> Any:
        return served.pack(self.weight.t(), False)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x @ weight.T + bias: the server's bits. x: [rows, K]; returns [rows, N]."""
        return self._forward(x, self.bias)

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """dy @ weight, on a certified tree as well: a row's gradient does not depend on the other rows."""
        return self._backward(dy.contiguous(), None)


class Linear:
    """One of the server's linear layers, made of one or more of the model's, stacked along N.

    padded: rows to add, zeros, where the server pads N (the vocabulary). dtype: the server's.
    """

    def __init__(
        self, layers: Sequence[torch.nn.Linear | torch.nn.Embedding], dtype: torch.dtype, padded: int = 0
    ) -> None:
        self._layers, self._dtype, self._padded = list(layers), dtype, padded
        self._snapshot: Snapshot | None = None

    @property
    def operands(self) -> list[list[torch.nn.Parameter]]:
        """The stacked parameters: the weights, and the biases where there are any."""
        weights: list[Any] = [layer.weight for layer in self._layers]
        biases = [bias for layer in self._layers if (bias := getattr(layer, "bias", None)) is not None]
        return [weights, biases] if biases else [weights]

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """The present weights, packed again only where a bit has changed.

        The bits are compared: fused optimisers write to parameters without raising their version.
        """
        stacked = [torch.cat([p.to(self._dtype) for p in parameters]) for parameters in self.operands]
        if self._padded:
            stacked = [torch.nn.functional.pad(each, (0, 0) * (each.ndim - 1) + (0, self._padded)) for each in stacked]
        last = self._snapshot
        kept = [] if last is None else [each for each in (last.weight, last.bias) if each is not None]
        if last is None or not all(map(torch.equal, stacked, kept)):
            last = self._snapshot = Snapshot(stacked[0], stacked[1] if len(stacked) > 1 else None)
        return last

    def __call__(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        """x: [rows, K] of the server's dtype; returns [rows, N]."""
        parameters = [p for stacked in self.operands for p in stacked]
        return _Linear.apply(x, self, self.snapshot(), packed, *parameters)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Linear, weights: Snapshot, packed: Packed, *parameters: torch.Tensor
    ) -> torch.Tensor:
        del parameters  # named as inputs so that autograd asks for their gradients
        ctx.save_for_backward(x)
        ctx.layer, ctx.weights, ctx.packed = layer, weights, packed
        return weights.product(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        dx = ctx.weights.input_gradient(dy) if ctx.needs_input_grad[0] else None
        operands = ctx.layer.operands
        if not any(ctx.needs_input_grad[4:]):
            return dx, None, None, None, *(None for stacked in operands for _ in stacked)

        def add(sums: Sequence[torch.Tensor], rows: slice) -> None:
            add_product(sums, dy[rows], x[rows])

        return dx, None, None, None, *fold(ctx.layer, operands, ctx.packed, add)


def add_product(sums: Sequence[torch.Tensor], dy: torch.Tensor, x: torch.Tensor) -> None:
    """Adds the gradients of a weight [N, K] and, where there is one, a bias [N] to `sums`, in their dtype.

    dy: [rows, N or more], of which what the server pads is left out; x: [rows, K]. One product over the rows: its order
    is the BLAS library's, for this number of rows.
    """
    weight = sums[0]
    dy = dy[:, : weight.shape[0]]
    weight.addmm_(dy.to(weight.dtype).t(), x.to(weight.dtype))
    if len(sums) > 1:
        sums[1].add_(dy.sum(dim=0, dtype=torch.float32))
