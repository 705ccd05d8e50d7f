"""The k most likely tokens of each row, in one order whatever k is."""

from __future__ import annotations

import torch

__all__ = ["top_logprobs"]


def top_logprobs(logprobs: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [rows, k] f32 and token ids [rows, k] i64 in descending order, equal values by ascending token id.

    logprobs: [rows, vocab] f32. torch.topk leaves the order of equal values open, and bf16 logits are often equal:
    its choice moves with k, which in a batch is the largest that a neighbour asked for. Here value and token id make
    one integer key, so no two are equal and a smaller k gives the head of a larger one.
    """
    if k == 0:  # a receipt asks for the token's own logprob only: no pass over the vocabulary
        return logprobs[:, :0], logprobs.new_empty((len(logprobs), 0), dtype=torch.int64)
    bits = logprobs.view(torch.int32).long()
    # IEEE order as integer order: the integers of negative floats count downwards. Both zeros become 0.
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    token = torch.arange(logprobs.shape[-1], device=logprobs.device)
    keys = (ordered << 32) - token
    indices = torch.topk(keys, k, dim=-1).indices
    return logprobs.gather(-1, indices), indices
