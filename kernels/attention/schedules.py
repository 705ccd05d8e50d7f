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
    """A decode kernel's launch. warp_specialised: decode_ws, else decode. rows: (token, head) rows of one program.

    keys_first: the tile's keys on the tensor core's wide side. tma: tiles come by TMA, from pages of whole tiles.
    per_sm: programs per multiprocessor that the work is cut for.
    """

    name: str
    warp_specialised: bool = False
    rows: int = 16
    warps: int = 4
    stages: int = 4
    keys_first: bool = False
    tma: bool = False
    per_sm: int = 2

    def eligible(self, tree: Tree, heads: Heads, few: int, hopper: bool) -> bool:
        """Whether the kernel can run sequences of up to `few` query tokens."""
        whole_tiles = heads.page % tree.tile == 0
        if self.warp_specialised:
            return hopper and whole_tiles and tree.split == 4 * tree.tile and few * heads.group <= 16
        if (self.tma or self.keys_first) and tree.head_size > 128:
            return False
        return not self.tma or (hopper and whole_tiles)


@dataclass(frozen=True)
class Prefill:
    """A prefill kernel's launch. warp_specialised: prefill_ws, else prefill. rows: query tokens of one program."""

    name: str
    warp_specialised: bool = False
    rows: int = 128
    warps: int = 8
    stages: int = 2
    tma: bool = False

    def eligible(self, tree: Tree, heads: Heads, hopper: bool) -> bool:
        whole_tiles = heads.page % tree.tile == 0
        if self.warp_specialised:
            return hopper and whole_tiles and tree.head_size <= 128
        if tree.head_size > 128 and self.rows * self.stages > 128:
            return False
        return not self.tma or (hopper and whole_tiles)


# The simplest kernel on the tree: one tile at a time, no pipeline. Its bits are the tree's.
REFERENCE = Prefill("reference", rows=64, warps=4, stages=1)
# Fastest first, as measured (benchmarks/attention.py).
DECODE = (
    Decode("decode-ws", warp_specialised=True, stages=6, per_sm=1),
    Decode("decode-tma", tma=True, stages=3, per_sm=1),
    Decode("decode-keys-tma", tma=True, keys_first=True, stages=2),
    Decode("decode-keys", keys_first=True, stages=2),
    Decode("decode-64-tma", rows=64, tma=True, stages=2, per_sm=1),
    Decode("decode-64", rows=64, stages=2, per_sm=1),
    Decode("decode-deep", stages=4),
    Decode("decode", stages=2),
)
PREFILL = (
    Prefill("prefill-ws", warp_specialised=True),
    Prefill("prefill-tma", tma=True),
    Prefill("prefill"),
    Prefill("prefill-64", rows=64, warps=4),
)
