"""The operators of the CPU server, and their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from vllm import ir

from vllm_deterministic.integration import linear as served
from vllm_deterministic.kernels import activation
from vllm_deterministic.train.cpu_attention import CPUAttention as attention
from vllm_deterministic.train.sequences import Packed

__all__ = [
    "DTYPES", "Weights", "add_embeddings", "add_products", "add_rows", "attention", "joined", "norm", "norm_gradient",
    "probabilities", "scores", "silu_and_mul", "silu_and_mul_gradient", "snapshot", "spans", "stacks",
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16)
Tensors = Sequence[torch.Tensor]
_CACHED = 2048  # rows of a weight whose product is still in the cache when it is added


class Weights:
    """The server's packed product of a weight [N, K] and bias [N] in its dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    @cached_property
    def _forward(self) -> Any:
        return served.pack(self.weight, self.bias is not None)

    @cached_property
    def _backward(self) -> Any:
        return served.pack(self.weight.t(), False)

    def products(self, x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        y = self._forward(x, self.bias)
        return (y,) if len(sizes) == 1 else y.split(list(sizes), dim=-1)

    def input_gradient(self, dys: Tensors) -> torch.Tensor:
        return self._backward(dys[0].contiguous(), None)


def stacks(weights: list[torch.nn.Parameter], biases: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    return [weights, biases] if biases else [weights]


def snapshot(operands: Sequence[Tensors], dtype: torch.dtype, padded: int, last: Weights | None) -> Weights:
    """Packed again only where a bit has changed.

    The bits are compared: fused optimisers write to parameters without raising their version.
    """
    stacked = [torch.cat([p.to(dtype) for p in parameters]) for parameters in operands]
    if padded:
        stacked = [torch.nn.functional.pad(each, (0, 0) * (each.ndim - 1) + (0, padded)) for each in stacked]
    kept = [] if last is None else [each for each in (last.weight, last.bias) if each is not None]
    if last is None or not all(map(torch.equal, stacked, kept)):
        return Weights(stacked[0], stacked[1] if len(stacked) > 1 else None)
    return last


def joined(dys: Tensors) -> Tensors:
    return dys if len(dys) == 1 else [torch.cat(list(dys), dim=-1)]


def add_products(sums: Tensors, dys: Tensors, x: torch.Tensor, spans: Sequence[slice]) -> None:
    """One product for each span: its order is the BLAS library's, for this number of rows.

    A bfloat16 product is rounded to bfloat16 before it is added to a sum in f32: the library's product of the operands
    turned into f32 takes twice as long. Of dys, what the server pads is left out.
    """
    weight = sums[0]
    dy = dys[0][:, : weight.shape[0]]
    for rows in spans:
        if weight.dtype == dy.dtype:
            weight.addmm_(dy[rows].t(), x[rows])
        else:
            for part, columns in zip(weight.split(_CACHED), dy[rows].split(_CACHED, dim=1), strict=True):
                part.add_(torch.mm(columns.t(), x[rows]))
        if len(sums) > 1:
            sums[1].add_(dy[rows].sum(dim=0, dtype=torch.float32))


def add_rows(total: torch.Tensor, terms: torch.Tensor, spans: Sequence[slice]) -> None:
    for rows in spans:
        total.add_(terms[rows].reshape(-1, terms.shape[-1]).sum(dim=0))


def add_embeddings(total: torch.Tensor, dy: torch.Tensor, ids: torch.Tensor, spans: Sequence[slice]) -> None:
    for rows in spans:
        # A token's rows first among themselves, in f32, one after the other: this operator has no atomics, and
        # index_add_ then meets no token twice.
        tokens, place = ids[rows].unique(return_inverse=True)
        of_token = torch.ops.aten.embedding_dense_backward(dy[rows].float(), place, len(tokens), -1, False)
        total.index_add_(0, tokens, of_token.to(total.dtype))


def norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if residual is None:
        return ir.ops.rms_norm.impls["native"].impl_fn(x, weight, eps), None
    found: Any = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, eps)
    return found


def norm_gradient(
    dy: torch.Tensor, dtotal: torch.Tensor | None, x: torch.Tensor, residual: torch.Tensor | None,
    weight: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    total = x.float() if residual is None else x.float() + residual.float()
    # As the forward rounds: 1/rms of the unrounded sum, over the last dimension, in torch's order for a row.
    rstd = torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + eps)
    normed = total * rstd
    dy = dy.float()
    scaled = dy * weight.float()
    dx = (scaled - normed * (scaled * normed).mean(dim=-1, keepdim=True)) * rstd
    if dtotal is not None:
        dx = dx + dtotal.float()
    return dx.to(x.dtype), dy * normed.to(weight.dtype).float()


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return activation.silu(gate) * up


def silu_and_mul_gradient(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide, dy = gate.float(), dy.float()
    dgate = torch.ops.aten.silu_backward(dy * up.float(), wide)
    return dgate.to(gate.dtype), (dy * torch.nn.functional.silu(wide)).to(up.dtype)


def spans(packed: Packed) -> Iterable[slice]:
    return packed.slices()


def scores(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As vLLM's sampler: divided by the temperature in f32, then one log_softmax a row, which is kept."""
    if temperature != 1.0:
        logits = logits.float() / torch.tensor([temperature], dtype=torch.float32)
    kept = logits.log_softmax(dim=-1, dtype=torch.float32)
    return kept.gather(-1, targets[:, None]).squeeze(-1), kept


def probabilities(kept: torch.Tensor, temperature: float) -> torch.Tensor:
    del temperature  # the kept log-probabilities have it
    return kept.exp()
