"""Decode: few query tokens on a long context. One program walks a piece for one KV head: a run of splits, then perhaps
one of those of double length.

A program whose piece begins the sequence merges its first run in registers as it goes; of all other splits each one's
(m, l, acc) is left in scratch, and `combine` merges those in ascending order after it. Where a sequence is one piece,
there is nothing to combine. All of it is the tree of tree.py, whatever the pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .arithmetic import (
    _INTERPRETED,
    accumulate,
    alibi,
    ends_split,
    finish,
    first_tile,
    halves,
    merge,
    merge_scales,
    row_sum,
    softcap,
    split_of,
    weigh,
    within,
)

__all__ = ["combine", "decode"]


@triton.jit
def _keep(STATE, ACC, row, d, real, m, l, acc, WIDTH: tl.constexpr):
    tl.store(STATE + row * 2, m, mask=real)
    tl.store(STATE + row * 2 + 1, l, mask=real)
    tl.store(ACC + ((row * WIDTH)[:, None] + d[None, :]), acc, mask=real[:, None])


@triton.jit
def _tile(begin, i, run, jump, UNTIL: tl.constexpr):
    """The i-th tile of a piece: its first run has `run` from `begin` on, the second is `jump` behind that."""
    j = begin + i
    if UNTIL > 0:
        j += tl.where(i < run, 0, jump)
    return j


@triton.jit(do_not_specialize=["bt_stride", "few"])
def decode(
    Q, K, V, K_TILES, V_TILES, O, SINKS, STATE, ACC, PIECES, COUNTS, PAGE_TABLE, c, tanh_scale,
    log2e, bt_stride, q_token, o_token, kv_page, kv_slot, kv_head, row_page, row_head, column_head, SLOPES,
    slope_scale, v_scale, few,
    GROUP: tl.constexpr, Q_HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    STEADY: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr,
    ALIBI: tl.constexpr, E4M3: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: KV heads (side by side: in memory a slot's heads are neighbours), pieces, blocks of ROWS rows (token, head
    of the group).

    Q, O: [tokens, heads, D]. K, V: pages of [slot, KV head, D] by strides in elements; K_TILES, V_TILES: the same as
    rows of slots, for TMA. STATE: [slots * few * heads, 2] m and l; ACC: [slots * few * heads, WIDTH].
    """
    if PDL:
        gdc_launch_dependents()  # combine may be launched; it waits for the end of this grid
    kv = tl.program_id(0)
    piece = tl.program_id(1)
    if piece < tl.load(COUNTS):
        PER: tl.constexpr = S // T
        UNTIL: tl.constexpr = STEADY // T
        this = PIECES + piece * 16
        b = tl.load(this)
        first = tl.load(this + 1)
        end = tl.load(this + 2)
        slot = tl.load(this + 3)
        start = tl.load(this + 4)
        queries = tl.load(this + 5)
        keys = tl.load(this + 6)
        kept_first = tl.load(this + 7)
        if tl.program_id(2) * ROWS < queries * GROUP:
            row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
            token = row // GROUP
            head = kv * GROUP + row % GROUP
            real = token < queries
            position = keys - queries + token
            d = tl.arange(0, WIDTH)
            here = within(real, d, D, WIDTH)
            at = (start + token).to(tl.int64)
            q = tl.load(Q + ((at * q_token + head * D)[:, None] + d[None, :]), mask=here, other=0.0)
            pages = PAGE_TABLE + b.to(tl.int64) * bt_stride
            m = tl.full((ROWS,), float("-inf"), tl.float32)
            l = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros(q.shape, tl.float32)
            M = m
            L = l
            A = acc
            slope = m
            if ALIBI:
                slope = tl.load(SLOPES + head) * slope_scale
            last = (keys - 1) // T
            begin = first * PER
            run = tl.minimum(end * PER, last + 1) - begin
            tiles = run
            jump = 0
            if UNTIL > 0:
                more = first_tile(tl.load(this + 8), PER, UNTIL)
                tiles += tl.maximum(tl.minimum(first_tile(tl.load(this + 9), PER, UNTIL), last + 1) - more, 0)
                jump = more - begin - run
            page = tl.load(pages + tl.minimum(_tile(begin, 0, run, jump, UNTIL), last) * T // PAGE)
            for i in tl.range(0, tiles, num_stages=STAGES):
                j = _tile(begin, i, run, jump, UNTIL)
                key = j * T + tl.arange(0, T)
                if TMA:
                    r = page * row_page + kv * row_head + (j * T) % PAGE
                    k = K_TILES.load([r, kv * column_head])
                    v = V_TILES.load([r, kv * column_head])
                else:
                    if PAGE % T == 0:
                        slots = page.to(tl.int64) * kv_page + key % PAGE * kv_slot + kv * kv_head
                    else:
                        of_key = tl.load(pages + key // PAGE, mask=key < keys, other=0)
                        slots = of_key.to(tl.int64) * kv_page + key % PAGE * kv_slot + kv * kv_head
                    held = within(key < keys, d, D, WIDTH)
                    k = tl.load(K + slots[:, None] + d[None, :], mask=held, other=0.0)
                    v = tl.load(V + slots[:, None] + d[None, :], mask=held, other=0.0)
                if E4M3:
                    k = halves(k, q)
                    v = halves(v, q)
                if PAGE % T == 0:
                    page = tl.load(pages + tl.minimum(_tile(begin, i + 1, run, jump, UNTIL), last) * T // PAGE)
                x = tl.dot(q, tl.trans(k))
                if SOFTCAP:
                    x = softcap(x, tanh_scale)
                ahead = position[:, None] - key[None, :]
                if ALIBI:
                    x = alibi(x, slope, ahead)
                seen = ahead >= 0
                if WINDOW > 0:
                    seen = seen & (ahead < WINDOW)
                p, alpha, m = weigh(tl.where(seen, x, float("-inf")), m, c)
                l, acc = accumulate(p, alpha, row_sum(p, ROWS, T), v, l, acc)
                if ends_split(j, PER, UNTIL) or j == last:
                    if (slot == -1) | ((slot < 0) & (i < run)):
                        M, L, A = merge(M, L, A, m, l, acc)
                    else:
                        kept = (kept_first + split_of(j, PER, UNTIL)) * few + token
                        _keep(STATE, ACC, kept.to(tl.int64) * Q_HEADS + head, d, real, m, l, acc, WIDTH)
                    m = tl.full((ROWS,), float("-inf"), tl.float32)
                    l = tl.zeros((ROWS,), tl.float32)
                    acc = tl.zeros(q.shape, tl.float32)
            if slot == -1:
                sink = M
                if SINK:
                    sink = tl.load(SINKS + head) * log2e
                o = finish(M, L, A, sink, v_scale, SINK, E4M3)
                to = O + ((at * o_token + head * D)[:, None] + d[None, :])
                tl.store(to, o.to(O.dtype.element_ty), mask=here)
            elif slot < -1:
                kept = (-2 - slot) * few + token
                _keep(STATE, ACC, kept.to(tl.int64) * Q_HEADS + head, d, real, M, L, A, WIDTH)


@triton.jit
def _kept(P, there):
    """What P points to, zeros unless `there`. Not as Triton's own loads: the time it takes to lay out some dozens of
    them that end in one result grows with their cube, to 10 s of a server's first start."""
    if _INTERPRETED:
        return tl.load(P, mask=there, other=0.0)
    else:
        return tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1];}", "=f,l,r",
            [P.to(tl.int64), there.to(tl.int32)], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _merge_kept(
    M, L, A, STATE, ACC, row, first, end, d, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """(M, L, A) with splits [first, end) of a row, ascending. `row`: where split `first` is kept. All of a batch are on
    their way before the first is merged."""
    zero = tl.zeros((WIDTH,), tl.float32)
    for split in tl.range(first, end, BATCH):
        batch = ()
        for i in tl.static_range(BATCH):
            at = row + i * STRIDE
            there = split + i < end  # past the end -inf and zeros, which change nothing
            m = tl.load(STATE + at * 2, mask=there, other=float("-inf"))
            l = tl.load(STATE + at * 2 + 1, mask=there, other=0.0)
            # A mask as wide as d: Triton's interpreter cannot broadcast a truth value.
            batch += ((m, l, _kept(ACC + at * WIDTH + d, d * 0 + split + i < end)),)
        for i in tl.static_range(BATCH):
            m, l, acc = batch[i]
            M, a, b = merge_scales(M, m)
            L = tl.fma(L, a, l * b)
            A = tl.fma(A, zero + a, acc * b)
        row += BATCH * STRIDE
    return M, L, A


@triton.jit
def combine(
    O, SINKS, STATE, ACC, SEQUENCES, log2e, o_token, v_scale,
    Q_HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, E4M3: tl.constexpr,
    FEW: tl.constexpr, BATCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: sequences, programs that share a sequence's rows (query token, head); a thread per element. The first slot
    holds a merge already; splits ascending after it."""
    sequence = tl.program_id(0)
    slot = tl.load(SEQUENCES + sequence * 8)
    merged = tl.load(SEQUENCES + sequence * 8 + 1)
    splits = tl.load(SEQUENCES + sequence * 8 + 2)
    start = tl.load(SEQUENCES + sequence * 8 + 3)
    queries = tl.load(SEQUENCES + sequence * 8 + 4)
    if PDL:
        gdc_wait()  # in every program: what follows combine must not begin before decode has ended
    rows = tl.where(slot >= 0, queries * Q_HEADS, 0)
    d = tl.arange(0, WIDTH)
    zero = tl.zeros((WIDTH,), tl.float32)
    for place in range(tl.program_id(1), rows, tl.num_programs(1)):
        row = slot.to(tl.int64) * (FEW * Q_HEADS) + place
        M = tl.load(STATE + row * 2)
        L = tl.load(STATE + row * 2 + 1)
        A = tl.load(ACC + row * WIDTH + d)
        row += FEW * Q_HEADS
        # A row waits for memory once a batch, so many splits come in large ones; few would have to wait for more code.
        STRIDE: tl.constexpr = FEW * Q_HEADS
        MANY: tl.constexpr = 4 * BATCH
        by_many = tl.minimum(splits, merged + (splits - merged + BATCH) // MANY * MANY)
        M, L, A = _merge_kept(M, L, A, STATE, ACC, row, merged, by_many, d, WIDTH, STRIDE, MANY)
        row += (by_many - merged).to(tl.int64) * STRIDE
        M, L, A = _merge_kept(M, L, A, STATE, ACC, row, by_many, splits, d, WIDTH, STRIDE, BATCH)
        head = place % Q_HEADS
        if SINK:
            M, a, b = merge_scales(M, tl.load(SINKS + head) * log2e)
            L = tl.fma(L, a, b)
            A = tl.fma(A, zero + a, zero * b)
        if E4M3:
            inverse = tl.where(L == 0.0, 0.0, tl.math.div_rn(v_scale, L))
        else:
            inverse = tl.where(L == 0.0, 0.0, tl.math.div_rn(1.0, L))
        o = tl.fma(A, zero + inverse, zero)
        at = (start + place // Q_HEADS).to(tl.int64)
        to = O + at * o_token + head * D + d
        if WIDTH > D:
            tl.store(to, o.to(O.dtype.element_ty), mask=d < D)
        else:
            tl.store(to, o.to(O.dtype.element_ty))
