"""Prefill on Hopper: persistent programs; a producer warp brings tiles by TMA, two warp groups compute (Gluon).

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

from .arithmetic import ends_split, first_tile, split_of

__all__ = ["TOKENS", "prefill_ws"]

TOKENS = 128  # query tokens of one program: two warp groups of 64
# Hardware barriers of free stages: K's from here on, then V's. Triton takes its own from 0 up.
_FREE = gl.constexpr(10)


@gluon.jit
def _release(stage, kind: gl.constexpr, STAGES: gl.constexpr):
    """A warp group is done with a stage of K (kind 0) or V (1). By a hardware barrier of both groups and the producer's
    warp, on which nobody here waits: before an arrival at an mbarrier Triton would have the group wait for itself."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, 288; mov.b32 $0, $1;", "=r,r", [_FREE + kind * STAGES + stage], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _acquire(i, kind: gl.constexpr, STAGES: gl.constexpr):
    """Waits until both warp groups have released the stage of the producer's i-th tile."""
    if i >= STAGES:  # it was free from the start
        gl.inline_asm_elementwise(
            "bar.sync $1, 288; mov.b32 $0, $1;", "=r,r", [_FREE + kind * STAGES + i % STAGES], gl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


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
def _keep(first, M, L, a_buffer, m, l, acc, D: gl.constexpr, OUT: gl.constexpr):
    """Step 7 with A in shared memory. A first split is kept as it is: there b is 1, or 0 where l and acc are."""
    if first:
        a_buffer.store(acc)
        M = m
        L = l
    else:
        M, L, A = _merge(M, L, a_buffer.load(OUT), m, l, acc, D, OUT)
        a_buffer.store(A)
    return M, L


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
    i, j, q, ring, p, m, l, acc, M, L, a_buffer, starts, first, position, c, tanh_scale, MASK: gl.constexpr,
    SPLITS: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, D: gl.constexpr, T: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Scores of tile j, the i-th of this program, beside P V of the tile before.

    SPLITS: 0 where tile j continues its split, 1 where it starts one, 2 where `starts` tells. first: whether the split
    before it is the block's first."""
    k_tiles, v_tiles, k_full, v_full = ring
    stage = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    zero = gl.zeros([64, T], gl.float32, SCORES)
    x = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
    x = warpgroup_mma_wait(1, deps=[x])
    _release(stage, 0, STAGES)
    fresh = gl.full_like(m, float("-inf"))
    if SPLITS == 1:
        old = fresh
    elif SPLITS == 2:
        old = gl.where(starts, fresh, m)
    else:
        old = m
    weights, alpha, r, top = _weigh(x, j, old, position, c, tanh_scale, MASK, WINDOW, SOFTCAP, T, SCORES)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    _release(before, 1, STAGES)
    if SPLITS == 1:
        M, L = _keep(first, M, L, a_buffer, m, l, acc, D, OUT)
        l = r
        acc = gl.zeros([64, D], gl.float32, OUT)
    else:
        if SPLITS == 2:
            if starts:
                M, L = _keep(first, M, L, a_buffer, m, l, acc, D, OUT)
                l = gl.zeros_like(l)
                acc = gl.zeros([64, D], gl.float32, OUT)
        l = gl.fma(l, alpha, r)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, OUT, 2))
    return p, top, l, acc, M, L


