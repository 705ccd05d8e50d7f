"""The reduction tree of a linear layer, y = x @ W.T + bias: what is added to what, and where it is rounded.

It is keyed by dtype alone. Every schedule in this folder executes it: a tile shape, an instruction (mma.sync or wgmma),
swapped operands or another library change the schedule, never the tree.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from vllm_deterministic.kernels.certificates import digest

from vllm_deterministic.errors import UnsupportedError

__all__ = ["Problem", "Tree", "tree_of"]


@dataclass(frozen=True)
class Tree:
    """One chain per output element.

    step: products that one instruction adds to the accumulator at once; inside a step the order is the tensor core's
        own, and the same for every instruction shape of one architecture (this is what certification checks). 1 is a
        chain of single fused multiply-adds.
    order: steps are taken with k ascending, into one accumulator that starts at +0.
    bias: added in the accumulator's type, after the last step. rounding: once, to the output type, to nearest even.
    """

    operator: str = "linear"
    accumulator: str = "float32"
    step: int = 16
    order: str = "k ascending"
    accumulators: int = 1
    bias: str = "float32, after the last step"
    rounding: str = "once, to nearest even"

    @property
    def digest(self) -> str:
        return digest(dataclasses.asdict(self))


_TREES = {torch.bfloat16: Tree(), torch.float16: Tree(), torch.float32: Tree(step=1)}


def tree_of(dtype: torch.dtype) -> Tree:
    """The tree of this dtype. Raises UnsupportedError for a dtype that has none."""
    if dtype not in _TREES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _TREES)
        raise UnsupportedError(f"linear layers in {dtype} have no reduction tree yet; there are trees for {known}")
    return _TREES[dtype]


@dataclass(frozen=True)
class Problem:
    """A linear layer's shape: x [M, k] times weight [n, k]; everything but M, which no tree may depend on."""

    n: int
    k: int
    dtype: torch.dtype
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.n}x{self.k} {str(self.dtype).removeprefix('torch.')}{' with bias' if self.bias else ''}"

    @property
    def shape(self) -> dict[str, int | str | bool]:
        """As a certificate and a table name it."""
        return {"n": self.n, "k": self.k, "dtype": str(self.dtype).removeprefix("torch."), "bias": self.bias}

    @property
    def tree(self) -> Tree:
        return tree_of(self.dtype)
