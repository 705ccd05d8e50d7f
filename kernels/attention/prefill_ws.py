"""Prefill on Hopper: a producer warp brings tiles by TMA, two warp groups of 64 query tokens compute (Gluon).

The scores of tile j are computed while tile j - 1's product with V still runs, so an accumulator is one tile behind its
maximum. Loops are nested, splits outside: between two splits a warp group merges into A, which lives in shared memory.

Tiles are loaded whole: slots of a sequence's last page beyond its end must hold finite values (they are multiplied by
0).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["TOKENS", "prefill_ws"]

TOKENS = 128  # query tokens of one program: two warp groups of 64


@gluon.jit
def _merge(M, L, A, m, l, acc, D: gl.constexpr, OUT: gl.constexpr):
    """Step 7 of the tree."""
    top = gl.maximum(M, m)
    base = gl.where(top == float("-inf"), 0.0, top)
    a = gl.exp2(M - base)
    b = gl.exp2(m - base)
    L = gl.fma(L, a, l * b)
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    wide = gl.convert_layout(a, ROW)[:, None] + gl.zeros([64, D], gl.float32, OUT)
    A = gl.fma(A, wide, acc * gl.convert_layout(b, ROW)[:, None])
    return top, L, A


@gluon.jit
def _weigh(
    x, j, m, position, c, tanh_scale, MASK: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, T: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """Steps 1 to 5 after the product: (p, alpha, r, the new m)."""
    if SOFTCAP:
        x = 1.0 - gl.div_rn(gl.full([64, T], 2.0, gl.float32, SCORES), gl.exp2(x * tanh_scale) + 1.0)
    if MASK:
        key = j * T + gl.arange(0, T, gl.SliceLayout(0, SCORES))
        ahead = position[:, None] - key[None, :]
        seen = ahead >= 0
        if WINDOW > 0:
            seen = seen & (ahead < WINDOW)
        x = gl.where(seen, x, float("-inf"))
    top = gl.maximum(m, gl.max(x, 1) * c)
    base = gl.where(top == float("-inf"), 0.0, top)
    zero = gl.zeros([64, T], gl.float32, SCORES)
    p = gl.exp2(gl.fma(x, zero + c, zero + (-base)[:, None]))
    y = p
    for level in gl.static_range(8):
        if (T >> level) > 1:
            y = gl.sum(y.reshape([64, 2, T >> (level + 1)]), 1)
    r = gl.convert_layout(y.reshape([64]), gl.SliceLayout(1, SCORES))
    return p, gl.exp2(m - base), r, top


@gluon.jit
def _step(
    i, j, q, ring, p, m, l, acc, M, L, a_buffer, starts, position, c, tanh_scale, MASK: gl.constexpr,
    SPLITS: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, D: gl.constexpr, T: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Scores of tile j, the i-th of this program, beside P V of the tile before.

    SPLITS: 0 where tile j continues its split, 1 where it starts one, 2 where `starts` tells."""
    k_tiles, v_tiles, k_full, k_free, v_full, v_free = ring
    stage = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    zero = gl.zeros([64, T], gl.float32, SCORES)
    x = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
    x = warpgroup_mma_wait(1, deps=[x])
    mbarrier.arrive(k_free.index(stage), count=1)
    fresh = gl.full_like(m, float("-inf"))
    if SPLITS == 1:
        old = fresh
    elif SPLITS == 2:
        old = gl.where(starts, fresh, m)
    else:
        old = m
    weights, alpha, r, top = _weigh(x, j, old, position, c, tanh_scale, MASK, WINDOW, SOFTCAP, T, SCORES)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_free.index(before), count=1)
    if SPLITS == 1:
        M, L, A = _merge(M, L, a_buffer.load(OUT), m, l, acc, D, OUT)
        a_buffer.store(A)
        l = r
        acc = gl.zeros([64, D], gl.float32, OUT)
    else:
        if SPLITS == 2:
            if starts:
                M, L, A = _merge(M, L, a_buffer.load(OUT), m, l, acc, D, OUT)
                a_buffer.store(A)
                l = gl.zeros_like(l)
                acc = gl.zeros([64, D], gl.float32, OUT)
        l = gl.fma(l, alpha, r)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, OUT, 2))
    return p, top, l, acc, M, L


