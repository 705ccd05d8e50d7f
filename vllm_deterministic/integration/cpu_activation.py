"""The activation of the CPU engine. A compiled graph has its own: its vector loops have no scalar ends."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from vllm_deterministic import compat
from vllm_deterministic.kernels import activation

__all__ = ["arm", "by_whole_rows"]


def arm() -> None:
    """Installs the seam in this worker process. Idempotent. Raises SeamError."""
    compat.install(compat.CPU_SEAMS["activation"], by_whole_rows)


def by_whole_rows(silu_and_mul: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """vLLM's SwiGLU of [rows, 2 d] -> [rows, d]; certified at the first call of a width, which is vLLM's warm-up."""

    @functools.wraps(silu_and_mul)
    def wrapped(x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return silu_and_mul(x)
        width = x.shape[-1] // 2
        activation.certify(width, x.dtype, torch.get_num_threads())
        return activation.silu(x[..., :width]) * x[..., width:]

    return wrapped
