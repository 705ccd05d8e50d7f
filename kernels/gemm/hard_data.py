"""Data on which another order of summation shows in the rounded result."""

from __future__ import annotations

import torch

__all__ = ["hard_operands"]


def hard_operands(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [m, k], weight [n, k] and bias [n] of `dtype`, for certification.

    Rows of x cycle through eight kinds: normal, heavy-tailed, cancelling (the second half of k mirrors the first, and
    every other weight row mirrors too, so that half of their products cancel to a rest), wide exponents, small integers
    (exact in any order), subnormal results, sums that overflow, and normal again. Row 13 holds NaN and infinities,
    which must stay in their row.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, k, device=device, generator=generator)

    half, narrow = k // 2, dtype == torch.float16
    x, weight = normal(m), normal(n)
    weight[1::2, half : 2 * half] = weight[1::2, :half]
    x[1::8] *= (normal(len(x[1::8])) * (1 if narrow else 3)).exp()
    x[2::8] *= 100
    x[2::8, half : 2 * half] = -x[2::8, :half] * (1 + 2**-7)
    spread = 6 if narrow else 40
    x[3::8] *= torch.exp2(
        torch.randint(-spread, spread, x[3::8].shape, device=device, generator=generator).to(torch.float32)
    )
    x[4::8] = (x[4::8] * 4).round().clamp(-8, 8)
    x[5::8] *= 2.0**-20 if narrow else 2.0**-126
    x[6::8] *= 2.0**13 if narrow else 2.0**121
    if m > 13:
        x[13, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")], device=device)[:k]
    return x.to(dtype), weight.to(dtype), weight.new_empty(n).normal_(generator=generator).to(dtype)
