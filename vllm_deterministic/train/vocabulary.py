"""The two ends of the model: embedding rows in, log-probabilities of tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_deterministic.train.gradients import fold
from vllm_deterministic.train.linear import Linear, Snapshot
from vllm_deterministic.train.sequences import Packed

__all__ = ["Embedding", "log_softmax", "token_logprobs"]


class Embedding:
    """The server's embedding with the model's weight. dtype: the server's."""

    def __init__(self, layer: torch.nn.Embedding, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype

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

        def add(sums: Sequence[torch.Tensor], rows: slice) -> None:
            sums[0].index_add_(0, ids[rows], dy[rows].float())  # on CPU one row after the other

        return None, None, None, *fold(ctx.layer, [[ctx.layer.layer.weight]], ctx.packed.slices(), add)


def log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """[rows, vocabulary] f32, as vLLM's sampler: divided by the temperature in f32, then one log_softmax a row."""
    if temperature != 1.0:
        logits = logits.float() / torch.tensor([temperature], dtype=torch.float32)
    return logits.log_softmax(dim=-1, dtype=torch.float32)


def token_logprobs(
    x: torch.Tensor, head: Linear, targets: torch.Tensor, packed: Packed, temperature: float, vocabulary: int
) -> torch.Tensor:
    """Log-probability of each row's target, [rows] f32. x: [rows, H] before the head; targets: [rows] token ids.

    The logits of one sequence at a time are in memory; backward computes them again.
    """
    parameters = [p for stacked in head.operands for p in stacked]
    return _TokenLogprobs.apply(x, head, head.snapshot(), targets, packed, temperature, vocabulary, *parameters)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        head: Linear,
        weights: Snapshot,
        targets: torch.Tensor,
        packed: Packed,
        temperature: float,
        vocabulary: int,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        del parameters
        ctx.save_for_backward(x, targets)
        ctx.head, ctx.weights, ctx.packed = head, weights, packed
        ctx.temperature, ctx.vocabulary = temperature, vocabulary
        chosen = [
            _all(weights, x[rows], temperature, vocabulary).gather(-1, targets[rows, None]).squeeze(-1)
            for rows in packed.slices()
        ]
        return torch.cat(chosen)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, targets = ctx.saved_tensors
        dx = torch.empty_like(x)

        def add(sums: Sequence[torch.Tensor], rows: slice) -> None:
            p = _all(ctx.weights, x[rows], ctx.temperature, ctx.vocabulary).exp_()
            dlogits = p.mul_(-dy[rows, None])
            dlogits.scatter_add_(1, targets[rows, None], dy[rows, None])
            dlogits = (dlogits / ctx.temperature).to(x.dtype)
            sums[0].addmm_(dlogits.float().t(), x[rows].float())
            if len(sums) > 1:
                sums[1].add_(dlogits.float().sum(dim=0))
            missing = ctx.weights.weight.shape[0] - ctx.vocabulary
            dx[rows] = ctx.weights.input_gradient(torch.nn.functional.pad(dlogits, (0, missing)))

        gradients = fold(ctx.head, ctx.head.operands, ctx.packed.slices(), add)
        return dx, None, None, None, None, None, None, *gradients


def _all(weights: Snapshot, x: torch.Tensor, temperature: float, vocabulary: int) -> torch.Tensor:
    return log_softmax(weights.product(x)[:, :vocabulary], temperature)
