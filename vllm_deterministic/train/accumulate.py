"""One gradient of many sequences, whatever the micro-batches and whatever the order in which they are handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.train.gradients import folding
from vllm_deterministic.train.patch import logprobs

__all__ = ["accumulate"]


def accumulate(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    loss: Callable[[int, torch.Tensor], torch.Tensor],
    first: int | Sequence[int] = 1,
    temperature: float = 1.0,
    micro_batch: int = 8,
) -> list[float]:
    """Adds the gradient of the sum of the sequences' losses to `.grad`; returns each sequence's loss.

    loss: (index, log-probabilities of that sequence as `logprobs` gives them) -> its loss, a scalar that depends on
    nothing else. The sum runs over the sequences in ascending order of their token ids (equal ones as handed in), in
    f32, one after the other: the gradient's bits do not depend on `micro_batch`, nor on the order of `token_ids`.
    They depend on the weights, the number of threads and the machine. Call inside `deterministic_forward`.
    """
    if micro_batch < 1:
        raise UnsupportedError("micro_batch: at least 1")
    firsts = [first] * len(token_ids) if isinstance(first, int) else list(first)
    order = sorted(range(len(token_ids)), key=lambda index: (list(token_ids[index]), index))
    losses = [0.0] * len(token_ids)
    with folding():
        for start in range(0, len(order), micro_batch):
            chosen = order[start : start + micro_batch]
            scores = logprobs(model, [token_ids[i] for i in chosen], [firsts[i] for i in chosen], temperature)
            terms = [loss(index, each) for index, each in zip(chosen, scores, strict=True)]
            stacked = torch.stack(terms)
            stacked.sum().backward()
            for index, term in zip(chosen, stacked.tolist(), strict=True):
                losses[index] = term
    return losses
