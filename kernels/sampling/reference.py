"""What the kernels of this folder compute, in the plainest words and in f64, on the CPU."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["gumbel", "kept", "philox"]


def kept(row: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """Which tokens of one row of logits stay: [vocab] bool. Equal logits by ascending token id."""
    row = row.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    order = torch.sort(row, descending=True, stable=True).indices[:k]
    if p < 1.0:
        mass = (row[order].double() - row[order[0]].double()).exp()
        before = mass.cumsum(0) - mass
        order = order[before < p * mass.sum()]
    mask = torch.zeros(row.shape, dtype=torch.bool)
    mask[order] = True
    return mask


def philox(seed: int, counter: np.ndarray, position: int) -> np.ndarray:
    """The four words of Philox-4x32-7 at counters (counter, position, 0): [4, n] u64 below 2^32."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    a = counter.astype(np.uint64)
    b = np.full_like(a, position & 0xFFFFFFFF)
    c = np.full_like(a, position >> 32)
    d = np.zeros_like(a)
    keys = [np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)]
    for _ in range(7):
        left, right = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (right >> shift) ^ b ^ keys[0], right & low, (left >> shift) ^ d ^ keys[1], left & low
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack([a, b, c, d])


def gumbel(seed: int, position: int, vocab: int) -> torch.Tensor:
    """The noise of a request's tokens at a position: [vocab] f64."""
    words = philox(seed, np.arange(-(-vocab // 4)), position).T.reshape(-1)[:vocab]
    exponential = -np.log1p(-(words.astype(np.float64) + 0.5) / 2.0**32)
    return torch.from_numpy(-np.log(exponential))
