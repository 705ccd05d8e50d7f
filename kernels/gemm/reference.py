"""What a linear layer's product is: the bits, by the plainest kernel on the tree, and the value, in float64.

PyTorch cannot reproduce the sum inside a tensor core's step, so the bits come from a kernel: one program per 64 x 64
tile, plain loads, nothing overlapped. That kernel is itself held against float64 with the bound of its own tree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["bit_reference", "count_differing", "error_bound", "exact"]

_BLOCK = 64


@triton.jit(do_not_specialize=["m"])
def _plain_kernel(x, w, bias, y, m, n, k, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    rm = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    rn = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, BLOCK):  # k ascending, one accumulator
        rk = start + tl.arange(0, BLOCK)
        a = tl.load(x + rm[:, None] * k + rk[None, :], mask=(rm[:, None] < m) & (rk[None, :] < k), other=0.0)
        b = tl.load(w + rn[None, :] * k + rk[:, None], mask=(rn[None, :] < n) & (rk[:, None] < k), other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + rn, mask=rn < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rm[:, None] * n + rn[None, :], acc.to(y.dtype.element_ty), mask=(rm[:, None] < m) & (rn[None, :] < n))


def bit_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The tree's bits: x [M, K] times weight [N, K], plus bias [N]; [M, N] of out_dtype (x's own)."""
    x, weight = x.contiguous(), weight.contiguous()  # the plain kernel knows no strides
    m, k = x.shape
    n = weight.shape[0]
    y = torch.empty(m, n, dtype=out_dtype or x.dtype, device=x.device)
    if m:
        grid = (triton.cdiv(m, _BLOCK), triton.cdiv(n, _BLOCK))
        _plain_kernel[grid](x, weight, weight if bias is None else bias, y, m, n, k, _BLOCK, bias is not None)
    return y


@triton.jit(do_not_specialize=["elements"])
def _compare_kernel(y, want, found, elements, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(y + at, mask=at < elements, other=0.0)
    b = tl.load(want + at, mask=at < elements, other=0.0)
    other = a.to(BITS, bitcast=True) != b.to(BITS, bitcast=True)
    numbers = (a.to(tl.float32) == a.to(tl.float32)) | (b.to(tl.float32) == b.to(tl.float32))
    wrong = tl.sum((other & numbers).to(tl.int32))
    if wrong > 0:
        tl.atomic_add(found, wrong.to(tl.int64))  # integers: any order
    tl.store(y + at, tl.full((BLOCK,), 7.0, tl.float32).to(y.dtype.element_ty), mask=at < elements)


def count_differing(y: torch.Tensor, want: torch.Tensor, found: torch.Tensor) -> None:
    """Adds to found, [1] int64, how many elements of y have other bits than want's, and fills y with 7.

    y, want: contiguous, of one shape and floating type. A NaN equals a NaN: its payload is not part of an answer. -0
    and +0 are two answers. One pass, since certification compares some ten thousand products.
    """
    bits = {2: tl.int16, 4: tl.int32}[y.element_size()]
    _compare_kernel[(triton.cdiv(y.numel(), 4096),)](y, want, found, y.numel(), bits, 4096)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float64, [M, N]. Exact for integers below 2^53."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def error_bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How far an fp32 chain may be from the exact product, [M, N], float64.

    The textbook bound for a sum of K terms is (K - 1) u sum|a b| with u = 2^-24 (N. Higham, Accuracy and Stability of
    Numerical Algorithms, 2nd ed., eq. 4.4). A tensor core truncates where a scalar unit rounds, which doubles u, and
    aligns the products of a step to the largest of them, which costs two bits more: u = 2^-21 here.
    """
    return x.shape[1] * 2.0**-21 * (x.double().abs() @ weight.double().abs().T)