@gluon.jit
def _rounds(items):
    """How many blocks this program takes. Every other round runs backwards, so that shares are even."""
    programs = gl.num_programs(0)
    full = items // programs
    last = gl.where(full % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
    return full + gl.where(last < items % programs, 1, 0)


@gluon.jit
def _item(n, BLOCKS, blocks):
    """(entry in BLOCKS, head) of this program's n-th block. Blocks of one head run side by side: its keys stay in the
    L2 cache."""
    programs = gl.num_programs(0)
    item = n * programs + gl.where(n % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
    return BLOCKS + item % blocks * 8, item // blocks


@gluon.jit
def _block(n, BLOCKS, blocks):
    """(first row, rows, position of the first, head) of this program's n-th block."""
    entry, head = _item(n, BLOCKS, gl.maximum(blocks, 1))
    return gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3), head


@gluon.jit
def _tiles(oldest, rows, T: gl.constexpr, WINDOW: gl.constexpr):
    """(first tile, first that some row sees in part, end) of a block."""
    end = (oldest + rows - 1) // T + 1
    if WINDOW > 0:
        begin = gl.maximum(oldest - WINDOW + 1, 0) // T
        return begin, begin, end
    else:
        return 0 * end, (oldest + 1) // T, end


@gluon.jit
def _consume(
    half: gl.constexpr, q_tiles, a_tiles, ring, q_full, q_free, O, SINKS, BLOCKS, blocks, c, tanh_scale, log2e, o_token,
    HEADS: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINK: gl.constexpr, D: gl.constexpr,
    T: gl.constexpr, S: gl.constexpr, STEADY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    PER: gl.constexpr = S // T
    UNTIL: gl.constexpr = STEADY // T
    k_tiles, v_tiles, k_full, v_full = ring
    a_buffer = a_tiles.index(half)
    o_buffer = a_buffer
    if O.dtype.element_ty.primitive_bitwidth == 16:
        o_buffer = a_buffer._reinterpret(O.dtype.element_ty, [64, D], gl.NVMMASharedLayout(128, 16, 2))
    q = q_tiles.index(half)
    carried = 0  # tiles that the ring has carried before this block
    rounds = _rounds(blocks * HEADS)
    start, rows, oldest, head = _block(0, BLOCKS, blocks)
    for n in range(0, rounds):
        following = _block(gl.minimum(n + 1, rounds - 1), BLOCKS, blocks)  # on its way during this block
        begin, plain, end = _tiles(oldest, rows, T, WINDOW)
        position = oldest + half * 64 + gl.arange(0, 64, ROW)
        m = gl.full([64], float("-inf"), gl.float32, ROW)
        M = m
        L = gl.zeros([64], gl.float32, ROW)
        acc = gl.zeros([64, D], gl.float32, OUT)
        base = carried - begin
        split = split_of(begin, PER, UNTIL)
        mbarrier.wait(q_full, n & 1)
        mbarrier.wait(k_full.index(carried % STAGES), (carried // STAGES) & 1)
        zero = gl.zeros([64, T], gl.float32, SCORES)
        k = k_tiles.index(carried % STAGES).permute((1, 0))
        x = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        x = warpgroup_mma_wait(0, deps=[x])
        _release(carried % STAGES, 0, STAGES)
        weights, _alpha, l, m = _weigh(x, begin, m, position, c, tanh_scale, True, WINDOW, SOFTCAP, T, SCORES)
        p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, OUT, 2))
        # Tiles that every row sees whole: to the end of the first split, then split by split.
        for j in range(begin + 1, gl.minimum(first_tile(split + 1, PER, UNTIL), plain)):
            p, m, l, acc, M, L = _step(
                base + j, j, q, ring, p, m, l, acc, M, L, a_buffer, False, False, position, c, tanh_scale, False, 0,
                WINDOW, SOFTCAP, D, T, STAGES, SCORES, OUT,
            )  # fmt: skip
        for later in range(split + 1, gl.where(plain > 0, split_of(plain - 1, PER, UNTIL) + 1, 0)):
            first = first_tile(later, PER, UNTIL)
            p, m, l, acc, M, L = _step(
                base + first, first, q, ring, p, m, l, acc, M, L, a_buffer, True, later == split + 1, position, c,
                tanh_scale, False, 1, WINDOW, SOFTCAP, D, T, STAGES, SCORES, OUT,
            )  # fmt: skip
            for j in range(first + 1, gl.minimum(first_tile(later + 1, PER, UNTIL), plain)):
                p, m, l, acc, M, L = _step(
                    base + j, j, q, ring, p, m, l, acc, M, L, a_buffer, False, False, position, c, tanh_scale, False, 0,
                    WINDOW, SOFTCAP, D, T, STAGES, SCORES, OUT,
                )  # fmt: skip
        for j in range(gl.maximum(plain, begin + 1), end):
            p, m, l, acc, M, L = _step(
                base + j, j, q, ring, p, m, l, acc, M, L, a_buffer, ends_split(j - 1, PER, UNTIL),
                split_of(j, PER, UNTIL) == split + 1, position, c, tanh_scale, True, 2, WINDOW, SOFTCAP, D, T, STAGES,
                SCORES, OUT,
            )  # fmt: skip
        mbarrier.arrive(q_free, count=1)
        last = base + end - 1
        mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
        acc = warpgroup_mma(p, v_tiles.index(last % STAGES), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        _release(last % STAGES, 1, STAGES)
        carried += end - begin
        if split_of(end - 1, PER, UNTIL) > split:
            m, l, acc = _merge(M, L, a_buffer.load(OUT), m, l, acc, D, OUT)
        if SINK:
            sink = gl.zeros([64], gl.float32, ROW) + gl.load(SINKS + head) * log2e
            one = gl.full([64], 1.0, gl.float32, ROW)
            m, l, acc = _merge(m, l, acc, sink, one, gl.zeros([64, D], gl.float32, OUT), D, OUT)
        inverse = gl.where(l == 0.0, 0.0, gl.div_rn(gl.full([64], 1.0, gl.float32, ROW), l))
        inverse = gl.convert_layout(inverse, gl.SliceLayout(1, OUT))[:, None]
        none = gl.zeros([64, D], gl.float32, OUT)
        o_buffer.store(gl.fma(acc, inverse + none, none).to(O.dtype.element_ty))
        row = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, STORE))
        d = gl.arange(0, D, gl.SliceLayout(0, STORE))
        to = ((start + row).to(gl.int64) * o_token + head * D)[:, None] + d[None, :]
        gl.store(O + to, o_buffer.load(STORE), mask=(row < rows)[:, None])
        start, rows, oldest, head = following


@gluon.jit
def _consume_low(
    q_tiles, a_tiles, ring, q_full, q_free, O, SINKS, BLOCKS, blocks, c, tanh_scale, log2e, o_token,
    HEADS: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINK: gl.constexpr, D: gl.constexpr,
    T: gl.constexpr, S: gl.constexpr, STEADY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _consume(
        0, q_tiles, a_tiles, ring, q_full, q_free, O, SINKS, BLOCKS, blocks, c, tanh_scale, log2e, o_token, HEADS,
        WINDOW, SOFTCAP, SINK, D, T, S, STEADY, STAGES,
    )  # fmt: skip


@gluon.jit
def _consume_high(
    q_tiles, a_tiles, ring, q_full, q_free, O, SINKS, BLOCKS, blocks, c, tanh_scale, log2e, o_token,
    HEADS: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINK: gl.constexpr, D: gl.constexpr,
    T: gl.constexpr, S: gl.constexpr, STEADY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _consume(
        1, q_tiles, a_tiles, ring, q_full, q_free, O, SINKS, BLOCKS, blocks, c, tanh_scale, log2e, o_token, HEADS,
        WINDOW, SOFTCAP, SINK, D, T, S, STEADY, STAGES,
    )  # fmt: skip


@gluon.jit
def _produce(
    Q, K, V, q_tiles, ring, q_full, q_free, BLOCKS, blocks, PAGE_TABLE, bt_stride, row_page, row_head, column_head,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, T: gl.constexpr, PAGE: gl.constexpr,
    WINDOW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    k_tiles, v_tiles, k_full, v_full = ring
    i = 0
    for n in range(0, _rounds(blocks * HEADS)):
        entry, head = _item(n, BLOCKS, blocks)
        start = gl.load(entry + 1)
        begin, _plain, end = _tiles(gl.load(entry + 3), gl.load(entry + 2), T, WINDOW)
        pages = PAGE_TABLE + gl.load(entry).to(gl.int64) * bt_stride
        kv = head // GROUP
        page = gl.load(pages + begin * T // PAGE)
        for j in range(begin, end):
            stage = i % STAGES
            row = page * row_page + kv * row_head + (j * T) % PAGE
            page = gl.load(pages + gl.minimum(j + 1, end - 1) * T // PAGE)
            _acquire(i, 0, STAGES)
            mbarrier.expect(k_full.index(stage), T * D * 2)
            tma.async_copy_global_to_shared(K, [row, kv * column_head], k_full.index(stage), k_tiles.index(stage))
            if j == begin:
                mbarrier.wait(q_free, (n & 1) ^ 1)
                mbarrier.expect(q_full, 2 * 64 * D * 2)
                tma.async_copy_global_to_shared(Q, [start, head * D], q_full, q_tiles.index(0))
                tma.async_copy_global_to_shared(Q, [start + 64, head * D], q_full, q_tiles.index(1))
            _acquire(i, 1, STAGES)
            mbarrier.expect(v_full.index(stage), T * D * 2)
            tma.async_copy_global_to_shared(V, [row, kv * column_head], v_full.index(stage), v_tiles.index(stage))
            i += 1


@gluon.jit(do_not_specialize=["bt_stride"])
def prefill_ws(
    Q, K, V, O, SINKS, BLOCKS, COUNTS, PAGE_TABLE, c, tanh_scale, log2e, bt_stride, o_token, row_page, row_head,
    column_head, HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, T: gl.constexpr, S: gl.constexpr,
    STEADY: gl.constexpr, PAGE: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: a program per multiprocessor; each takes every so many of (block of 128 rows, head). Q, K, V are
    descriptors: rows of tokens and of slots."""
    blocks = gl.load(COUNTS + 1)
    q_tiles = gl.allocate_shared_memory(Q.dtype, [2, 64, D], Q.layout)
    k_tiles = gl.allocate_shared_memory(K.dtype, [STAGES, T, D], K.layout)
    v_tiles = gl.allocate_shared_memory(V.dtype, [STAGES, T, D], V.layout)
    a_tiles = gl.allocate_shared_memory(gl.float32, [2, 64, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    ring = (k_tiles, v_tiles, k_full, v_full)
    gl.warp_specialize(
        [
            (_consume_low, (q_tiles, a_tiles, ring, q_full, q_free, O, SINKS, BLOCKS, blocks, c, tanh_scale, log2e,
                            o_token, HEADS, WINDOW, SOFTCAP, SINK, D, T, S, STEADY, STAGES)),
            (_consume_high, (q_tiles, a_tiles, ring, q_full, q_free, O, SINKS, BLOCKS, blocks, c, tanh_scale, log2e,
                             o_token, HEADS, WINDOW, SOFTCAP, SINK, D, T, S, STEADY, STAGES)),
            (_produce, (Q, K, V, q_tiles, ring, q_full, q_free, BLOCKS, blocks, PAGE_TABLE, bt_stride, row_page,
                        row_head, column_head, HEADS, GROUP, D, T, PAGE, WINDOW, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
