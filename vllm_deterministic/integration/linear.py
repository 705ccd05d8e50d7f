"""Linear layers and lm_head of the CPU engine, through vLLM's own oneDNN product."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from vllm import _custom_ops as ops

from vllm_deterministic import compat
from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.kernels.gemm import cpu

__all__ = ["arm"]

logger = logging.getLogger("vllm.deterministic")

# The overload itself: looking it up by name costs as much as the call.
_onednn_mm = torch.ops._C.onednn_mm.default
# (N, K, dtype, bias) -> schedule. One certification serves all layers of a shape: the library chooses by shape.
_schedules: dict[tuple[int, int, torch.dtype, bool], cpu.RowSchedule] = {}
# A traced graph can carry an integer, not a schedule.
_by_number: list[cpu.RowSchedule] = []


def arm() -> None:
    """Installs the seam in this worker process. Idempotent. Raises SeamError."""
    compat.install(compat.CPU_SEAMS["linear"], lambda original: _dispatch)


def _cpu_linear(
    x: torch.Tensor, handler: torch.Tensor, bias: torch.Tensor | None, n: int, schedule: int
) -> torch.Tensor:
    """y = x @ W.T + bias on the tree. x: [..., K]; returns [..., N] of x's dtype."""
    y = x.new_empty((*x.shape[:-1], n))
    rows, out = (x, y) if x.dim() == 2 else (x.reshape(-1, x.shape[-1]), y.view(-1, n))
    _by_number[schedule].run(lambda a, b: _onednn_mm(b, a, bias, handler), rows, out)
    return y


def _cpu_linear_fake(
    x: torch.Tensor, handler: torch.Tensor, bias: torch.Tensor | None, n: int, schedule: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n))


# Defined on the library itself, without torch.library.custom_op's checks around every call: this runs once a layer.
_library = torch.library.Library("vllm_deterministic", "FRAGMENT")
_library.define("cpu_linear(Tensor x, Tensor handler, Tensor? bias, int n, int schedule) -> Tensor")
_library.impl("cpu_linear", _cpu_linear, "CPU")
torch.library.register_fake("vllm_deterministic::cpu_linear", _cpu_linear_fake, lib=_library)


def packed_product(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, cpu.Gemm]:
    """vLLM's packed oneDNN weight of [N, K], which must outlive its use, and the bare product with it."""
    handler = ops.create_onednn_mm(weight.t(), 32)
    return handler, lambda x, y: _onednn_mm(y, x, bias, handler.handler_tensor)


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
    n, k = weight.shape
    bias = getattr(layer, "bias", None)
    handler = ops.create_onednn_mm(weight.t(), 32)
    packed = handler.handler_tensor
    number = _schedule_number(n, k, weight.dtype, bias is not None)

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, _owner: Any = handler) -> torch.Tensor:
        # _owner keeps the packed weight alive; the traced op sees its address only.
        return torch.ops.vllm_deterministic.cpu_linear(x, packed, bias, n, number)

    layer.cpu_linear = linear
    if remove_weight:
        layer.weight = torch.nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)


def _schedule_number(n: int, k: int, dtype: torch.dtype, has_bias: bool) -> int:
    key = (n, k, dtype, has_bias)
    if key not in _schedules:
        _schedules[key] = _certify(n, k, dtype, has_bias)
        _by_number.append(_schedules[key])
    return list(_schedules).index(key)


def _certify(n: int, k: int, dtype: torch.dtype, has_bias: bool) -> cpu.RowSchedule:
    """Certifies a shape on a weight of its own: a checkpoint's weights may be too tame to tell two trees apart."""
    start = time.perf_counter()
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype)
    _, gemm = packed_product(weight, weight[:, 0].contiguous() if has_bias else None)
    most = cpu.max_tile(n, k)
    x = cpu.hard_rows(most + 40, k, dtype)
    certified = cpu.certified_row_counts(gemm, x, n, most)
    chosen = cpu.schedule(gemm, x, n, certified)
    missing = sorted(set(range(1, most + 1)) - set(certified))
    logger.info(
        "certified %s x %s %s in %.1f s on %d threads: %d of %d row counts are on the tree%s, tile %d",
        n, k, dtype, time.perf_counter() - start, torch.get_num_threads(), len(certified), most,
        f" (not {missing[:8]})" if missing else "", chosen.tile,
    )  # fmt: skip
    return chosen
