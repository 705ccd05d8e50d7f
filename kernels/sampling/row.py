"""What a row of logits is compared and added up by: integers, so that no order of summation is left to choose.

Two integers stand for a logit. Its *rank*: the float's order and the token id in one number, so no two are equal and
the lower token id wins a tie. Its *mass*: exp(logit - top) in units of 2^-44. Sums, maxima and counts of integers are
the same in every order, by any number of programs, with atomics: what follows from them is a property of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["MASS_BITS", "MOST_TOKENS", "TOKEN_BITS", "clean", "logit_of", "mass_of", "rank_of", "token_of"]

TOKEN_BITS = 20
MOST_TOKENS = 1 << 18  # 2^18 masses of up to 2^44 fit into 63 bits
MASS_BITS = 44

_TOKENS = tl.constexpr((1 << TOKEN_BITS) - 1)
_SHIFT = tl.constexpr(TOKEN_BITS)
_UNIT = tl.constexpr(float(1 << MASS_BITS))


@triton.jit
def clean(x):
    """A logit as f32. NaN counts as -inf, and both zeros as one."""
    x = x.to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def rank_of(x, token):
    """i64 in [0, 2^52) of a clean logit."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the integers of negative floats count downwards
    return ((key.to(tl.int64) + 0x80000000) << _SHIFT) | (token.to(tl.int64) ^ _TOKENS)


@triton.jit
def token_of(rank):
    return (rank & _TOKENS) ^ _TOKENS


@triton.jit
def logit_of(rank):
    key = ((rank >> _SHIFT) - 0x80000000).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(x, top):
    """i64, truncated. `top`: the row's largest logit. A subtraction, an exp, a product: nothing that could fuse."""
    return (tl.exp(tl.where(x == top, 0.0, x - top)) * _UNIT).to(tl.int64)
