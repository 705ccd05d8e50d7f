"""Logprobs, the most likely tokens and a token's place among them, row by row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .row import MASS_BITS, clean, rank_of, token_of
from .select import CAPACITY, CHUNK, Passes, candidates, place_count, row_top
from .top import top_logprobs

__all__ = ["MOST", "Scores"]

MOST = 1024  # tokens a row's kernel sorts; whoever wants more gets them from PyTorch's sort

_PER_UNIT = tl.constexpr(2.0**-MASS_BITS)
_ALL = tl.constexpr(1)


@triton.jit(do_not_specialize=["n"])
def _best(
    X, x_row, SLICES, STATE, BUFFER, THRESHOLDS, KEPT, OUT, vocab, slices, n, N_PAD: tl.constexpr,
    BINS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr, SLICES_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: rows. The tokens from the threshold upwards, exactly n of them, in descending rank."""
    row = tl.program_id(0).to(tl.int64)
    top, scale = row_top(SLICES, row, slices, SLICES_PAD)
    threshold = tl.load(THRESHOLDS + row)
    found = tl.zeros((), tl.int32)
    for i in range(0, place_count(STATE, row, vocab, CAPACITY), CHUNK):
        ranks = candidates(X, x_row, BUFFER, STATE, row, i + tl.arange(0, CHUNK), vocab, top, scale, BINS, CAPACITY)
        keep = (ranks >= threshold) & (ranks >= 0)
        at = found + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(KEPT + row * N_PAD + at, ranks, mask=keep & (at < n))
        found += tl.sum(keep.to(tl.int32), axis=0)
    first = tl.full((), 0, tl.int32)
    while (found < n) & (first < vocab):  # a mask leaves fewer than n: then dropped tokens follow, by their ids
        token = first + tl.arange(0, CHUNK)
        x = clean(tl.load(X + row * x_row + token, mask=token < vocab, other=0.0))
        dropped = (x == float("-inf")) & (token < vocab)
        at = found + tl.cumsum(dropped.to(tl.int32), axis=0) - 1
        tl.store(KEPT + row * N_PAD + at, rank_of(x, token), mask=dropped & (at < n))
        found += tl.sum(dropped.to(tl.int32), axis=0)
        first += CHUNK
    tl.debug_barrier()  # every thread's ranks are stored before any is read
    place = tl.arange(0, N_PAD)
    ranks = tl.sort(tl.load(KEPT + row * N_PAD + place, mask=place < n, other=-1), descending=True)
    tl.store(OUT + row * n + place, token_of(ranks), mask=place < n)


@triton.jit(do_not_specialize=["n"])
def _logprobs(X, x_row, SLICES, STATE, TOKENS, OUT, slices, n, COLUMNS: tl.constexpr, SLICES_PAD: tl.constexpr):
    """Grid: rows. (logit - top) - log(mass of the row): the mass is an integer, converted once."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SLICES_PAD)
    top = tl.max(tl.load(SLICES + (row * slices + at) * 2, mask=at < slices, other=float("-inf")), axis=0)
    mass = tl.load(STATE + row * 8 + _ALL).to(tl.float32)
    total = tl.log(mass * _PER_UNIT)
    for i in range(0, n, COLUMNS):
        place = i + tl.arange(0, COLUMNS)
        token = tl.load(TOKENS + row * n + place, mask=place < n, other=0)
        x = clean(tl.load(X + row * x_row + token, mask=place < n, other=0.0))
        tl.store(OUT + row * n + place, tl.where(x == top, 0.0, x - top) - total, mask=place < n)


class Scores:
    """What a batch of rows is asked for besides a token.

    x: [rows, vocab] f32, bf16 or fp16 logits, each row contiguous. sampled: [rows] token ids i64. n: how many of the
    most likely tokens are wanted.
    """

    def __init__(self, x: torch.Tensor, sampled: torch.Tensor, n: int) -> None:
        rows = x.shape[0]
        some = 0 < n <= MOST
        limits = torch.full((rows,), n, dtype=torch.int32, device=x.device) if some else None
        self._passes = passes = Passes(x, limits)
        passes.gather(named=sampled, from_top=True, tokens=some)
        self.ranks = passes.state[:, 6]  # [rows] i64, logits not below the sampled token's
        if n > MOST:
            self.best = top_logprobs(x.float(), n)[1]
        elif some:
            self.best = x.new_empty((rows, n), dtype=torch.int64)  # [rows, n] i64 token ids, most likely first
            pad = triton.next_power_of_2(n)
            kept = x.new_empty((rows, pad), dtype=torch.int64)
            _best[(rows,)](
                x, x.stride(0), passes.slices, passes.state, passes.buffer, passes.threshold(), kept, self.best,
                passes.vocab, passes.grid[1], n, N_PAD=pad, BINS=passes.bins, CAPACITY=CAPACITY, CHUNK=CHUNK,
                SLICES_PAD=passes.pad,
            )  # fmt: skip
        else:
            self.best = x.new_empty((rows, 0), dtype=torch.int64)

    def logprobs(self, tokens: torch.Tensor) -> torch.Tensor:
        """[rows, n] f32 logprobs of `tokens`, [rows, n] i64."""
        passes, (rows, n) = self._passes, tokens.shape
        out = torch.empty((rows, n), dtype=torch.float32, device=tokens.device)
        _logprobs[(rows,)](
            passes.x, passes.x.stride(0), passes.slices, passes.state, tokens.contiguous(), out, passes.grid[1], n,
            COLUMNS=min(triton.next_power_of_2(n), 256), SLICES_PAD=passes.pad, enable_fp_fusion=False,
        )  # fmt: skip
        return out