@gluon.jit
def _consume(
    half: gl.constexpr, q_tiles, a_tiles, ring, q_full, O, SINKS, at, bounds, head, c, tanh_scale, log2e, o_token,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINK: gl.constexpr, D: gl.constexpr, T: gl.constexpr,
    S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    PER: gl.constexpr = S // T
    k_tiles, v_tiles, k_full, k_free, v_full, v_free = ring
    start, queries, keys, first = at
    begin, plain, end = bounds
    position = keys - queries + first + half * 64 + gl.arange(0, 64, ROW)
    m = gl.full([64], float("-inf"), gl.float32, ROW)
    M = m
    L = gl.zeros([64], gl.float32, ROW)
    acc = gl.zeros([64, D], gl.float32, OUT)
    a_buffer = a_tiles.index(half)
    a_buffer.store(acc)
    q = q_tiles.index(half)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    zero = gl.zeros([64, T], gl.float32, SCORES)
    x = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    x = warpgroup_mma_wait(0, deps=[x])
    mbarrier.arrive(k_free.index(0), count=1)
    weights, _alpha, l, m = _weigh(x, begin, m, position, c, tanh_scale, True, WINDOW, SOFTCAP, T, SCORES)
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, OUT, 2))
    # Tiles that every row sees whole: to the end of the first split, then split by split.
    stop = gl.minimum((begin // PER + 1) * PER, plain)
    for j in range(begin + 1, stop):
        p, m, l, acc, M, L = _step(
            j - begin, j, q, ring, p, m, l, acc, M, L, a_buffer, False, position, c, tanh_scale, False, 0, WINDOW,
            SOFTCAP,
            D, T, STAGES, SCORES, OUT,
        )  # fmt: skip
    for split in range(begin // PER + 1, (plain + PER - 1) // PER):
        p, m, l, acc, M, L = _step(
            split * PER - begin, split * PER, q, ring, p, m, l, acc, M, L, a_buffer, True, position, c, tanh_scale,
            False, 1,
            WINDOW, SOFTCAP, D, T, STAGES, SCORES, OUT,
        )  # fmt: skip
        for j in range(split * PER + 1, gl.minimum((split + 1) * PER, plain)):
            p, m, l, acc, M, L = _step(
                j - begin, j, q, ring, p, m, l, acc, M, L, a_buffer, False, position, c, tanh_scale, False, 0, WINDOW,
                SOFTCAP, D, T, STAGES, SCORES, OUT,
            )  # fmt: skip
    for j in range(gl.maximum(plain, begin + 1), end):
        p, m, l, acc, M, L = _step(
            j - begin, j, q, ring, p, m, l, acc, M, L, a_buffer, j % PER == 0, position, c, tanh_scale, True, 2, WINDOW,
            SOFTCAP, D, T, STAGES, SCORES, OUT,
        )  # fmt: skip
    last = end - 1 - begin
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(last % STAGES), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    M, L, A = _merge(M, L, a_buffer.load(OUT), m, l, acc, D, OUT)
    if SINK:
        sink = gl.zeros([64], gl.float32, ROW) + gl.load(SINKS + head) * log2e
        one = gl.full([64], 1.0, gl.float32, ROW)
        M, L, A = _merge(M, L, A, sink, one, gl.zeros([64, D], gl.float32, OUT), D, OUT)
    inverse = gl.where(L == 0.0, 0.0, gl.div_rn(gl.full([64], 1.0, gl.float32, ROW), L))
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, OUT))[:, None]
    none = gl.zeros([64, D], gl.float32, OUT)
    o = gl.fma(A, inverse + none, none)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    if O.dtype.element_ty == gl.float32:
        a_buffer.store(o)
        out = a_buffer.load(STORE)
    else:
        q.store(o.to(O.dtype.element_ty))
        out = q.load(STORE)
    token = first + half * 64 + gl.arange(0, 64, gl.SliceLayout(1, STORE))
    d = gl.arange(0, D, gl.SliceLayout(0, STORE))
    to = ((start + token).to(gl.int64) * o_token + head * D)[:, None] + d[None, :]
    gl.store(O + to, out, mask=(token < queries)[:, None])


@gluon.jit
def _consume_low(
    q_tiles, a_tiles, ring, q_full, O, SINKS, at, bounds, head, c, tanh_scale, log2e, o_token, WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr, SINK: gl.constexpr, D: gl.constexpr, T: gl.constexpr, S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _consume(
        0, q_tiles, a_tiles, ring, q_full, O, SINKS, at, bounds, head, c, tanh_scale, log2e, o_token, WINDOW, SOFTCAP,
        SINK, D, T, S, STAGES,
    )  # fmt: skip


@gluon.jit
def _consume_high(
    q_tiles, a_tiles, ring, q_full, O, SINKS, at, bounds, head, c, tanh_scale, log2e, o_token, WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr, SINK: gl.constexpr, D: gl.constexpr, T: gl.constexpr, S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _consume(
        1, q_tiles, a_tiles, ring, q_full, O, SINKS, at, bounds, head, c, tanh_scale, log2e, o_token, WINDOW, SOFTCAP,
        SINK, D, T, S, STAGES,
    )  # fmt: skip


@gluon.jit
def _produce(
    Q, K, V, q_tiles, ring, q_full, pages, q_row, q_column, kv_row, kv_column, row_page, bounds, D: gl.constexpr,
    T: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    k_tiles, v_tiles, k_full, k_free, v_full, v_free = ring
    begin, _plain, end = bounds
    mbarrier.expect(q_full, 2 * 64 * D * 2)
    tma.async_copy_global_to_shared(Q, [q_row, q_column], q_full, q_tiles.index(0))
    tma.async_copy_global_to_shared(Q, [q_row + 64, q_column], q_full, q_tiles.index(1))
    page = gl.load(pages + begin * T // PAGE)
    for j in range(begin, end):
        stage = (j - begin) % STAGES
        phase = (((j - begin) // STAGES) & 1) ^ 1
        row = page * row_page + kv_row + (j * T) % PAGE
        page = gl.load(pages + gl.minimum(j + 1, end - 1) * T // PAGE)
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_full.index(stage), T * D * 2)
        tma.async_copy_global_to_shared(K, [row, kv_column], k_full.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_full.index(stage), T * D * 2)
        tma.async_copy_global_to_shared(V, [row, kv_column], v_full.index(stage), v_tiles.index(stage))


@gluon.jit(do_not_specialize=["bt_stride"])
def prefill_ws(
    Q, K, V, O, SINKS, BLOCKS, COUNTS, QUERY_START, KV_LEN, PAGE_TABLE, c, tanh_scale, log2e, bt_stride, o_token,
    row_page,
    row_head, column_head, GROUP: gl.constexpr, D: gl.constexpr, T: gl.constexpr, S: gl.constexpr, PAGE: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: blocks of 128 query tokens, query heads. Q, K, V are descriptors: rows of tokens and of slots."""
    block = gl.program_id(0)
    head = gl.program_id(1)
    if block < gl.load(COUNTS + 1):
        b = gl.load(BLOCKS + block * 2)
        first = gl.load(BLOCKS + block * 2 + 1)
        start = gl.load(QUERY_START + b)
        queries = gl.load(QUERY_START + b + 1) - start
        keys = gl.load(KV_LEN + b)
        oldest = keys - queries + first
        end = (keys - queries + gl.minimum(first + 128, queries) - 1) // T + 1
        if WINDOW > 0:
            begin = gl.maximum(oldest - WINDOW + 1, 0) // T
            plain = begin
        else:
            begin = 0 * oldest
            plain = (oldest + 1) // T
        kv = head // GROUP
        q_tiles = gl.allocate_shared_memory(Q.dtype, [2, 64, D], Q.layout)
        k_tiles = gl.allocate_shared_memory(K.dtype, [STAGES, T, D], K.layout)
        v_tiles = gl.allocate_shared_memory(V.dtype, [STAGES, T, D], V.layout)
        a_tiles = gl.allocate_shared_memory(gl.float32, [2, 64, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        mbarrier.init(q_full, count=1)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=1)
            mbarrier.init(v_full.index(i), count=1)
            mbarrier.init(k_free.index(i), count=2)
            mbarrier.init(v_free.index(i), count=2)
        fence_async_shared()
        ring = (k_tiles, v_tiles, k_full, k_free, v_full, v_free)
        at = (start, queries, keys, first)
        bounds = (begin, plain, end)
        gl.warp_specialize(
            [
                (_consume_low, (q_tiles, a_tiles, ring, q_full, O, SINKS, at, bounds, head, c, tanh_scale, log2e,
                o_token,
                                WINDOW, SOFTCAP, SINK, D, T, S, STAGES)),
                (_consume_high, (q_tiles, a_tiles, ring, q_full, O, SINKS, at, bounds, head, c, tanh_scale, log2e,
                o_token,
                                 WINDOW, SOFTCAP, SINK, D, T, S, STAGES)),
                (_produce, (Q, K, V, q_tiles, ring, q_full, PAGE_TABLE + b.to(gl.int64) * bt_stride, start + first,
                head * D,
                            kv * row_head, kv * column_head, row_page, bounds, D, T, PAGE, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
