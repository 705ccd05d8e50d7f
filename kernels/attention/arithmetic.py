"""The steps of the tree as Triton functions: the one place where the kernels' rounding points are written.

State of a block of rows: m and l [rows], acc [rows, head size]; with AXIS = 0 all matrices are transposed (keys and
head size come first), which lets a tensor core's wide side be the keys where rows are few. AXIS is the keys' axis in
a tile of scores. Compile with enable_fp_fusion=False: then nothing is contracted but what is written fma.
"""

import triton
import triton.language as tl


@triton.jit
def row_sum(p, ROWS: tl.constexpr, T: tl.constexpr, AXIS: tl.constexpr):
    """Step 5, [rows]. Halving, one two-operand add a level: an add has no order that a layout of warps could change."""
    y = p
    for level in tl.static_range(8):
        if (T >> level) > 1:
            if AXIS == 1:
                y = tl.sum(tl.reshape(y, (ROWS, 2, T >> (level + 1))), 1)
            else:
                y = tl.sum(tl.reshape(y, (2, T >> (level + 1), ROWS)), 0)
    return tl.reshape(y, (ROWS,))


@triton.jit
def softcap(x, tanh_scale):
    """tanh of a scaled score, step 1."""
    return 1.0 - tl.math.div_rn(2.0, tl.math.exp2(x * tanh_scale) + 1.0)


@triton.jit
def weigh(x, m, c, AXIS: tl.constexpr):
    """Steps 3 and 4: (p, alpha, the new m) of a tile of masked scores."""
    top = tl.maximum(m, tl.max(x, AXIS) * c)
    base = tl.where(top == float("-inf"), 0.0, top)
    shift = tl.broadcast_to(tl.expand_dims(-base, AXIS), x.shape)
    p = tl.math.exp2(tl.fma(x, tl.full(x.shape, 0.0, tl.float32) + c, shift))
    return p, tl.math.exp2(m - base), top


@triton.jit
def accumulate(p, alpha, r, v, l, acc, AXIS: tl.constexpr):
    """Step 6: (l, acc). v: [T, head size], transposed with AXIS = 0."""
    l = tl.fma(l, alpha, r)
    acc = acc * tl.expand_dims(alpha, AXIS)
    if AXIS == 1:
        acc = tl.dot(p.to(v.dtype), v, acc)
    else:
        acc = tl.dot(v, p.to(v.dtype), acc)
    return l, acc


@triton.jit
def merge_scales(M, m):
    """Step 7's elementwise part: (the new M, a, b)."""
    top = tl.maximum(M, m)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.math.exp2(M - base), tl.math.exp2(m - base)


@triton.jit
def merge(M, L, A, m, l, acc, AXIS: tl.constexpr):
    """Step 7: (M, L, A) with one more split."""
    top, a, b = merge_scales(M, m)
    L = tl.fma(L, a, l * b)
    A = tl.fma(A, tl.broadcast_to(tl.expand_dims(a, AXIS), A.shape), acc * tl.expand_dims(b, AXIS))
    return top, L, A


@triton.jit
def finish(M, L, A, sink, AXIS: tl.constexpr, SINK: tl.constexpr):
    """Steps 8 and 9: the fp32 output. sink: [rows], the heads' sink logits in log2 units."""
    if SINK:
        M, L, A = merge(M, L, A, sink, tl.full(L.shape, 1.0, tl.float32), tl.full(A.shape, 0.0, tl.float32), AXIS)
    inverse = tl.where(L == 0.0, 0.0, tl.math.div_rn(tl.full(L.shape, 1.0, tl.float32), L))
    return tl.fma(A, tl.broadcast_to(tl.expand_dims(inverse, AXIS), A.shape), tl.full(A.shape, 0.0, tl.float32))
