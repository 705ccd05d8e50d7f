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

__all__ = ["store"]

_PARTS = 8  # programs that share a page's clearing


@triton.jit(do_not_specialize=["tokens"])
def _store(
    K, V, K_PAGES, V_PAGES, SLOTS, tokens, k_token, v_token, page_stride, slot_stride, head_stride,
    PAGE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
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
            tl.store(K_PAGES + where + at * slot_stride, tl.load(K + t * k_token + e, mask=mine), mask=mine)
            tl.store(V_PAGES + where + at * slot_stride, tl.load(V + t * v_token + e, mask=mine), mask=mine)
        # A request's tokens are neighbours, so its page is new if the token `at` places before took the first slot.
        begin = t - at
        following = tl.load(SLOTS + t + 1, mask=t + 1 < tokens, other=-1).to(tl.int64)
        opened = tl.load(SLOTS + tl.maximum(begin, 0)).to(tl.int64)
        if (following != slot + 1) & (begin >= 0) & (opened == slot - at):
            for free in range(at + 1 + part, PAGE, PARTS):
                zero = tl.zeros((WIDTH,), V_PAGES.dtype.element_ty)
                tl.store(V_PAGES + where + free * slot_stride, zero, mask=mine)


_compiled = Compiled(_store)


def store(key: torch.Tensor, value: torch.Tensor, cache: Cache, slots: torch.Tensor) -> None:
    """key, value: [tokens, kv heads, head size], heads adjacent. slots: [tokens], page * slots per page + slot;
    negative for padding. The tokens of a sequence are neighbours, in order."""
    tokens, heads, size = key.shape
    if tokens == 0:
        return
    strides = (key.stride(0), value.stride(0))
    pointers = (key, value, cache.k, cache.v, slots)
    pages = cache.k.stride()
    known = (key.get_device(), key.dtype, slots.dtype, strides, pages, cache.k.shape[1:])
    _compiled.launch(
        known if aligned(*pointers) else None, (tokens, _PARTS, 1), *pointers, tokens, *strides, *pages[:3],
        constants=lambda: {
            "PAGE": cache.k.shape[1], "HEADS": heads, "D": size, "WIDTH": triton.next_power_of_2(heads * size),
            "PARTS": _PARTS,
        },
    )  # fmt: skip
