"""Linear layers and lm_head of the CPU engine, through vLLM's own oneDNN product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm import _custom_ops as ops

from vllm_deterministic import compat
from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.kernels.gemm import cpu, rows

__all__ = ["arm", "certified", "pack", "seconds"]

PRODUCT = "_C::onednn_mm"
# (N, K, dtype, bias) -> number of its schedule, and what certification found. One certification serves all layers of a
# shape: the library chooses by shape.
_schedules: dict[tuple[int, int, torch.dtype, bool], tuple[int, cpu.Found]] = {}


def arm() -> None:
    """Installs the seam in this worker process. Idempotent. Raises SeamError."""
    compat.install(compat.CPU_SEAMS["linear"], lambda original: _dispatch)


def packed_product(weight: torch.Tensor, bias: torch.Tensor | None) -> cpu.Gemm:
    """The bare product with vLLM's packed oneDNN weight of [N, K]."""
    handler = ops.create_onednn_mm(weight.t(), 32)
    product = torch.ops._C.onednn_mm.default
    return lambda x, y: product(y, x, bias, handler.handler_tensor)


def pack(weight: torch.Tensor, has_bias: bool) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """(x [..., K], bias [N] or None) -> x @ weight.T + bias on the tree, with a packed copy of `weight` [N, K].

    Raises CertificationError where the library has no schedule on the tree for this shape.
    """
    n, k = weight.shape
    handler = ops.create_onednn_mm(weight.t(), 32)
    packed = handler.handler_tensor
    number = _schedule_number(n, k, weight.dtype, has_bias)

    def product(x: torch.Tensor, bias: torch.Tensor | None, _owner: Any = handler) -> torch.Tensor:
        # _owner keeps the packed weight alive; the traced op sees its address only.
        return rows.linear(x, packed, bias, n, number)

    return product


def _dispatch(layer: Any, remove_weight: bool) -> None:
    """Stands for vLLM's dispatch_cpu_unquantized_gemm: packs the weight and sets `layer.cpu_linear`."""
    weight = layer.weight
    if weight.is_meta:
        layer.cpu_linear = torch.nn.functional.linear
        return
    if weight.ndim != 2:
        raise UnsupportedError(
            f"a weight of shape {tuple(weight.shape)} is no linear layer that --deterministic covers"
        )
    product = pack(weight, getattr(layer, "bias", None) is not None)
    layer.cpu_linear = lambda x, weight, bias: product(x, bias)
    if remove_weight:
        layer.weight = torch.nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)


def _schedule_number(n: int, k: int, dtype: torch.dtype, has_bias: bool) -> int:
    key = (n, k, dtype, has_bias)
    if key not in _schedules:
        schedule, found = cpu.certify(packed_product, n, k, dtype, has_bias, {"vllm": compat.vllm_version()})
        _schedules[key] = (rows.add_schedule(PRODUCT, n, k, schedule), found)
    return _schedules[key][0]


def certified() -> list[dict[str, Any]]:
    """The certified weight shapes of this worker. A schedule of the library is a number of rows."""
    return [
        {
            "operator": "linear", "n": n, "k": k, "dtype": str(dtype).removeprefix("torch."), "bias": bias,
            "schedules": found.certified, "dropped": found.dropped,
        }
        for (n, k, dtype, bias), (_, found) in _schedules.items()
    ]  # fmt: skip


def seconds() -> float:
    """What certification took in this process."""
    return sum(found.seconds for _, found in _schedules.values())
