"""The operators of the CUDA server, and their gradients.

A row's bits do not depend on how many rows its weight has, so what the server stacks (q, k and v; gate and up) is
multiplied here one by one, from the parameters themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch

from vllm_deterministic import compat
from vllm_deterministic.kernels import gradients
from vllm_deterministic.kernels.gemm import dispatch
from vllm_deterministic.kernels.gemm.tree import Problem
from vllm_deterministic.kernels.norm import rms
from vllm_deterministic.kernels.sampling.scores import Scores
from vllm_deterministic.train.cuda_attention import CUDAAttention as attention
from vllm_deterministic.train.sequences import Packed

__all__ = [
    "DTYPES", "Weights", "add_embeddings", "add_products", "add_rows", "attention", "joined", "norm", "norm_gradient",
    "probabilities", "scores", "silu_and_mul", "silu_and_mul_gradient", "snapshot", "spans", "stacks",
]  # fmt: skip

DTYPES = (torch.bfloat16,)
Tensors = Sequence[torch.Tensor]
_LOGIT_ROWS = 1024  # rows of the vocabulary's width that are in memory at once


@functools.cache
def _prepared(problem: Problem, most: int, device: torch.device) -> None:
    """Raises CertificationError where no schedule is on the tree."""
    dispatch.prepare(problem, most, device)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.shape
    most = _LOGIT_ROWS if max(n, k) > 4 * dispatch.MOST_ROWS else dispatch.MOST_ROWS
    _prepared(Problem(n, k, weight.dtype, bias is not None), most, weight.device)
    return dispatch.linear(x, weight, bias)


class Weights:
    """Weights, each [N, K], and their biases [N] where there are any: the model's own, where the dtype is theirs."""

    def __init__(self, weights: Tensors, biases: Sequence[torch.Tensor | None]) -> None:
        self._weights, self._biases = weights, biases

    def products(self, x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        del sizes
        return tuple(_product(x, *layer) for layer in zip(self._weights, self._biases, strict=True))

    def input_gradient(self, dys: Tensors) -> torch.Tensor:
        """Each layer's rounded once, their sum in f32 and rounded once more."""
        # Transposed anew each time: a copy that stays would be as large as the model.
        parts = [
            _product(dy.contiguous(), weight.t().contiguous(), None)
            for dy, weight in zip(dys, self._weights, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(parts[0].dtype)


def stacks(weights: list[torch.nn.Parameter], biases: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    return [[parameter] for parameter in (*weights, *biases)]


def snapshot(operands: Sequence[Tensors], dtype: torch.dtype, padded: int, last: object) -> Weights:
    del padded, last  # neither changes a bit; nothing is packed
    tensors = [parameter.detach().to(dtype).contiguous() for (parameter,) in operands]
    weights, biases = ([t for t in tensors if t.ndim == ndim] for ndim in (2, 1))
    return Weights(weights, biases or [None] * len(weights))


def joined(dys: Tensors) -> Tensors:
    return dys


def add_products(sums: Tensors, dys: Tensors, x: torch.Tensor, spans: Sequence[slice]) -> None:
    """In f32 one chain over the rows; in another dtype one product of the library for each span."""
    biases = sums[len(dys) :]
    for total, dy in zip(sums, dys, strict=False):
        if total.dtype == torch.float32:
            gradients.add_product(total, dy, x, spans)
            continue
        for rows in spans:
            total.addmm_(dy[rows].t(), x[rows])
    for total, dy in zip(biases, dys, strict=False):
        add_rows(total, dy, spans)


add_rows = gradients.add_rows


def add_embeddings(total: torch.Tensor, dy: torch.Tensor, ids: torch.Tensor, spans: Sequence[slice]) -> None:
    del spans  # row after row, and the spans are in order
    gradients.add_embeddings(total, dy, ids)


def norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if residual is None:
        return rms.rms_norm(x, weight, eps), None
    return rms.fused_add_rms_norm(x, residual, weight, eps)


norm_gradient = gradients.norm_gradient


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(gate)
    torch.ops._C.silu_and_mul(out, torch.cat((gate, up), dim=-1))  # vLLM's takes them side by side
    return out


silu_and_mul_gradient = gradients.silu_and_mul_gradient


def spans(packed: Packed) -> Iterable[slice]:
    for start in range(0, packed.rows, _LOGIT_ROWS):
        yield slice(start, min(start + _LOGIT_ROWS, packed.rows))


def scores(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As the sampler: the row's mass is an integer (kernels/sampling). The logits are kept."""
    if temperature != 1.0:
        logits = logits.float()
        one = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
        divide = compat.probe(compat.TRAINER_SEAMS["temperature"])
        divide(logits, one, torch.tensor([temperature], device=logits.device))
    return Scores(logits, targets, 0).logprobs(targets[:, None]).squeeze(1), logits


def probabilities(kept: torch.Tensor, temperature: float) -> torch.Tensor:
    del temperature  # the kept logits are divided by it
    return kept.softmax(dim=-1, dtype=torch.float32)
