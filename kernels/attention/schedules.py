"""The ways to execute attention's tree. A schedule cannot change a bit, so each is chosen for speed, among the
certified."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .tree import Tree

__all__ = ["DECODE", "PREFILL", "REFERENCE", "Decode", "Heads", "Prefill"]


@dataclass(frozen=True)
class Heads:
    """What a layer's kernels are compiled for besides its tree. query, kv: numbers of heads. page: slots per page."""

    query: int
    kv: int
    page: int

    @property
    def group(self) -> int:
        return self.query // self.kv

    @property
    def pack(self) -> int:
        """Query heads of one KV head that share a tile of prefill_cuda: the largest power of two, up to 64."""
        return math.gcd(self.group, 64)


@dataclass(frozen=True)
class Decode:
    """A decode kernel's launch. rows: (token, head) rows of one program. tma: by TMA, from pages of whole tiles.

    per_sm: programs per multiprocessor that the work is cut for. many: for batches that fill the card by themselves.
    """

    name: str
    rows: int = 16
    warps: int = 4
    stages: int = 2
    tma: bool = False
    per_sm: int = 2
    many: bool = False

    def eligible(self, tree: Tree, heads: Heads, hopper: bool) -> bool:
        """Whether it is for this layer: by TMA where that can be, else not. Tiles of head size 256 leave no room for a
        pipeline by TMA."""
        return self.tma == (hopper and heads.page % tree.tile == 0 and tree.head_size <= 128 and tree.plain)


@dataclass(frozen=True)
class Prefill:
    """A prefill kernel's launch. cuda: prefill_cuda; warp_specialised: prefill_ws; else prefill. rows: query tokens of
    one program.

    pieces: for small steps, whose blocks may be cut into pieces. In all else such a schedule is as another one, so that
    one plan serves every step.
    """

    name: str
    cuda: bool = False
    pieces: bool = False
    warp_specialised: bool = False
    rows: int = 128
    warps: int = 8
    stages: int = 2

    def eligible(self, tree: Tree, heads: Heads, hopper: bool) -> bool:
        """Whether it is for this layer. Tiles of head size 256 leave no room for blocks of 128."""
        if tree.head_size > 128:
            return self.rows == 64
        if self.cuda or self.warp_specialised:
            plain = tree.head_size == 128 and not (tree.window or tree.softcap or tree.sink)
            return hopper and heads.page % tree.tile == 0 and tree.plain and (plain or not self.cuda)
        return self.rows == 128 or not hopper or not tree.plain


# The simplest kernel on the tree: one tile at a time, no pipeline. Its bits are the tree's.
REFERENCE = Prefill("reference", rows=64, warps=4, stages=1)
# Of those for so many rows, fastest first, as measured on an H200 (benchmarks/attention.py).
DECODE = (
    Decode("decode-tma", stages=3, tma=True, per_sm=1),
    Decode("decode-tma-many", tma=True, many=True),
    Decode("decode-32-tma", rows=32, stages=3, tma=True, per_sm=1),
    Decode("decode-32-tma-many", rows=32, tma=True, per_sm=1, many=True),
    Decode("decode-64-tma", rows=64, tma=True, per_sm=1),
    Decode("decode"),
    Decode("decode-64", rows=64, per_sm=1),
)
PREFILL = (
    Prefill("prefill-cuda-pieces", cuda=True, pieces=True),
    Prefill("prefill-cuda", cuda=True),
    Prefill("prefill-ws", warp_specialised=True),
    Prefill("prefill"),
    Prefill("prefill-64", rows=64, warps=4),
)
