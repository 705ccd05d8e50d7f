"""The order in which gradients are added up.

Inside `accumulate` the gradient of a parameter is a fold over sequences: g = (((0 + g_1) + g_2) + …) + g_n in f32,
where g_i depends on sequence i, the weights and the number of threads, and on nothing else. The fold goes on from one
backward pass to the next, so how sequences are cut into micro-batches changes no bit. A parameter used twice (a tied
embedding) has a fold for each use.

Any other backward pass takes all its rows at once, in the parameter's own dtype: one product of the library, faster,
the same bits for the same batch.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vllm_deterministic.train.sequences import Packed

__all__ = ["Fold", "fold", "folding"]

# The folds that go on from one backward pass to the next; None outside of `folding`.
_open: contextvars.ContextVar[dict[Any, Fold] | None] = contextvars.ContextVar("folds", default=None)
# (gradients so far, rows): adds those rows' gradients, in place, computed in the dtype of the gradients so far.
Add = Callable[[Sequence[torch.Tensor], slice], None]


class Fold:
    """The running gradients of some parameters in one use.

    operands: of one operator, each the parameters that it stacks along their first dimension. dtype: of the sums, by
    default the parameters'.
    """

    def __init__(self, operands: Sequence[Sequence[torch.nn.Parameter]], dtype: torch.dtype | None = None) -> None:
        self.operands = [list(stacked) for stacked in operands]
        self.sums = [
            torch.zeros(sum(p.shape[0] for p in stacked), *stacked[0].shape[1:], dtype=dtype or stacked[0].dtype)
            for stacked in self.operands
        ]

    def parts(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Each parameter with its share of the sums."""
        for stacked, total in zip(self.operands, self.sums, strict=True):
            yield from zip(stacked, total.split([p.shape[0] for p in stacked]), strict=True)


def fold(
    key: Any, operands: Sequence[Sequence[torch.nn.Parameter]], packed: Packed, add: Add
) -> list[torch.Tensor | None]:
    """Adds up the sequences' gradients; returns one gradient for each parameter, in order, in its own dtype.

    Inside `folding` they are kept there, under `key`, and None stands for each.
    """
    folds = _open.get()
    if folds is None:
        total = Fold(operands)
        add(total.sums, slice(0, packed.rows))
        return [part.to(parameter.dtype) for parameter, part in total.parts()]
    if key not in folds:
        folds[key] = Fold(operands, torch.float32)
    for rows in packed.slices():
        add(folds[key].sums, rows)
    return [None for stacked in operands for _ in stacked]


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
