"""Linear layers: forward and input gradient on the server's certified tree, weight gradient in gradients.py's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_deterministic.train.device import Device, Weights
from vllm_deterministic.train.gradients import fold
from vllm_deterministic.train.sequences import Packed

__all__ = ["Linear"]


class Linear:
    """One of the server's linear layers, made of one or more of the model's, stacked along N.

    padded: rows to add, zeros, where the server pads N (the vocabulary). dtype: the server's.
    """

    def __init__(
        self,
        layers: Sequence[torch.nn.Linear | torch.nn.Embedding],
        device: Device,
        dtype: torch.dtype,
        padded: int = 0,
    ) -> None:
        self._layers, self.device, self._dtype, self._padded = list(layers), device, dtype, padded
        self._snapshot: Weights | None = None

    @property
    def operands(self) -> list[list[torch.nn.Parameter]]:
        """The parameters, stacked as the device has them: the weights, then the biases where there are any."""
        weights: list[Any] = [layer.weight for layer in self._layers]
        biases = [bias for layer in self._layers if (bias := getattr(layer, "bias", None)) is not None]
        return self.device.stacks(weights, biases)

    @torch.no_grad()
    def snapshot(self) -> Weights:
        """The present weights."""
        self._snapshot = self.device.snapshot(self.operands, self._dtype, self._padded, self._snapshot)
        return self._snapshot

    def __call__(self, x: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, ...]:
        """x: [rows, K] of the server's dtype; returns [rows, N of the layer] for each layer."""
        parameters = [p for stacked in self.operands for p in stacked]
        sizes = [layer.weight.shape[0] for layer in self._layers]
        return _Linear.apply(x, self, self.snapshot(), sizes, packed, *parameters)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layer: Linear,
        weights: Weights,
        sizes: Sequence[int],
        packed: Packed,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        del parameters  # named as inputs so that autograd asks for their gradients
        ctx.save_for_backward(x)
        ctx.layer, ctx.weights, ctx.packed = layer, weights, packed
        return weights.products(x, sizes)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        layer = ctx.layer
        dys = layer.device.joined(dys)
        dx = ctx.weights.input_gradient(dys) if ctx.needs_input_grad[0] else None
        operands = layer.operands
        if not any(ctx.needs_input_grad[5:]):
            return dx, None, None, None, None, *(None for stacked in operands for _ in stacked)

        def add(sums: Sequence[torch.Tensor], spans: Sequence[slice]) -> None:
            layer.device.add_products(sums, dys, x, spans)

        return dx, None, None, None, None, *fold(layer, operands, ctx.packed, add)
