"""The ways to execute attention's tree. A schedule cannot change a bit, so each is chosen for speed, among the
certified."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Decode:
    """A decode kernel's launch. rows: (token, head) rows of one program. tma: by TMA, from pages of whole tiles.

    per_sm: programs per multiprocessor that the work is cut for. many: for batches that fill the card several times.
    """

    name: str
    rows: int = 16
    warps: int = 4
    stages: int = 2
    tma: bool = False
    per_sm: int = 2
    many: bool = False

    def eligible(self, tree: Tree, heads: Heads, hopper: bool) -> bool:
        """Whether the kernel can run this layer. Tiles of head size 256 leave no room for a pipeline by TMA."""
        return not self.tma or (hopper and heads.page % tree.tile == 0 and tree.head_size <= 128)


@dataclass(frozen=True)
class Prefill:
    """A prefill kernel's launch. warp_specialised: prefill_ws, else prefill. rows: query tokens of one program.

    head_major: blocks of one head run side by side, which keeps its keys in the L2 cache; else heads of one block.
    """

    name: str
    warp_specialised: bool = False
    rows: int = 128
    warps: int = 8
    stages: int = 2
    tma: bool = False
    head_major: bool = True

    def eligible(self, tree: Tree, heads: Heads, hopper: bool) -> bool:
        whole_tiles = heads.page % tree.tile == 0
        if self.warp_specialised:
            return hopper and whole_tiles and tree.head_size <= 128
        if tree.head_size > 128 and self.rows * self.stages > 128:
            return False
        return not self.tma or (hopper and whole_tiles)


# The simplest kernel on the tree: one tile at a time, no pipeline. Its bits are the tree's.
REFERENCE = Prefill("reference", rows=64, warps=4, stages=1)
# Fastest first, as measured on an H200 (benchmarks/attention.py).
DECODE = (
    Decode("decode-tma", stages=3, tma=True, per_sm=1),
    Decode("decode", many=True),
    Decode("decode-tma-2", tma=True, many=True),
    Decode("decode-32-tma", rows=32, tma=True, per_sm=1),
    Decode("decode-32", rows=32, per_sm=1),
    Decode("decode-64-tma-8", rows=64, warps=8, tma=True, per_sm=1),
    Decode("decode-64-tma", rows=64, tma=True, per_sm=1),
    Decode("decode-64", rows=64, per_sm=1),
)
PREFILL = (
    Prefill("prefill-ws", warp_specialised=True),
    Prefill("prefill-ws-blocks", warp_specialised=True, head_major=False),
    Prefill("prefill-tma", tma=True),
    Prefill("prefill"),
    Prefill("prefill-64", rows=64, warps=4),
)
