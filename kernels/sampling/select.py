"""Top-k and top-p: the rank below which a row's tokens are dropped.

Kept are the `k` tokens of highest rank, and of those the fewest, from the highest rank down, whose mass reaches
p x their total. That is a set defined by integers (row.py), so how it is found cannot change it. Here: bins of distance
from the row's top; the few bins in which the last kept token can lie; their tokens, gathered; the rank, searched among
them. For a small k the bins come from the largest logits of groups of 32: k groups that reach a bin hold k tokens that
do. For others they come from a histogram of the row. Several programs share a row; all leave a row without limits
alone. A logit of -inf (a mask's) is dropped already: it is never gathered; a row with at most k others has no top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .row import MOST_TOKENS, clean, logit_of, mass_of, rank_of

__all__ = ["CAPACITY", "CHUNK", "Passes", "candidates", "drop_below", "place_count", "row_top", "thresholds"]

# Free schedules: a batch of few rows gets four programs for each of TILE tokens and bins four times as fine. The latter
# cost every program, and leave so few tokens to search among that they stay in registers.
TILE = 4096
FEW_ROWS = 8
FINER = 4
GROUP = 32
BINS = 256
CAPACITY = 8192  # gathered tokens of a row; a row that needs more (nearly all logits equal) is read again instead
CHUNK = 1024
SEARCH_WARPS = 16

_BINS = tl.constexpr(BINS)
_GROUP = tl.constexpr(GROUP)
_FEW = tl.constexpr(64)  # k is small up to a 64th of the vocabulary, half as many as there are groups
# Columns of STATE, i64: mass above the bracket, mass of the row, tokens gathered, first and last bin of the bracket,
# tokens above it, logits not below the named token's.
_ABOVE = tl.constexpr(0)
_ALL = tl.constexpr(1)
_COUNT = tl.constexpr(2)
_FIRST = tl.constexpr(3)
_LAST = tl.constexpr(4)
_TOKENS_ABOVE = tl.constexpr(5)
_NOT_BELOW = tl.constexpr(6)
STATE = 8


@triton.jit
def _limits(K, P, row, vocab):
    """A row's k (vocab: none) and p (1: none)."""
    k = vocab
    p = 1.0
    if K is not None:
        k = tl.minimum(tl.load(K + row), vocab).to(tl.int32)
    if P is not None:
        p = tl.load(P + row)
    return k, p


@triton.jit
def row_top(SLICES, row, slices, SLICES_PAD: tl.constexpr):
    """The row's largest logit, and BINS per unit of distance from it. Maxima only: the same in every kernel."""
    at = tl.arange(0, SLICES_PAD)
    base = SLICES + row * slices * 2 + at * 2
    top = tl.max(tl.load(base, mask=at < slices, other=float("-inf")), axis=0)
    mean = tl.max(tl.load(base + 1, mask=at < slices, other=float("-inf")), axis=0)
    spread = top - mean
    usable = (spread > 1e-4) & (spread < 1e30)
    # The mean lies in bin 160 of 256: the bins reach 1.6 times as far below the top as it does.
    return top, 160.0 / tl.where(usable, spread, 20.0)


