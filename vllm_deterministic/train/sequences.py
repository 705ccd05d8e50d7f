"""Sequences packed one after the other, without padding: what every operator of the trainer's forward works on."""

from __future__ import annotations

import contextvars
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from vllm_deterministic.errors import UnsupportedError

__all__ = ["Packed", "open_folds"]

# The folds of gradients.py that go on from one backward pass to the next; None outside of `folding`.
open_folds: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar("folds", default=None)


@dataclass(frozen=True)
class Packed:
    """lengths: tokens of each sequence, all at least 1. The rows of sequence i follow those of sequence i - 1.

    device: where the rows are. folds: where their gradients are added up; taken down here, in the thread that asks, for
    a card's backward pass runs in another.
    """

    lengths: tuple[int, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    folds: dict[Any, Any] | None = field(default_factory=open_folds.get, repr=False, compare=False)

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @cached_property
    def positions(self) -> torch.Tensor:
        """[rows] i64: each token's position in its own sequence, from 0 as the server counts."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)

    def slices(self) -> Iterator[slice]:
        """The rows of each sequence, in order."""
        start = 0
        for length in self.lengths:
            yield slice(start, start + length)
            start += length

    @classmethod
    def of_mask(cls, mask: torch.Tensor) -> tuple[Packed, torch.Tensor]:
        """The layout of a padded batch, and the flat indices [rows] of its real tokens.

        mask: [batch, width], non-zero where a token is real; padding may stand left or right. Raises UnsupportedError
        for a row without a token or with padding inside.
        """
        real = mask.bool()
        lengths = real.sum(dim=1)
        edges = (real[:, 1:] != real[:, :-1]).sum(dim=1) + real[:, 0].long() + real[:, -1].long()
        if (lengths == 0).any() or (edges != 2).any():
            raise UnsupportedError("attention_mask: each row must be one run of real tokens, padded left or right")
        return cls(tuple(lengths.tolist()), mask.device), real.flatten().nonzero().squeeze(1)

    @classmethod
    def of_positions(cls, positions: torch.Tensor) -> Packed:
        """The layout of sequences packed in one row, told by their positions [rows], each counted from 0.

        Raises UnsupportedError where the positions do not count up from 0 again and again.
        """
        edges = [*(positions == 0).nonzero().squeeze(1).tolist(), positions.numel()]
        packed = cls(tuple(end - start for start, end in itertools.pairwise(edges)), positions.device)
        if packed.rows != positions.numel() or not torch.equal(packed.positions, positions.long()):
            raise UnsupportedError("position_ids: packed sequences must each count 0, 1, 2, …")
        return packed

    @classmethod
    def of_token_ids(cls, token_ids: Sequence[Sequence[int]], device: torch.device) -> Packed:
        """The layout of lists of token ids. Raises UnsupportedError for an empty one."""
        if not token_ids or not all(token_ids):
            raise UnsupportedError("token_ids: at least one sequence, and no empty ones")
        return cls(tuple(map(len, token_ids)), device)
