"""Prefill and chunks: one program per block of query tokens walks the splits of its sequence in order.

For every card, page size and head size; prefill_ws.py is the faster one where it runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import accumulate, alibi, ends_split, finish, halves, merge, row_sum, softcap, weigh, within

__all__ = ["prefill"]


@triton.jit
def _tile(
    j, page, K, V, pages, keys, kv, q, position, m, l, acc, c, tanh_scale, kv_page, kv_slot, kv_head, slope,
    MASK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    key = j * T + tl.arange(0, T)
    d = tl.arange(0, WIDTH)
    if PAGE % T == 0:
        slots = page.to(tl.int64) * kv_page + key % PAGE * kv_slot + kv * kv_head
    else:
        of_key = tl.load(pages + key // PAGE, mask=key < keys, other=0)
        slots = of_key.to(tl.int64) * kv_page + key % PAGE * kv_slot + kv * kv_head
    if MASK or WIDTH > D:
        held = within(key < keys, d, D, WIDTH)
        k = tl.load(K + slots[:, None] + d[None, :], mask=held, other=0.0)
        v = tl.load(V + slots[:, None] + d[None, :], mask=held, other=0.0)
    else:
        k = tl.load(K + slots[:, None] + d[None, :])
        v = tl.load(V + slots[:, None] + d[None, :])
    if E4M3:
        k = halves(k, q)
        v = halves(v, q)
    x = tl.dot(q, tl.trans(k))
    if SOFTCAP:
        x = softcap(x, tanh_scale)
    if ALIBI:
        x = alibi(x, slope, position[:, None] - key[None, :])
    if MASK:
        ahead = position[:, None] - key[None, :]
        seen = ahead >= 0
        if WINDOW > 0:
            seen = seen & (ahead < WINDOW)
        x = tl.where(seen, x, float("-inf"))
    p, alpha, m = weigh(x, m, c)
    l, acc = accumulate(p, alpha, row_sum(p, ROWS, T), v, l, acc)
    return m, l, acc


@triton.jit(do_not_specialize=["bt_stride"])
def prefill(
    Q, K, V, O, SINKS, BLOCKS, COUNTS, PAGE_TABLE, c, tanh_scale, log2e,
    bt_stride, q_token, o_token, kv_page, kv_slot, kv_head, SLOPES, slope_scale, v_scale,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr, S: tl.constexpr, STEADY: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr, ALIBI: tl.constexpr,
    E4M3: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of ROWS query tokens, query heads. Arguments as decode's."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    if block < tl.load(COUNTS + 1):
        b = tl.load(BLOCKS + block * 8)
        start = tl.load(BLOCKS + block * 8 + 1)
        rows = tl.load(BLOCKS + block * 8 + 2)
        oldest = tl.load(BLOCKS + block * 8 + 3)
        keys = oldest + rows
        row = tl.arange(0, ROWS)
        kv = head // GROUP
        real = row < rows
        position = oldest + row
        d = tl.arange(0, WIDTH)
        here = within(real, d, D, WIDTH)
        at = (start + row).to(tl.int64)
        q = tl.load(Q + (at * q_token + head * D)[:, None] + d[None, :], mask=here, other=0.0)
        pages = PAGE_TABLE + b.to(tl.int64) * bt_stride
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        M = m
        L = l
        A = acc
        slope = m
        if ALIBI:
            slope = tl.full((ROWS,), 0.0, tl.float32) + tl.load(SLOPES + head) * slope_scale
        end = (keys - 1) // T + 1
        if WINDOW > 0:
            begin = tl.maximum(oldest - WINDOW + 1, 0) // T
            plain = begin
        else:
            begin = 0
            plain = (oldest + 1) // T
        for j in tl.range(begin, plain, num_stages=STAGES):
            page = tl.load(pages + j * T // PAGE)
            m, l, acc = _tile(
                j, page, K, V, pages, keys, kv, q, position, m, l, acc, c, tanh_scale, kv_page, kv_slot, kv_head,
                slope, False, ROWS, D, WIDTH, T, PAGE, WINDOW, SOFTCAP, ALIBI, E4M3,
            )  # fmt: skip
            if ends_split(j, S // T, STEADY // T):
                M, L, A = merge(M, L, A, m, l, acc)
                m = tl.full((ROWS,), float("-inf"), tl.float32)
                l = tl.zeros((ROWS,), tl.float32)
                acc = tl.zeros((ROWS, WIDTH), tl.float32)
        for j in tl.range(plain, end, num_stages=STAGES if WINDOW > 0 else 1):
            page = tl.load(pages + j * T // PAGE)
            m, l, acc = _tile(
                j, page, K, V, pages, keys, kv, q, position, m, l, acc, c, tanh_scale, kv_page, kv_slot, kv_head,
                slope, True, ROWS, D, WIDTH, T, PAGE, WINDOW, SOFTCAP, ALIBI, E4M3,
            )  # fmt: skip
            if ends_split(j, S // T, STEADY // T):
                M, L, A = merge(M, L, A, m, l, acc)
                m = tl.full((ROWS,), float("-inf"), tl.float32)
                l = tl.zeros((ROWS,), tl.float32)
                acc = tl.zeros((ROWS, WIDTH), tl.float32)
        # The last split; an empty one, where it ended with the loop, changes nothing.
        M, L, A = merge(M, L, A, m, l, acc)
        sink = M
        if SINK:
            sink = tl.full((ROWS,), 0.0, tl.float32) + tl.load(SINKS + head) * log2e
        o = finish(M, L, A, sink, v_scale, SINK, E4M3)
        to = O + (at * o_token + head * D)[:, None] + d[None, :]
        tl.store(to, o.to(O.dtype.element_ty), mask=here)
