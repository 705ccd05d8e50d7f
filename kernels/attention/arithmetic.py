"""The steps of the tree as Triton functions: the one place where the kernels' rounding points are written.

State of a block of rows: m and l [rows], acc [rows, head size]. Compile with enable_fp_fusion=False: then nothing is
contracted but what is written fma.
"""

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def within(rows, d, D: tl.constexpr, WIDTH: tl.constexpr):
    """Mask of what exists of [rows, WIDTH]. rows: which rows do. Behind a head size that is no power of two nothing
    does."""
    mask = rows[:, None]
    if WIDTH > D:
        mask = mask & (d < D)[None, :]
    return mask


@triton.jit
def halves(x, q):
    """e4m3 elements in the type of q, exactly.

    Where Triton sees that an operand of mma.sync was of 8 bits, it deals elements to instructions in another order,
    which is another chain (step 1 and 6). It does not see past assembly with side effects."""
    x = x.to(q.dtype)
    if not _INTERPRETED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=q.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def row_sum(p, ROWS: tl.constexpr, T: tl.constexpr):
    """Step 5, [rows]. Halving, one two-operand add a level: an add has no order that a layout of warps could change."""
    y = p
    for level in tl.static_range(8):
        if (T >> level) > 1:
            y = tl.sum(tl.reshape(y, (ROWS, 2, T >> (level + 1))), 1)
    return tl.reshape(y, (ROWS,))


@triton.jit
def softcap(x, tanh_scale):
    """tanh of a scaled score, step 1."""
    return 1.0 - tl.math.div_rn(2.0, tl.math.exp2(x * tanh_scale) + 1.0)


@triton.jit
def alibi(x, slope, ahead):
    """ALiBi, step 1. slope: [rows], in units of x. ahead: [rows, T], how far a key lies before the row."""
    return tl.fma(tl.broadcast_to(slope[:, None], x.shape), (-ahead).to(tl.float32), x)


@triton.jit
def ends_split(j, PER: tl.constexpr, STEADY: tl.constexpr):
    """Whether a split ends with tile j. PER: tiles of a split, STEADY: from which tile on of twice as many."""
    ends = (j + 1) % PER == 0
    if STEADY > 0:  # not a remainder by one or the other: that is a division
        ends = tl.where(j < STEADY, ends, (j + 1) % (2 * PER) == 0)
    return ends


@triton.jit
def split_of(j, PER: tl.constexpr, STEADY: tl.constexpr):
    """Which split holds tile j."""
    s = j // PER
    if STEADY > 0:
        s = tl.where(j < STEADY, s, (s + STEADY // PER) // 2)
    return s


@triton.jit
def first_tile(s, PER: tl.constexpr, STEADY: tl.constexpr):
    """The first tile of split s."""
    j = s * PER
    if STEADY > 0:
        j = tl.where(j < STEADY, j, 2 * j - STEADY)
    return j


@triton.jit
def weigh(x, m, c):
    """Steps 3 and 4: (p, alpha, the new m) of a tile of masked scores."""
    top = tl.maximum(m, tl.max(x, 1) * c)
    base = tl.where(top == float("-inf"), 0.0, top)
    shift = tl.broadcast_to((-base)[:, None], x.shape)
    p = tl.math.exp2(tl.fma(x, tl.full(x.shape, 0.0, tl.float32) + c, shift))
    return p, tl.math.exp2(m - base), top


@triton.jit
def accumulate(p, alpha, r, v, l, acc):
    """Step 6: (l, acc). v: [T, head size]."""
    l = tl.fma(l, alpha, r)
    acc = acc * alpha[:, None]
    return l, tl.dot(p.to(v.dtype), v, acc)


@triton.jit
def merge_scales(M, m):
    """Step 7's elementwise part: (the new M, a, b)."""
    top = tl.maximum(M, m)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.math.exp2(M - base), tl.math.exp2(m - base)


@triton.jit
def merge(M, L, A, m, l, acc):
    """Step 7: (M, L, A) with one more split."""
    top, a, b = merge_scales(M, m)
    L = tl.fma(L, a, l * b)
    A = tl.fma(A, tl.broadcast_to(a[:, None], A.shape), acc * b[:, None])
    return top, L, A


@triton.jit
def finish(M, L, A, sink, v_scale, SINK: tl.constexpr, E4M3: tl.constexpr):
    """Steps 8 and 9: the fp32 output. sink: [rows], the heads' sink logits in log2 units."""
    if SINK:
        M, L, A = merge(M, L, A, sink, tl.full(L.shape, 1.0, tl.float32), tl.full(A.shape, 0.0, tl.float32))
    whole = tl.full(L.shape, 1.0, tl.float32)
    if E4M3:
        whole = tl.zeros(L.shape, tl.float32) + v_scale
    inverse = tl.where(L == 0.0, 0.0, tl.math.div_rn(whole, L))
    return tl.fma(A, tl.broadcast_to(inverse[:, None], A.shape), tl.full(A.shape, 0.0, tl.float32))
