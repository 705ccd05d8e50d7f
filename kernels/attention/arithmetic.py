"""The steps of the tree as Triton functions: the one place where the kernels' rounding points are written.

State of a block of rows: m and l [rows], acc [rows, head size]. Compile with enable_fp_fusion=False: then nothing is
contracted but what is written fma.
"""

import triton
import triton.language as tl


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
def finish(M, L, A, sink, SINK: tl.constexpr):
    """Steps 8 and 9: the fp32 output. sink: [rows], the heads' sink logits in log2 units."""
    if SINK:
        M, L, A = merge(M, L, A, sink, tl.full(L.shape, 1.0, tl.float32), tl.full(A.shape, 0.0, tl.float32))
    inverse = tl.where(L == 0.0, 0.0, tl.math.div_rn(tl.full(L.shape, 1.0, tl.float32), L))
    return tl.fma(A, tl.broadcast_to(inverse[:, None], A.shape), tl.full(A.shape, 0.0, tl.float32))
