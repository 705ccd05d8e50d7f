"""Writes new keys and values into their slots, and zeros the values behind a sequence in a page that was just handed
out.

The kernels that load whole tiles multiply the values behind a sequence's end by 0, so those must be finite. A page's
previous owner may have left anything there; the step that writes a page's first slot therefore clears the rest of it.
Keys behind the end need no clearing: their scores are masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_deterministic.kernels.compiled import Compiled, aligned

from .launch import Cache
from .tree import E4M3_MAX

__all__ = ["store"]

_PARTS = 8  # programs that share a page's clearing


@triton.jit
def _quantised(x, scale, MAX: tl.constexpr):
    """What an e4m3 cache holds: divided in fp32, saturated (NaN stays NaN), rounded to nearest even."""
    x = tl.math.div_rn(x.to(tl.float32), tl.zeros(x.shape, tl.float32) + scale)
    x = tl.where(x > MAX, MAX, tl.where(x < -MAX, -MAX, x))
    return x.to(tl.float8e4nv)


@triton.jit(do_not_specialize=["tokens"])
def _store(
    K, V, K_PAGES, V_PAGES, SLOTS, tokens, k_token, v_token, page_stride, slot_stride, head_stride, k_scale, v_scale,
    PAGE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    E4M3: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, PARTS. WIDTH: a power of two that holds a slot's heads."""
    t = tl.program_id(0)
    part = tl.program_id(1)
    slot = tl.load(SLOTS + t).to(tl.int64)
    if slot >= 0:
        e = tl.arange(0, WIDTH)
        mine = e < HEADS * D
        where = slot // PAGE * page_stride + e // D * head_stride + e % D
        at = slot % PAGE
        if part == 0:
            k = tl.load(K + t * k_token + e, mask=mine)
            if E4M3:
                k = _quantised(k, k_scale, MAX)
            tl.store(K_PAGES + where + at * slot_stride, k, mask=mine)
            v = tl.load(V + t * v_token + e, mask=mine)
            if E4M3:
                v = _quantised(v, v_scale, MAX)
            tl.store(V_PAGES + where + at * slot_stride, v, mask=mine)
        # A request's tokens are neighbours, so its page is new if the token `at` places before took the first slot.
        begin = t - at
        following = tl.load(SLOTS + t + 1, mask=t + 1 < tokens, other=-1).to(tl.int64)
        opened = tl.load(SLOTS + tl.maximum(begin, 0)).to(tl.int64)
        if (following != slot + 1) & (begin >= 0) & (opened == slot - at):
            for free in range(at + 1 + part, PAGE, PARTS):
                zero = tl.zeros((WIDTH,), V_PAGES.dtype.element_ty)
                tl.store(V_PAGES + where + free * slot_stride, zero, mask=mine)


_compiled = Compiled(_store)


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: Cache,
    slots: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """key, value: [tokens, kv heads, head size], heads adjacent. slots: [tokens], page * slots per page + slot;
    negative for padding. The tokens of a sequence are neighbours, in order. k_scale, v_scale: of an e4m3 cache."""
    tokens, heads, size = key.shape
    if tokens == 0:
        return
    strides = (key.stride(0), value.stride(0))
    pointers = (key, value, cache.k, cache.v, slots)
    pages = cache.k.stride()
    known = (key.get_device(), key.dtype, cache.k.dtype, slots.dtype, strides, pages, cache.k.shape[1:])
    _compiled.launch(
        known if aligned(*pointers) else None, (tokens, _PARTS, 1), *pointers, tokens, *strides, *pages[:3], k_scale,
        v_scale,
        constants=lambda: {
            "PAGE": cache.k.shape[1], "HEADS": heads, "D": size, "WIDTH": triton.next_power_of_2(heads * size),
            "PARTS": _PARTS, "E4M3": cache.k.dtype == torch.float8_e4m3fn, "MAX": E4M3_MAX,
        },
    )  # fmt: skip
