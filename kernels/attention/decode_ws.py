"""Decode on Hopper: persistent programs, a producer warp that never waits for arithmetic, four warps that compute
(Gluon).

The producer streams the K tiles and then the V tiles of split after split, piece after piece, through one ring of
shared memory, by TMA. The other warps take a whole split at once: the scores of its tiles, their maxima, exponentials
and row sums side by side (one exchange between warps instead of one per tile), then P V tile by tile, in the tree's
order.

Tiles are loaded whole: slots of a sequence's last page beyond its end must hold finite values (they are multiplied by
0).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

__all__ = ["TILES", "decode_ws"]

TILES = 4  # of a split, side by side


@gluon.jit
def _scores(
    t: gl.constexpr, n, i, q, tiles, full, free, position, split, tanh_scale, T: gl.constexpr, S: gl.constexpr,
    STAGES: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Steps 1 and 2 for tile t of n; [16, T]. i: how many tiles the ring has carried before this split."""
    x = gl.full([16, T], float("-inf"), gl.float32, MMA)
    if t < n:
        stage = (i + t) % STAGES
        mbarrier.wait(full.index(stage), ((i + t) // STAGES) & 1)
        k = tiles.index(stage).permute((1, 0)).load(gl.DotOperandLayout(1, MMA, 2))
        x = mma_v2(q, k, gl.zeros([16, T], gl.float32, MMA))
        gl.thread_barrier()
        mbarrier.arrive(free.index(stage), count=1)
        if SOFTCAP:
            x = 1.0 - gl.div_rn(gl.full([16, T], 2.0, gl.float32, MMA), gl.exp2(x * tanh_scale) + 1.0)
        key = split * S + t * T + gl.arange(0, T, gl.SliceLayout(0, MMA))
        ahead = position[:, None] - key[None, :]
        seen = ahead >= 0
        if WINDOW > 0:
            seen = seen & (ahead < WINDOW)
        x = gl.where(seen, x, float("-inf"))
    return x


@gluon.jit
def _weights(x, m, top, c, T: gl.constexpr, MMA: gl.constexpr):
    """Step 4: (p, alpha)."""
    base = gl.where(top == float("-inf"), 0.0, top)
    zero = gl.zeros([16, T], gl.float32, MMA)
    return gl.exp2(gl.fma(x, zero + c, zero + (-base)[:, None])), gl.exp2(m - base)


@gluon.jit
def _side_by_side(a, b, c, d):
    return gl.join(gl.join(a, b), gl.join(c, d))


@gluon.jit
def _apart(x, ROW: gl.constexpr):
    """The four tiles' values of a row, from [16, 2, 2]."""
    left, right = gl.split(x)
    a, b = gl.split(left)
    c, d = gl.split(right)
    return (
        gl.convert_layout(a, ROW), gl.convert_layout(b, ROW), gl.convert_layout(c, ROW), gl.convert_layout(d, ROW),
    )  # fmt: skip


@gluon.jit
def _add(t: gl.constexpr, n, i, p_tiles, tiles, full, free, alpha, acc, STAGES: gl.constexpr, MMA: gl.constexpr):
    """Step 6 for tile t of n: acc. The split's V tiles follow its n K tiles in the ring."""
    if t < n:
        stage = (i + n + t) % STAGES
        if t > 0:
            acc = acc * alpha[:, None]
        p = p_tiles.index(t).load(gl.DotOperandLayout(0, MMA, 2))
        mbarrier.wait(full.index(stage), ((i + n + t) // STAGES) & 1)
        v = tiles.index(stage).load(gl.DotOperandLayout(1, MMA, 2))
        acc = mma_v2(p, v, acc)
        gl.thread_barrier()
        mbarrier.arrive(free.index(stage), count=1)
    return acc


@gluon.jit
def _merge(M, L, A, m, l, acc, D: gl.constexpr, MMA: gl.constexpr):
    """Step 7."""
    top = gl.maximum(M, m)
    base = gl.where(top == float("-inf"), 0.0, top)
    a = gl.exp2(M - base)
    b = gl.exp2(m - base)
    L = gl.fma(L, a, l * b)
    A = gl.fma(A, a[:, None] + gl.zeros([16, D], gl.float32, MMA), acc * b[:, None])
    return top, L, A


@gluon.jit
def _keep(STATE, ACC, row, d, real, m, l, acc, D: gl.constexpr):
    gl.store(STATE + row * 2, m, mask=real)
    gl.store(STATE + row * 2 + 1, l, mask=real)
    gl.store(ACC + (row * D)[:, None] + d[None, :], acc, mask=real[:, None])


@gluon.jit
def _consume(
    Q, O, SINKS, STATE, ACC, PIECES, QUERY_START, KV_LEN, tiles, full, free, p_tiles, items, c, tanh_scale, log2e,
    q_token,
    o_token, GROUP: gl.constexpr, Q_HEADS: gl.constexpr, D: gl.constexpr, T: gl.constexpr, S: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINK: gl.constexpr, FEW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    KV_HEADS: gl.constexpr = Q_HEADS // GROUP
    i = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        entry = PIECES + item // KV_HEADS * 4
        kv = item % KV_HEADS
        b = gl.load(entry)
        first = gl.load(entry + 1)
        end = gl.load(entry + 2)
        slot = gl.load(entry + 3)
        start = gl.load(QUERY_START + b)
        queries = gl.load(QUERY_START + b + 1) - start
        keys = gl.load(KV_LEN + b)
        r = gl.arange(0, 16, gl.SliceLayout(1, LOAD))
        at = (start + r // GROUP).to(gl.int64) * q_token + (kv * GROUP + r % GROUP) * D
        column = gl.arange(0, D, gl.SliceLayout(0, LOAD))
        q = gl.load(Q + at[:, None] + column[None, :], mask=(r // GROUP < queries)[:, None], other=0.0)
        q = gl.convert_layout(q, gl.DotOperandLayout(0, MMA, 2))
        r = gl.arange(0, 16, ROW)
        token = r // GROUP
        head = kv * GROUP + r % GROUP
        real = token < queries
        position = keys - queries + token
        d = gl.arange(0, D, gl.SliceLayout(0, MMA))
        none = gl.full([16], float("-inf"), gl.float32, ROW)
        M = none
        L = gl.zeros([16], gl.float32, ROW)
        A = gl.zeros([16, D], gl.float32, MMA)
        for s in range(first, end):
            n = gl.minimum((keys - s * S + T - 1) // T, S // T)
            x0 = _scores(0, n, i, q, tiles, full, free, position, s, tanh_scale, T, S, STAGES, WINDOW, SOFTCAP, MMA)
            x1 = _scores(1, n, i, q, tiles, full, free, position, s, tanh_scale, T, S, STAGES, WINDOW, SOFTCAP, MMA)
            x2 = _scores(2, n, i, q, tiles, full, free, position, s, tanh_scale, T, S, STAGES, WINDOW, SOFTCAP, MMA)
            x3 = _scores(3, n, i, q, tiles, full, free, position, s, tanh_scale, T, S, STAGES, WINDOW, SOFTCAP, MMA)
            # Step 3: a maximum has no order, so those of the four tiles are taken together.
            t0, t1, t2, t3 = _apart(gl.max(_side_by_side(x0, x1, x2, x3), 1), ROW)
            t0 = t0 * c
            t1 = gl.maximum(t0, t1 * c)
            t2 = gl.maximum(t1, t2 * c)
            t3 = gl.maximum(t2, t3 * c)
            p0, alpha0 = _weights(x0, none, t0, c, T, MMA)
            p1, alpha1 = _weights(x1, t0, t1, c, T, MMA)
            p2, alpha2 = _weights(x2, t1, t2, c, T, MMA)
            p3, alpha3 = _weights(x3, t2, t3, c, T, MMA)
            p_tiles.index(0).store(p0.to(Q.dtype.element_ty))
            p_tiles.index(1).store(p1.to(Q.dtype.element_ty))
            p_tiles.index(2).store(p2.to(Q.dtype.element_ty))
            p_tiles.index(3).store(p3.to(Q.dtype.element_ty))
            y = _side_by_side(p0, p1, p2, p3)
            for level in gl.static_range(8):
                if (T >> level) > 1:
                    y = gl.sum(y.reshape([16, 2, T >> (level + 1), 2, 2]), 1)
            r0, r1, r2, r3 = _apart(y.reshape([16, 2, 2]), ROW)
            l = gl.fma(gl.fma(gl.fma(r0, alpha1, r1), alpha2, r2), alpha3, r3)
            acc = gl.zeros([16, D], gl.float32, MMA)
            acc = _add(0, n, i, p_tiles, tiles, full, free, alpha0, acc, STAGES, MMA)
            acc = _add(1, n, i, p_tiles, tiles, full, free, alpha1, acc, STAGES, MMA)
            acc = _add(2, n, i, p_tiles, tiles, full, free, alpha2, acc, STAGES, MMA)
            acc = _add(3, n, i, p_tiles, tiles, full, free, alpha3, acc, STAGES, MMA)
            i += 2 * n
            if slot < 0:
                M, L, A = _merge(M, L, A, t3, l, acc, D, MMA)
            else:
                kept = ((slot + s - first) * FEW + token).to(gl.int64) * Q_HEADS + head
                _keep(STATE, ACC, kept, d, real, t3, l, acc, D)
        if slot == -1:
            if SINK:
                one = gl.full([16], 1.0, gl.float32, ROW)
                sink = gl.load(SINKS + head) * log2e
                M, L, A = _merge(M, L, A, sink, one, gl.zeros([16, D], gl.float32, MMA), D, MMA)
            inverse = gl.where(L == 0.0, 0.0, gl.div_rn(gl.full([16], 1.0, gl.float32, ROW), L))
            zero = gl.zeros([16, D], gl.float32, MMA)
            o = gl.fma(A, inverse[:, None] + zero, zero)
            to = (start + token).to(gl.int64) * o_token + head * D
            gl.store(O + to[:, None] + d[None, :], o.to(O.dtype.element_ty), mask=real[:, None])
        elif slot < -1:
            kept = ((-2 - slot) * FEW + token).to(gl.int64) * Q_HEADS + head
            _keep(STATE, ACC, kept, d, real, M, L, A, D)


@gluon.jit
def _fetch(tensor, tiles, full, free, i, row, column, T: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    stage = i % STAGES
    mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), T * D * 2)
    tma.async_copy_global_to_shared(tensor, [row, column], full.index(stage), tiles.index(stage))


@gluon.jit
def _produce(
    K, V, PIECES, QUERY_START, KV_LEN, PAGE_TABLE, tiles, full, free, items, bt_stride, row_page, row_head, column_head,
    KV_HEADS: gl.constexpr, D: gl.constexpr, T: gl.constexpr, S: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    i = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        entry = PIECES + item // KV_HEADS * 4
        kv = item % KV_HEADS
        b = gl.load(entry)
        first = gl.load(entry + 1)
        end = gl.load(entry + 2)
        keys = gl.load(KV_LEN + b)
        pages = PAGE_TABLE + b.to(gl.int64) * bt_stride
        for s in range(first, end):
            n = gl.minimum((keys - s * S + T - 1) // T, S // T)
            for t in range(0, n):
                key = s * S + t * T
                row = gl.load(pages + key // PAGE) * row_page + kv * row_head + key % PAGE
                _fetch(K, tiles, full, free, i, row, kv * column_head, T, D, STAGES)
                i += 1
            for t in range(0, n):
                key = s * S + t * T
                row = gl.load(pages + key // PAGE) * row_page + kv * row_head + key % PAGE
                _fetch(V, tiles, full, free, i, row, kv * column_head, T, D, STAGES)
                i += 1


@gluon.jit(do_not_specialize=["bt_stride"])
def decode_ws(
    Q, K, V, O, SINKS, STATE, ACC, PIECES, COUNTS, QUERY_START, KV_LEN, PAGE_TABLE, c, tanh_scale, log2e, bt_stride,
    q_token,
    o_token, row_page, row_head, column_head, GROUP: gl.constexpr, Q_HEADS: gl.constexpr, D: gl.constexpr,
    T: gl.constexpr, S: gl.constexpr, PAGE: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
    SINK: gl.constexpr, FEW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: one program per multiprocessor; each takes every so many of (piece, KV head). K and V are descriptors of
    rows of slots; the rest as decode's. FEW * GROUP is at most 16."""
    KV_HEADS: gl.constexpr = Q_HEADS // GROUP
    items = gl.load(COUNTS) * KV_HEADS
    tiles = gl.allocate_shared_memory(K.dtype, [STAGES, T, D], K.layout)
    p_tiles = gl.allocate_shared_memory(K.dtype, [4, 16, T], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (Q, O, SINKS, STATE, ACC, PIECES, QUERY_START, KV_LEN, tiles, full, free, p_tiles, items, c,
            tanh_scale,
                        log2e, q_token, o_token, GROUP, Q_HEADS, D, T, S, WINDOW, SOFTCAP, SINK, FEW, STAGES)),
            (_produce, (K, V, PIECES, QUERY_START, KV_LEN, PAGE_TABLE, tiles, full, free, items, bt_stride, row_page,
            row_head,
                        column_head, KV_HEADS, D, T, S, PAGE, STAGES)),
        ],
        [1],
        [40],
    )  # fmt: skip
