"""The order in which gradients are added up.

Inside `accumulate` the gradient of a parameter is a fold over sequences: g = (((0 + g_1) + g_2) + …) + g_n in f32,
where g_i depends on sequence i, the weights and, on CPU, the number of threads, and on nothing else. (On a card the
fold goes by a sequence's rows, or tiles of them: gradients.py of kernels/.) The fold goes on from one backward pass to
the next, so how sequences are cut into micro-batches changes no bit. A parameter used twice (a tied embedding) has a
fold for each use.

Any other backward pass takes all its rows at once, in the parameter's own dtype: one product of the library, faster,
the same bits for the same batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vllm_deterministic.train.sequences import Packed, open_folds

__all__ = ["Fold", "fold", "folding"]

# (gradients so far, spans): adds the gradients of each span's rows, one span after the other, in place, computed in the
# dtype of the gradients so far.
Add = Callable[[Sequence[torch.Tensor], Sequence[slice]], None]


class Fold:
    """The running gradients of some parameters in one use.

    operands: of one operator, each the parameters that it stacks along their first dimension. dtype: of the sums, by
    default the parameters'.
    """

    def __init__(self, operands: Sequence[Sequence[torch.nn.Parameter]], dtype: torch.dtype | None = None) -> None:
        self.operands = [list(stacked) for stacked in operands]
        self.sums = [
            stacked[0].new_zeros(
                sum(p.shape[0] for p in stacked), *stacked[0].shape[1:], dtype=dtype, requires_grad=False
            )
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

    Of rows that were packed inside `folding` they are kept there, under `key`, and None stands for each.
    """
    folds = packed.folds
    if folds is None:
        total = Fold(operands)
        add(total.sums, [slice(0, packed.rows)])
        return [part.to(parameter.dtype) for parameter, part in total.parts()]
    if key not in folds:
        folds[key] = Fold(operands, torch.float32)
    add(folds[key].sums, list(packed.slices()))
    return [None for stacked in operands for _ in stacked]


@contextlib.contextmanager
def folding() -> Iterator[None]:
    """Backward passes of what is packed inside go on with the same folds; at the end each parameter's sums are added to
    its `.grad`.

    The uses of one parameter are added in the order in which backward met them first. An error inside leaves `.grad`
    as it was.
    """
    folds: dict[Any, Fold] = {}
    token = open_folds.set(folds)
    try:
        yield
    finally:
        open_folds.reset(token)
    totals: dict[int, torch.Tensor] = {}
    parameters = {}
    for each in folds.values():
        for parameter, part in each.parts():
            if not parameter.requires_grad:
                continue
            parameters[id(parameter)] = parameter
            totals[id(parameter)] = totals[id(parameter)] + part if id(parameter) in totals else part
    for number, parameter in parameters.items():
        gradient = totals[number].to(parameter.dtype, copy=True)  # not a part of a sum that others keep
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
