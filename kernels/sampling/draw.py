"""One token a row: the argmax of logit + Gumbel noise, ties to the lower token id.

The noise of a token is a function of (seed, position, token): word token % 4 of Philox-4x32-7 (Salmon et al., 2011)
with the seed as key and (token // 4, position, 0) as counter. Every operation on it is rounded by itself (no fused
multiply-add), so that logits of any dtype meet the same noise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .row import clean, logit_of, rank_of, token_of

__all__ = ["draw"]

LANES = 1024  # a free schedule, as is how many rows are few: they get four programs for each of these
FEW_ROWS = 8


@triton.jit
def _gumbel(word):
    """-log(E), E = -log(1 - h) exponential, h = (word + 1/2) / 2^32.

    The tail that wins is E near 0, where h has all its bits: up to h = 1/64 -log(1 - h) is taken from its series (the
    next term is below 2^-26 of it), from there on 1 - h is exact enough (2^-19). h is kept below 1.
    """
    h = tl.minimum(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994)
    series = h * (1.0 + h * (0.5 + h * (1.0 / 3.0 + h * 0.25)))
    return -tl.log(tl.where(h < 0.015625, series, -tl.log(1.0 - h)))


@triton.jit
def _draw_slice(
    X, x_row, THRESHOLDS, REQUESTS, TEMPERATURES, SEEDS, POSITIONS, BEST, vocab, slices, LANES: tl.constexpr
):  # fmt: skip
    """Grid: rows, slices. The rank of the slice's best token."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    request = tl.load(REQUESTS + row)
    counter = part * LANES + tl.arange(0, LANES)
    token = counter[:, None] * 4 + tl.arange(0, 4)[None, :]
    x = clean(tl.load(X + row * x_row + token, mask=token < vocab, other=float("-inf")))
    if THRESHOLDS is not None:
        threshold = tl.load(THRESHOLDS + row)
        if threshold > 0:
            least = logit_of(threshold)
            x = tl.where((x > least) | ((x == least) & (token <= token_of(threshold))), x, float("-inf"))
    if (tl.load(TEMPERATURES + request) != 0.0) & (tl.max(x) > float("-inf")):
        seed = tl.load(SEEDS + request)
        position = tl.load(POSITIONS + row).to(tl.int64)
        none = tl.zeros_like(counter).to(tl.uint32)
        low = none + (position & 0xFFFFFFFF).to(tl.uint32)
        high = none + (position >> 32).to(tl.uint32)
        a, b, c, d = tl.philox(seed, counter.to(tl.uint32), low, high, none, n_rounds=7)
        words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(LANES, 4)
        x = clean(x + _gumbel(words))
    best = tl.max(x)
    tl.store(BEST + row * slices + part, rank_of(best, tl.min(tl.where(x == best, token, vocab))))


@triton.jit
def _draw_row(BEST, OUT, slices, SLICES_PAD: tl.constexpr):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SLICES_PAD)
    best = tl.max(tl.load(BEST + row * slices + part, mask=part < slices, other=0), axis=0)
    tl.store(OUT + row, token_of(best))


def draw(
    x: torch.Tensor,
    requests: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    thresholds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token ids [rows] i64.

    x: [rows, vocab] f32, bf16 or fp16 logits, already divided by the temperature, each row contiguous.
    requests: [rows] integer, where a row's request stands in temperatures (f32, 0: greedy, no noise) and seeds (i64).
    positions: [rows] integer, absolute. thresholds: [rows] i64 as select.thresholds gives them; None keeps all tokens.
    """
    rows, vocab = x.shape
    lanes = LANES // 4 if rows <= FEW_ROWS else LANES
    slices = triton.cdiv(vocab, 4 * lanes)
    best = x.new_empty((rows, slices), dtype=torch.int64)
    out = x.new_empty(rows, dtype=torch.int64)
    if rows:
        _draw_slice[(rows, slices)](
            x, x.stride(0), thresholds, requests.contiguous(), temperatures, seeds, positions.contiguous(), best, vocab,
            slices, LANES=lanes, enable_fp_fusion=False, num_warps=8,
        )  # fmt: skip
        _draw_row[(rows,)](best, out, slices, SLICES_PAD=triton.next_power_of_2(slices), num_warps=1)
    return out
