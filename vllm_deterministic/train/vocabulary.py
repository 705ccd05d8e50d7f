"""The two ends of the model: embedding rows in, log-probabilities of tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_deterministic.train.device import Device, Weights
from vllm_deterministic.train.gradients import fold
from vllm_deterministic.train.linear import Linear
from vllm_deterministic.train.sequences import Packed

__all__ = ["Embedding", "token_logprobs"]


class Embedding:
    """The server's embedding with the model's weight. dtype: the server's."""

    def __init__(self, layer: torch.nn.Embedding, device: Device, dtype: torch.dtype) -> None:
        self.layer, self.device, self.dtype = layer, device, dtype

    def __call__(self, ids: torch.Tensor, packed: Packed) -> torch.Tensor:
        """ids: [rows] i64; returns [rows, H]."""
        return _Embedding.apply(ids, self, packed, self.layer.weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, layer: Embedding, packed: Packed, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.layer, ctx.packed = layer, packed
        return torch.nn.functional.embedding(ids, weight).to(layer.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors

        def add(sums: Sequence[torch.Tensor], spans: Sequence[slice]) -> None:
            ctx.layer.device.add_embeddings(sums[0], dy, ids, spans)

        return None, None, None, *fold(ctx.layer, [[ctx.layer.layer.weight]], ctx.packed, add)


def token_logprobs(
    x: torch.Tensor,
    head: Linear,
    targets: torch.Tensor,
    packed: Packed,
    temperature: float,
    vocabulary: int,
    again: bool = False,
) -> torch.Tensor:
    """Log-probability of each row's target, [rows] f32. x: [rows, H] before the head; targets: [rows] token ids.

    again: whether backward computes the vocabulary's scores anew, instead of having [rows, vocabulary] kept for it.
    """
    parameters = [p for stacked in head.operands for p in stacked]
    keep = torch.is_grad_enabled() and not again
    return _TokenLogprobs.apply(x, head, head.snapshot(), targets, packed, temperature, vocabulary, keep, *parameters)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        head: Linear,
        weights: Weights,
        targets: torch.Tensor,
        packed: Packed,
        temperature: float,
        vocabulary: int,
        keep: bool,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        del parameters
        ctx.head, ctx.weights, ctx.packed = head, weights, packed
        ctx.temperature, ctx.vocabulary = temperature, vocabulary
        kept, chosen = [], []
        for rows in head.device.spans(packed):
            logits = _logits(weights, x[rows], vocabulary)
            scores, needed = head.device.scores(logits[:, :vocabulary], targets[rows], temperature)
            chosen.append(scores)
            if keep:
                kept.append(needed)
        ctx.width = logits.shape[1]
        ctx.save_for_backward(x, targets, *kept)
        return torch.cat(chosen)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, targets, *kept = ctx.saved_tensors
        device, weights, vocabulary = ctx.head.device, ctx.weights, ctx.vocabulary
        dy = dy[:, None] / ctx.temperature
        dlogits = x.new_empty(x.shape[0], ctx.width)
        dlogits[:, vocabulary:] = 0
        for i, rows in enumerate(device.spans(ctx.packed)):
            if kept:
                needed = kept[i]
            else:
                logits = _logits(weights, x[rows], vocabulary)
                _, needed = device.scores(logits[:, :vocabulary], targets[rows], ctx.temperature)
            change = device.probabilities(needed, ctx.temperature).mul_(-dy[rows])
            # One token a row: nothing is added twice.
            dlogits[rows, :vocabulary] = change.scatter_add_(1, targets[rows, None], dy[rows])

        def add(sums: Sequence[torch.Tensor], spans: Sequence[slice]) -> None:
            device.add_products(sums, [dlogits], x, spans)

        gradients = fold(ctx.head, ctx.head.operands, ctx.packed, add)
        return weights.input_gradient([dlogits]), None, None, None, None, None, None, None, *gradients


def _logits(weights: Weights, x: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """[rows, vocabulary or, where the server pads it, more]."""
    return weights.products(x, [vocabulary])[0]
