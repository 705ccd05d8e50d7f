"""The reduction tree of attention: what a query row's bits depend on besides its own Q, K and V.

Keys are counted from position 0 of the sequence, never from a chunk, a prefix or a block of queries. Tile j holds keys
[j * tile, (j + 1) * tile). A split holds `split` keys, from key `steady` on twice as many: the first starts with key 0,
each next one where the one before it ends. For one query row, fp32 throughout, every operation rounded to nearest and
none contracted unless written fma:

    at the start of a split: m = -inf, l = 0, acc[d] = 0. For its tiles, ascending:
    1. x[k] = chain of tensor-core products q * k, head size ascending, from zero; a softcap maps x to tanh(x * scale
       / cap); ALiBi makes it fma(slope * u, k - position, x), slope * u rounded      u: 1 / scale, or 1 / cap
    2. x[k] = -inf where the row does not see key k (future, or left of its window)
    3. top = max(m, max_k(x) * c)      c: scale * log2(e), or cap * log2(e); so m is in log2 units
       base = 0 where top == -inf, else top
    4. p[k] = ex2(fma(x[k], c, -base)); alpha = ex2(m - base)
    5. r = sum of p, unrounded, by halving: y[i] + y[i + n / 2] for n = tile, tile / 2 ... 2
    6. l = fma(l, alpha, r); acc[d] = acc[d] * alpha, then the chain acc += half(p) * v, keys ascending; m = top
    merge of the splits, ascending, from M = -inf, L = 0, A = 0, also of a single one:
    7. top = max(M, m); base as above; a = ex2(M - base); b = ex2(m - base)
       L = fma(L, a, l * b); A[d] = fma(A[d], a, acc[d] * b); M = top
    8. an attention sink is one more split: m = sink * log2(e), l = 1, acc = 0
    9. o[d] = fma(A[d], 1 / L, +0), 1 / L rounded to nearest; o = 0 where L == 0. Then one rounding to the output type.

c, u and the softcap's factor are rounded to fp32 once each. k - position counts from the sequence's first token, and is
exact in fp32 up to 2^24 tokens.

An e4m3 cache holds key / k_scale and value / v_scale: divided in fp32, set to +-448 where they are beyond, rounded to
e4m3. Steps 1 and 6 take its elements in the half-precision type of q, which holds each of them; k_scale is a factor of
scale everywhere above, and step 9 has v_scale / L, rounded once, in place of 1 / L. Scales are fixed before the first
token.

A head size that is no power of two is summed as the next one, with zeros behind: they change nothing.

A tile or split that a row sees nothing of leaves its state as it was, bit for bit (alpha = 1, p = 0). So a schedule may
start before a row's window, run past its end, or merge empty splits; how it cuts the rest into programs is its own
affair. (The +0 of step 9 makes zeros of both signs one, the only trace an empty split could leave.)

The sizes were measured on an H200: every merge costs prefill, and decode what it keeps; larger splits leave the card
idle where one sequence is decoded. So they double where those before them can occupy it: `steady` is for 128 splits of
all KV heads together.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property

from vllm_deterministic.errors import UnsupportedError

from ..certificates import digest

__all__ = ["CACHES", "E4M3_MAX", "HEAD_SIZES", "LOG2E", "SINGLE_SPLITS", "Tree", "tree_for"]

LOG2E = math.log2(math.e)
# head size -> (tile, split). At 256, tiles of 128 keys do not fit a multiprocessor's shared memory.
_SIZES = {64: (128, 512), 96: (128, 512), 128: (128, 512), 192: (64, 512), 256: (64, 512)}
HEAD_SIZES = tuple(_SIZES)
# Fields of Tree that came after the first digests: their defaults are not hashed.
_LATER = {"alibi": False, "cache": "half", "k_scale": 1.0, "v_scale": 1.0, "steady": 0}
SINGLE_SPLITS = 128  # before they double, of all KV heads
CACHES = ("half", "e4m3")
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Tree:
    """Everything that attention's bits depend on. Frozen for a numerics version.

    tile, split: keys per tile and per split; split is a multiple of tile. steady: from which key on splits are twice as
    long, a multiple of that; 0 for never.
    scale: what scores are multiplied with. softcap: 0 for none, else scores become softcap * tanh(score / softcap).
    window: how many keys a row sees, itself included; 0 for all before it. sink: whether heads have sink logits.
    alibi: whether heads have ALiBi slopes. cache: "half" for keys and values in q's type, or "e4m3" with their scales.
    """

    head_size: int
    tile: int
    split: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    sink: bool = False
    row_sum: str = "halving"
    merge: str = "ascending"
    alibi: bool = False
    cache: str = "half"
    k_scale: float = 1.0
    v_scale: float = 1.0
    steady: int = 0

    def splits(self, keys: int) -> list[int]:
        """First keys of the splits of so many keys."""
        steady = min(self.steady or keys, keys)
        return [*range(0, steady, self.split), *range(steady, keys, 2 * self.split)]

    @property
    def e4m3(self) -> bool:
        return self.cache == "e4m3"

    @property
    def width(self) -> int:
        """The head size as it is summed: a power of two."""
        return 1 << (self.head_size - 1).bit_length()

    @property
    def plain(self) -> bool:
        """Whether tiles of the cache are operands as they lie there, and a score depends on no position."""
        return self.width == self.head_size and not self.alibi and not self.e4m3

    @property
    def log2_scale(self) -> float:
        """c of step 3: turns x into log2 units."""
        return (self.softcap or self.scale * self.k_scale) * LOG2E

    @property
    def tanh_scale(self) -> float:
        """tanh(x * scale / cap) is 1 - 2 / (1 + ex2(x * tanh_scale)); 0 without softcap."""
        return 2 * LOG2E * (self.scale * self.k_scale) / self.softcap if self.softcap else 0.0

    @property
    def slope_scale(self) -> float:
        """u of step 1: turns a slope into units of x."""
        return 1 / (self.softcap or self.scale * self.k_scale)

    @cached_property
    def digest(self) -> str:
        """sha256 of the tree, in hex; part of the numerics id. Fields that came later count where they say something:
        the digest of a tree without them stays what it was."""
        said = {name: value for name, value in asdict(self).items() if value != _LATER.get(name)}
        return digest({"operator": "attention", **said})


def tree_for(
    head_size: int,
    scale: float | None = None,
    *,
    kv_heads: int | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sink: bool = False,
    alibi: bool = False,
    cache: str = "half",
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tree:
    """The tree of a layer. scale: 1 / sqrt(head_size) by default. kv_heads: of the layer on this card, for which splits
    double behind some key; without, or with a window, they do not. k_scale, v_scale: of an e4m3 cache.

    Raises UnsupportedError for what has no tree yet."""
    if head_size not in _SIZES:
        known = ", ".join(str(size) for size in HEAD_SIZES)
        raise UnsupportedError(f"attention with head size {head_size} is not covered (covered: {known})")
    if softcap < 0 or window < 0:
        raise UnsupportedError(f"softcap {softcap} and window {window} must not be negative")
    scale = head_size**-0.5 if scale is None else scale
    if scale <= 0:
        raise UnsupportedError(f"attention scale {scale} is not covered: it must be positive")
    if cache not in CACHES:
        raise UnsupportedError(f"a KV cache of {cache} is not covered (covered: {', '.join(CACHES)})")
    if (k_scale, v_scale) != (1.0, 1.0) and cache != "e4m3":
        raise UnsupportedError(
            f"scales {k_scale} and {v_scale} of a KV cache of {cache} are not covered (covered: e4m3)"
        )
    if not all(0 < s < math.inf for s in (k_scale, v_scale)):
        raise UnsupportedError(f"scales {k_scale} and {v_scale} of a KV cache must be positive and finite")
    tile, split = _SIZES[head_size]
    steady = 0 if kv_heads is None or window else max(SINGLE_SPLITS // kv_heads // 2, 1) * 2 * split
    return Tree(
        head_size, tile, split, scale, softcap, window, sink, alibi=alibi, cache=cache, k_scale=k_scale,
        v_scale=v_scale, steady=steady,
    )  # fmt: skip
