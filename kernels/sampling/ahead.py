"""Compiles, before a server takes requests, what their batches may launch: Triton compiles a kernel when it first runs,
which every request would wait for."""

from __future__ import annotations

import itertools

import torch

from . import draw as drawing
from . import select
from .draw import draw
from .scores import Scores
from .select import thresholds

__all__ = ["draws", "scores"]

TOP = (0, 1, 5, 20)  # numbers of logprobs that are asked for most; a kernel serves all of one power of two


def _rows() -> tuple[int, int]:
    """Numbers of rows that take each of the two schedules."""
    return 1, max(drawing.FEW_ROWS, select.FEW_ROWS) + 1


def draws(
    x: torch.Tensor,
    requests: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: torch.dtype,
) -> None:
    """draw's arguments for a row or more; the first is drawn with every kind of limit. greedy: the dtype of the logits
    where no row's are changed."""
    for rows in _rows():
        first = torch.zeros(rows, dtype=torch.int64, device=x.device)
        some, state = x[first], (requests[first], temperatures, seeds, positions[first])
        k, p = torch.ones_like(first, dtype=torch.int32), torch.full_like(first, 0.5, dtype=torch.float32)
        for limits in itertools.product((None, k), (None, p)):
            draw(some, *state, thresholds(some, *limits))
        draw(some.to(greedy), *state)


def scores(x: torch.Tensor, sampled: torch.Tensor) -> None:
    """Scores' x and sampled, for a row or more."""
    for rows in _rows():
        first = torch.zeros(rows, dtype=torch.int64, device=x.device)
        some, tokens = x[first], sampled[first]
        for n in TOP:
            found = Scores(some, tokens, n)
            found.logprobs(torch.cat((tokens.unsqueeze(-1), found.best), dim=1))
