"""Random rows and sequences of them, for the gradients' kernels on a card and through Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch


def spans(lengths: Iterable[int], start: int = 0) -> list[slice]:
    """Sequences of these lengths, one after the other."""
    edges = itertools.accumulate(lengths, initial=start)
    return [slice(first, stop) for first, stop in itertools.pairwise(edges)]


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