@triton.jit
def _bin(x, top, scale, BINS: tl.constexpr):
    distance = tl.where(x == top, 0.0, top - x) * scale
    return tl.minimum(distance * (BINS // _BINS), BINS - 1.0).to(tl.int32)


@triton.jit
def _maxima(
    X, x_row, K, P, SLICES, GROUPS, HISTOGRAM, STATE, vocab, slices, EVERY: tl.constexpr, TILE: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Grid: rows, slices. The largest logit of each group, of the slice, the mean of its finite ones, a clean slate."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    k, p = _limits(K, P, row, vocab)
    if EVERY | (k < vocab) | (p < 1.0):
        group = tl.arange(0, TILE // _GROUP)
        token = part * TILE + group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        x = clean(tl.load(X + row * x_row + token, mask=token < vocab, other=float("-inf")))
        finite = (x > float("-inf")) & (x < float("inf"))
        count = tl.sum(finite.to(tl.int32))
        mean = tl.sum(tl.where(finite, x, 0.0)) / tl.maximum(count, 1).to(tl.float32)
        largest = tl.max(x, axis=1)
        tl.store(GROUPS + (row * slices + part) * (TILE // _GROUP) + group, largest)
        tl.store(SLICES + (row * slices + part) * 2, tl.max(largest, axis=0))
        tl.store(SLICES + (row * slices + part) * 2 + 1, tl.where(count > 0, mean, float("-inf")))
        if part == 0:
            tl.store(STATE + row * 8 + tl.arange(0, 8), tl.zeros((8,), tl.int64))
            tl.store(HISTOGRAM + row * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))


@triton.jit
def _histogram(
    X, x_row, K, P, SLICES, HISTOGRAM, vocab, slices, TILE: tl.constexpr, BINS: tl.constexpr, SLICES_PAD: tl.constexpr
):  # fmt: skip
    """Grid: rows, slices. For the rows whose k is not small."""
    row = tl.program_id(0).to(tl.int64)
    k, p = _limits(K, P, row, vocab)
    if (k > vocab // _FEW) & ((k < vocab) | (p < 1.0)):
        top, scale = row_top(SLICES, row, slices, SLICES_PAD)
        token = tl.program_id(1) * TILE + tl.arange(0, TILE)
        x = clean(tl.load(X + row * x_row + token, mask=token < vocab, other=float("-inf")))
        counts = tl.histogram(_bin(x, top, scale, BINS), BINS, mask=x > float("-inf"))
        where = HISTOGRAM + row * BINS + tl.arange(0, BINS)
        tl.atomic_add(where, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _bracket(
    K, P, SLICES, GROUPS, HISTOGRAM, STATE, vocab, slices, FROM_TOP: tl.constexpr, TILE: tl.constexpr,
    BINS: tl.constexpr, CHUNK: tl.constexpr, SLICES_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: rows. The bins in which the last kept token can lie."""
    row = tl.program_id(0).to(tl.int64)
    k, p = _limits(K, P, row, vocab)
    if (k < vocab) | (p < 1.0):
        top, scale = row_top(SLICES, row, slices, SLICES_PAD)
        first = tl.full((), 0, tl.int32)
        above = tl.full((), 0, tl.int32)
        if FROM_TOP | (k <= vocab // _FEW):
            groups = slices * (TILE // _GROUP)
            coarse = tl.arange(0, _BINS)
            tops = tl.zeros((_BINS,), tl.int32)
            for i in range(0, groups, CHUNK):
                at = i + tl.arange(0, CHUNK)
                largest = tl.load(GROUPS + row * groups + at, mask=at < groups, other=float("-inf"))
                tops += tl.histogram(_bin(largest, top, scale, _BINS), _BINS, mask=largest > float("-inf"))
            last = tl.min(tl.where(tl.cumsum(tops, axis=0) >= k, coarse, _BINS - 1), axis=0)
            last = (last + 1) * (BINS // _BINS) - 1
        else:
            bins = tl.arange(0, BINS)
            counts = tl.load(HISTOGRAM + row * BINS + bins)
            upto = tl.cumsum(counts, axis=0)
            last = tl.min(tl.where(upto >= k, bins, BINS - 1), axis=0)
            first = last
            if p < 1.0:
                # Bounds of each bin's mass; 1e-5 and 1.001 outweigh f32's errors and those of exp.
                kept = tl.minimum(tl.maximum(k - (upto - counts), 0), counts).to(tl.float32)
                scale *= BINS // _BINS
                edge = bins.to(tl.float32) / scale
                most = kept * tl.exp(-edge) * 1.00001
                least = tl.where(bins < BINS - 1, kept * tl.exp(-edge - 1.0 / scale) * 0.99999, 0.0)
                most_upto, least_upto = tl.cumsum(most, axis=0), tl.cumsum(least, axis=0)
                most_after = tl.sum(most, axis=0) - most_upto
                least_after = tl.sum(least, axis=0) - least_upto
                slack = 1e-5 * tl.sum(most, axis=0)
                # The mass up to a bin reaches p of the whole if it is p / (1 - p) of the mass after it.
                can = (most_upto * (1.0 - p) * 1.001 + slack >= p * least_after) & (kept > 0.0)
                must = least_upto * (1.0 - p) >= p * most_after * 1.001 + slack
                first = tl.minimum(tl.min(tl.where(can, bins, BINS - 1), axis=0), last)
                if k >= vocab:
                    last = tl.maximum(tl.min(tl.where(must, bins, BINS - 1), axis=0), first)
            above = tl.sum(tl.where(bins < first, counts, 0), axis=0)
        tl.store(STATE + row * 8 + _FIRST, first.to(tl.int64))
        tl.store(STATE + row * 8 + _LAST, last.to(tl.int64))
        tl.store(STATE + row * 8 + _TOKENS_ABOVE, above.to(tl.int64))


@triton.jit
def _gather(
    X, x_row, K, P, NAMED, SLICES, STATE, BUFFER, vocab, slices, GATHER: tl.constexpr, TILE: tl.constexpr,
    BINS: tl.constexpr, CAPACITY: tl.constexpr, SLICES_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: rows, slices. Gathers the bracket's tokens, in any order, and adds up the masses around it.

    NAMED: a token of each row, whose place in the row is counted; with it the row's whole mass is wanted too.
    """
    row = tl.program_id(0).to(tl.int64)
    k, p = _limits(K, P, row, vocab)
    if (NAMED is not None) | (k < vocab) | (p < 1.0):
        token = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = token < vocab
        x = clean(tl.load(X + row * x_row + token, mask=inside, other=float("-inf")))
        top, scale = row_top(SLICES, row, slices, SLICES_PAD)
        state = STATE + row * 8
        if GATHER:
            bins = _bin(x, top, scale, BINS)
            first = tl.load(state + _FIRST).to(tl.int32)
            last = tl.load(state + _LAST).to(tl.int32)
            wanted = (bins >= first) & (bins <= last) & (x > float("-inf"))
            count = tl.sum(wanted.to(tl.int32), axis=0)
            if count > 0:
                start = tl.atomic_add(state + _COUNT, count.to(tl.int64), sem="relaxed")
                place = start + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
                where = BUFFER + row * CAPACITY + place
                tl.store(where, rank_of(x, token), mask=wanted & (place < CAPACITY))
        if (NAMED is not None) or (p < 1.0):
            mass = tl.where(inside, mass_of(x, top), 0)
            tl.atomic_add(state + _ALL, tl.sum(mass, axis=0), sem="relaxed")
            if GATHER:
                tl.atomic_add(state + _ABOVE, tl.sum(tl.where(bins < first, mass, 0), axis=0), sem="relaxed")
        if NAMED is not None:
            named = clean(tl.load(X + row * x_row + tl.load(NAMED + row)))
            not_below = tl.sum((inside & (x >= named)).to(tl.int64), axis=0)
            tl.atomic_add(state + _NOT_BELOW, not_below, sem="relaxed")


@triton.jit
def candidates(X, x_row, BUFFER, STATE, row, at, vocab, top, scale, BINS: tl.constexpr, CAPACITY: tl.constexpr):
    """The ranks at places `at` of the gathered tokens, -1 where there is none. Their number: `place_count`."""
    state = STATE + row * 8
    count = tl.load(state + _COUNT)
    if count <= CAPACITY:
        ranks = tl.load(BUFFER + row * CAPACITY + at, mask=at < count, other=-1)
    else:
        x = clean(tl.load(X + row * x_row + at, mask=at < vocab, other=float("-inf")))
        bins = _bin(x, top, scale, BINS)
        inside = (bins >= tl.load(state + _FIRST)) & (bins <= tl.load(state + _LAST)) & (x > float("-inf"))
        ranks = tl.where(inside, rank_of(x, at), -1)
    return ranks


@triton.jit
def place_count(STATE, row, vocab, CAPACITY: tl.constexpr):
    count = tl.load(STATE + row * 8 + _COUNT)
    return tl.where(count <= CAPACITY, count, vocab).to(tl.int32)


@triton.jit
def _weight(ranks, top, BY_MASS: tl.constexpr):
    if BY_MASS:
        weight = tl.where(ranks >= 0, mass_of(logit_of(tl.maximum(ranks, 0)), top), 0)
    else:
        weight = (ranks >= 0).to(tl.int64)
    return weight


@triton.jit
def _reached(ranks, weight, pivots):
    """[8] the weight from each pivot upwards. Pivots lie along a warp's lanes, so that few of them meet in a sum."""
    return tl.sum(tl.where(ranks[:, None] >= pivots[None, :], weight[:, None], 0), axis=0)


@triton.jit
def _search(
    X, x_row, BUFFER, STATE, row, vocab, top, scale, target, BY_MASS: tl.constexpr, BINS: tl.constexpr,
    CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The highest rank such that the candidates from it upwards number, or weigh, `target` or more; 0 where all of them
    do not."""
    places = place_count(STATE, row, vocab, CAPACITY)
    # Most often one chunk holds them all: it stays in registers.
    head = candidates(X, x_row, BUFFER, STATE, row, tl.arange(0, CHUNK), vocab, top, scale, BINS, CAPACITY)
    head_weight = _weight(head, top, BY_MASS)
    low = tl.min(tl.where(head >= 0, head, 1 << 52), axis=0)
    high = tl.maximum(tl.max(head, axis=0), 0)
    whole = tl.sum(head_weight, axis=0)
    for i in range(CHUNK, places, CHUNK):
        at = i + tl.arange(0, CHUNK)
        ranks = candidates(X, x_row, BUFFER, STATE, row, at, vocab, top, scale, BINS, CAPACITY)
        low = tl.minimum(low, tl.min(tl.where(ranks >= 0, ranks, 1 << 52), axis=0))
        high = tl.maximum(high, tl.max(ranks, axis=0))
        whole += tl.sum(_weight(ranks, top, BY_MASS), axis=0)
    if whole < target:
        low = tl.zeros((), tl.int64)
        high = tl.zeros((), tl.int64)
    span = high - low  # the answer lies in [low, low + span]
    while span > 0:
        step = span // 8 + 1  # eight steps cover span + 1 ranks
        pivots = low + tl.arange(0, 8) * step
        reached = _reached(head, head_weight, pivots)
        for i in range(CHUNK, places, CHUNK):
            at = i + tl.arange(0, CHUNK)
            ranks = candidates(X, x_row, BUFFER, STATE, row, at, vocab, top, scale, BINS, CAPACITY)
            reached += _reached(ranks, _weight(ranks, top, BY_MASS), pivots)
        passed = tl.maximum(tl.sum((reached >= target).to(tl.int64), axis=0), 1) - 1
        low += passed * step
        span = tl.minimum(step - 1, span - passed * step)
    return low


@triton.jit
def _threshold(
    X, x_row, K, P, SLICES, STATE, BUFFER, OUT, vocab, slices, BINS: tl.constexpr, CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr, SLICES_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: rows. The rank of the last token that is kept; 0 for a row without limits."""
    row = tl.program_id(0).to(tl.int64)
    k, p = _limits(K, P, row, vocab)
    threshold = tl.zeros((), tl.int64)
    if (k < vocab) | (p < 1.0):
        top, scale = row_top(SLICES, row, slices, SLICES_PAD)
        above = tl.load(STATE + row * 8 + _ABOVE)
        if k < vocab:
            target = k.to(tl.int64) - tl.load(STATE + row * 8 + _TOKENS_ABOVE)
            threshold = _search(X, x_row, BUFFER, STATE, row, vocab, top, scale, target, False, BINS, CAPACITY, CHUNK)
        if p < 1.0:
            total = tl.load(STATE + row * 8 + _ALL)
            if k < vocab:  # the nucleus is one of the top k
                total = above
                for i in range(0, place_count(STATE, row, vocab, CAPACITY), CHUNK):
                    at = i + tl.arange(0, CHUNK)
                    ranks = candidates(X, x_row, BUFFER, STATE, row, at, vocab, top, scale, BINS, CAPACITY)
                    mass = mass_of(logit_of(tl.maximum(ranks, 0)), top)
                    total += tl.sum(tl.where((ranks >= threshold) & (ranks >= 0), mass, 0), axis=0)
            target = tl.ceil(p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
            target = tl.maximum(tl.minimum(target, total) - above, 1)
            nucleus = _search(X, x_row, BUFFER, STATE, row, vocab, top, scale, target, True, BINS, CAPACITY, CHUNK)
            threshold = tl.maximum(threshold, nucleus)
    tl.store(OUT + row, threshold)


@triton.jit
def _drop(X, x_row, THRESHOLDS, vocab, TILE: tl.constexpr):
    """Grid: rows, slices."""
    row = tl.program_id(0).to(tl.int64)
    threshold = tl.load(THRESHOLDS + row)
    if threshold > 0:
        token = tl.program_id(1) * TILE + tl.arange(0, TILE)
        where = X + row * x_row + token
        x = clean(tl.load(where, mask=token < vocab, other=float("-inf")))
        tl.store(where, float("-inf"), mask=(token < vocab) & (rank_of(x, token) < threshold))


@dataclass
class Passes:
    """The passes over rows of logits, with the memory between them.

    x: [rows, vocab] f32, bf16 or fp16, each row contiguous. Raises ValueError for other layouts and for more than 2^18
    tokens.
    """

    x: torch.Tensor
    k: torch.Tensor | None = None
    p: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, self.vocab = self.x.shape
        if self.vocab > MOST_TOKENS or self.x.stride(1) != 1:
            raise ValueError(f"logits of shape {tuple(self.x.shape)} and strides {self.x.stride()} are not covered")
        self.tile, self.bins = (TILE // FINER, BINS * FINER) if rows <= FEW_ROWS else (TILE, BINS)
        self.grid = (rows, triton.cdiv(self.vocab, self.tile))
        self.pad = triton.next_power_of_2(self.grid[1])
        self.slices = self.x.new_empty((rows, self.grid[1], 2), dtype=torch.float32)
        self.state = self.x.new_empty((rows, STATE), dtype=torch.int64)
        self.groups = self.x.new_empty((rows, self.grid[1] * self.tile // GROUP), dtype=torch.float32)
        self.histogram = self.x.new_empty((rows, self.bins), dtype=torch.int32)
        self.buffer = self.state  # until something is gathered
        self._row = (self.x, self.x.stride(0), self.k, self.p)
        _maxima[self.grid](
            *self._row, self.slices, self.groups, self.histogram, self.state, self.vocab, self.grid[1],
            EVERY=self.k is None and self.p is None, TILE=self.tile, BINS=self.bins, num_warps=8,
        )  # fmt: skip

    def gather(self, *, named: torch.Tensor | None = None, from_top: bool = False, tokens: bool = True) -> None:
        """tokens: gather the bracket's tokens; from_top: all above it too. named: [rows] a token id each; with it the
        masses of whole rows, and how many logits are not below the named one, are counted."""
        size = (self.vocab, self.grid[1])
        if tokens:
            self.buffer = self.x.new_empty((self.grid[0], CAPACITY), dtype=torch.int64)
            if not from_top:
                _histogram[self.grid](
                    *self._row, self.slices, self.histogram, *size, TILE=self.tile, BINS=self.bins, SLICES_PAD=self.pad,
                    num_warps=8,
                )  # fmt: skip
            _bracket[self.grid[:1]](
                self.k, self.p, self.slices, self.groups, self.histogram, self.state, *size, FROM_TOP=from_top,
                TILE=self.tile, BINS=self.bins, CHUNK=CHUNK, SLICES_PAD=self.pad,
            )  # fmt: skip
        _gather[self.grid](
            *self._row, named, self.slices, self.state, self.buffer, *size, GATHER=tokens, TILE=self.tile,
            BINS=self.bins, CAPACITY=CAPACITY, SLICES_PAD=self.pad, num_warps=8,
        )  # fmt: skip

    def threshold(self) -> torch.Tensor:
        out = self.state.new_empty(self.grid[0])
        _threshold[self.grid[:1]](
            *self._row, self.slices, self.state, self.buffer, out, self.vocab, self.grid[1], BINS=self.bins,
            CAPACITY=CAPACITY, CHUNK=CHUNK, SLICES_PAD=self.pad, num_warps=SEARCH_WARPS,
        )  # fmt: skip
        return out


def thresholds(x: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor | None:
    """[rows] i64, the rank of each row's last kept token, 0 where all are kept; None where no row has a limit.

    x: [rows, vocab] f32, bf16 or fp16. k: [rows] integer, vocab or more for "no limit", or None. p: [rows] f32, 1 for
    "no limit", or None.
    """
    if (k is None and p is None) or x.shape[0] == 0:
        return None
    passes = Passes(x, k, p)
    passes.gather()
    return passes.threshold()


def drop_below(x: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Sets the logits whose rank is below their row's to -inf, in place, and returns `x`."""
    _drop[(x.shape[0], triton.cdiv(x.shape[1], TILE))](x, x.stride(0), ranks, x.shape[1], TILE=TILE)
    return x
