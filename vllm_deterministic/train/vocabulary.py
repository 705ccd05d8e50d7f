"""The two ends of the model: embedding rows in, log-probabilities of tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_deterministic.train.gradients import fold
from vllm_deterministic.train.linear import Linear, Snapshot, add_product
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
            # A token's rows first among themselves, in f32; on CPU index_add_ takes one row after the other.
            tokens, place = ids[rows].unique(return_inverse=True)
            of_token = torch.zeros(len(tokens), dy.shape[1]).index_add_(0, place, dy[rows].float())
            sums[0].index_add_(0, tokens, of_token.to(sums[0].dtype))

        return None, None, None, *fold(ctx.layer, [[ctx.layer.layer.weight]], ctx.packed, add)


def log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """[rows, vocabulary] f32, as vLLM's sampler: divided by the temperature in f32, then one log_softmax a row."""
    if temperature != 1.0:
        logits = logits.float() / torch.tensor([temperature], dtype=torch.float32)
    return logits.log_softmax(dim=-1, dtype=torch.float32)


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

    again: whether backward computes the vocabulary's log-probabilities anew, one sequence at a time, instead of having
    [rows, vocabulary] f32 kept for it.
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
        weights: Snapshot,
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
        for rows in packed.slices():
            scores = _all(weights, x[rows], temperature, vocabulary)
            chosen.append(scores.gather(-1, targets[rows, None]).squeeze(-1))
            if keep:
                kept.append(scores)
        ctx.save_for_backward(x, targets, *kept)
        return torch.cat(chosen)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, targets, *kept = ctx.saved_tensors
        dy = dy[:, None] / ctx.temperature
        dlogits = x.new_empty(x.shape[0], ctx.weights.weight.shape[0])  # as wide as the server pads it
        dlogits[:, ctx.vocabulary :] = 0
        for i, rows in enumerate(ctx.packed.slices()):
            scores = kept[i] if kept else _all(ctx.weights, x[rows], ctx.temperature, ctx.vocabulary)
            change = scores.exp().mul_(-dy[rows]).scatter_add_(1, targets[rows, None], dy[rows])
            dlogits[rows, : ctx.vocabulary] = change

        def add(sums: Sequence[torch.Tensor], rows: slice) -> None:
            add_product(sums, dlogits[rows], x[rows])

        gradients = fold(ctx.head, ctx.head.operands, ctx.packed, add)
        return ctx.weights.input_gradient(dlogits), None, None, None, None, None, None, None, *gradients


def _all(weights: Snapshot, x: torch.Tensor, temperature: float, vocabulary: int) -> torch.Tensor:
    return log_softmax(weights.product(x)[:, :vocabulary], temperature)
