"""Norms of the GPU engine: a provider of vLLM's own RMSNorm operators, in compiled graphs and out of them."""

from __future__ import annotations

from typing import Any

import torch

from vllm_deterministic import compat
from vllm_deterministic.errors import SeamError, UnsupportedError
from vllm_deterministic.kernels.norm import rms  # noqa: F401  defines the operators

__all__ = ["arm"]

_PROVIDER = "vllm_deterministic"


def arm() -> None:
    """Registers the provider in this worker process and makes it the only one, before the model is built. Idempotent.

    vLLM's compile cache keys name the providers and hash their source. Raises SeamError.
    """
    from vllm import ir

    for seam, ours in (("rms_norm", _rms_norm), ("fused_add_rms_norm", _fused_add_rms_norm)):
        register = compat.probe(compat.GPU_SEAMS[seam])
        op = getattr(ir.ops, seam)
        if _PROVIDER not in op.impls:
            try:
                register(_PROVIDER)(ours)
            except (ValueError, AssertionError) as changed:
                raise SeamError(f"vllm.ir's {seam} has changed: {changed}") from changed
        op.set_default([_PROVIDER])


def _whole(variance_size: int | None) -> None:
    if variance_size is not None:
        raise UnsupportedError("--deterministic: a norm over a part of its row (var_hidden_size) is not proved")


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    _whole(variance_size)
    return torch.ops.vllm_deterministic.rms_norm(x, weight, epsilon)


def _fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _whole(variance_size)
    result: Any = torch.ops.vllm_deterministic.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return result
