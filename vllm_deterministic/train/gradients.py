"""The order in which gradients are added up.

The gradient of a parameter is a fold over sequences: g = (((0 + g_1) + g_2) + …) + g_n in f32, where g_i depends on
sequence i, the weights and the number of threads, and on nothing else. Within one backward pass the fold runs over its
sequences in their order; inside `accumulate` it goes on from one backward pass to the next, so how sequences are cut
into micro-batches changes no bit. A parameter used twice (a tied embedding) has a fold for each use.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

__all__ = ["Fold", "folding"]

# The folds that go on from one backward pass to the next; None outside of `folding`.
_open: contextvars.ContextVar[dict[Any, Fold] | None] = contextvars.ContextVar("folds", default=None)
# (gradients so far, rows of one sequence): adds that sequence's gradients, in place.
Add = Callable[[Sequence[torch.Tensor], slice], None]


class Fold:
    """The running gradients of some parameters in one use.

    parameters: those that one operator stacks along their first dimension into each of its operands.
    """

    def __init__(self, operands: Sequence[Sequence[torch.nn.Parameter]]) -> None:
        self.operands = [list(stacked) for stacked in operands]
        self.sums = [
            torch.zeros(sum(p.shape[0] for p in stacked), *stacked[0].shape[1:], dtype=torch.float32)
            for stacked in self.operands
        ]

    def parts(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Each parameter with its share of the sums, f32."""
        for stacked, total in zip(self.operands, self.sums, strict=True):
            yield from zip(stacked, total.split([p.shape[0] for p in stacked]), strict=True)


def fold(
    key: Any, operands: Sequence[Sequence[torch.nn.Parameter]], slices: Iterator[slice], add: Add
) -> list[torch.Tensor | None]:
    """Folds the sequences' gradients; returns one gradient for each parameter, in order, in its own dtype.

    Inside `folding` they are kept there, under `key`, and None stands for each.
    """
    kept = _open.get()
    if kept is None:
        mine = Fold(operands)
    else:
        if key not in kept:
            kept[key] = Fold(operands)
        mine = kept[key]
    for rows in slices:
        add(mine.sums, rows)
    if kept is not None:
        return [None for stacked in operands for _ in stacked]
    return [total.to(parameter.dtype) for parameter, total in mine.parts()]


@contextlib.contextmanager
def folding() -> Iterator[None]:
    """Inside, backward passes go on with the same folds; at the end each parameter's sums are added to its `.grad`.

    The uses of one parameter are added in the order in which backward met them first. An error inside leaves `.grad`
    as it was.
    """
    folds: dict[Any, Fold] = {}
    token = _open.set(folds)
    try:
        yield
    finally:
        _open.reset(token)
    totals: dict[int, torch.Tensor] = {}
    parameters = {}
    for each in folds.values():
        for parameter, part in each.parts():
            if not parameter.requires_grad:
                continue
            parameters[id(parameter)] = parameter
            totals[id(parameter)] = totals[id(parameter)] + part if id(parameter) in totals else part
    for number, parameter in parameters.items():
        gradient = totals[number].to(parameter.dtype)
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
