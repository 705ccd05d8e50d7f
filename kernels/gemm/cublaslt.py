"""cuBLASLt with split-K forbidden: called directly, so that PyTorch's process-wide switches stay as the user has them.

No workspace is allowed either: without one there is nothing that two streams could share, and no size that a result
could depend on. Row-major y = x @ W.T is column-major y' = W' x with W' transposed.
"""

from __future__ import annotations

import threading
from ctypes import addressof, byref, c_float, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from vllm_deterministic.kernels.gemm import _cublaslt_api as api
from vllm_deterministic.kernels.gemm.tree import Problem

__all__ = ["CublasLt", "candidates", "version"]

_ONE, _ZERO = c_float(1.0), c_float(0.0)
_ONE_AT, _ZERO_AT = addressof(_ONE), addressof(_ZERO)
# The bias's address is an attribute of a descriptor that all layers of a shape share.
_bias_lock = threading.Lock()


def version() -> int:
    """The library's version, for example 130100."""
    return int(api.library().cublasLtGetVersion())


@cache
def _handle(device: int) -> c_void_p:
    with torch.cuda.device(device):
        return api.create("cublasLtCreate")


@cache
def _preference() -> c_void_p:
    preference = api.create("cublasLtMatmulPreferenceCreate")
    api.set_attribute("MatmulPreference", preference, api.PREF_WORKSPACE, c_uint64(0))
    api.set_attribute("MatmulPreference", preference, api.PREF_REDUCTION_SCHEMES, c_uint32(0))  # none: no split-K
    return preference


@cache
def _descriptor(problem: Problem) -> c_void_p:
    compute = api.COMPUTE_32F_PEDANTIC if problem.dtype == torch.float32 else api.COMPUTE_32F
    descriptor = api.create("cublasLtMatmulDescCreate", c_int(compute), c_int(api.DATA_TYPE[torch.float32]))
    api.set_attribute("MatmulDesc", descriptor, api.DESC_TRANSA, c_int32(1))
    if problem.bias:
        api.set_attribute("MatmulDesc", descriptor, api.DESC_EPILOGUE, c_uint32(api.EPILOGUE_BIAS))
        api.set_attribute("MatmulDesc", descriptor, api.DESC_BIAS_TYPE, c_int32(api.DATA_TYPE[problem.dtype]))
        api.set_attribute("MatmulDesc", descriptor, api.DESC_BIAS_POINTER, c_uint64(256))  # a real one comes per call
    return descriptor


@cache
def _layout(dtype: torch.dtype, rows: int, columns: int, stride: int) -> c_void_p:
    return api.create(
        "cublasLtMatrixLayoutCreate", c_int(api.DATA_TYPE[dtype]), c_uint64(rows), c_uint64(columns), c_int64(stride)
    )


def _operands(problem: Problem, out_dtype: torch.dtype, m: int, stride: int) -> tuple[Any, ...]:
    """Descriptor and layouts of W, x, y and y, in the order of the library's calls."""
    y = _layout(out_dtype, problem.n, m, problem.n)
    w = _layout(problem.dtype, problem.k, problem.n, problem.k)
    return (_descriptor(problem), w, _layout(problem.dtype, problem.k, m, stride), y, y)


def _heuristics(device: int, operands: tuple[Any, ...], most: int) -> list[api.Algorithm]:
    results, count = (api.HeuristicResult * most)(), c_int()
    api.call(
        "cublasLtMatmulAlgoGetHeuristic", _handle(device), *operands, _preference(), c_int(most), results, byref(count)
    )
    return [result.algorithm for result in results[: count.value] if result.state == 0]


@dataclass(frozen=True)
class CublasLt:
    """One algorithm of the library, by what it is made of; with algo = -1 the library's own choice for each m.

    The numbers are the library's (cublasLtMatmulTile_t and so on) and mean the same in every version that has them; a
    version that lacks one refuses the algorithm, and the schedule is not eligible there.
    """

    algo: int = -1
    tile: int = 0
    stages: int = 0
    cluster: int = 0
    inner: int = 0
    swizzle: int = 0
    option: int = 0

    family = "cublaslt"

    @property
    def one_kernel(self) -> bool:
        """Whether every row count runs the same code."""
        return self.algo >= 0

    def refusal(self, problem: Problem) -> str | None:
        """Why this schedule cannot run the problem; None where it can. Row counts are tried one by one."""
        return None

    def rows(self, m: int) -> int:
        """The library sees every row count itself."""
        return m

    def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        """Writes the product into y, as `Pointer.run`. Raises RuntimeError for a row count the algorithm cannot do."""
        n, k = weight.shape
        m, stride, device = x.shape[0], x.stride(0), x.device.index
        # Outside of CUDA graphs every layer of every step comes here: plain numbers are looked up fastest.
        key = (m, n, k, stride, x.dtype, y.dtype, bias is None, device)
        ready = self._ready.get(key)
        if ready is None:
            problem = Problem(n, k, x.dtype, bias is not None)
            ready = self._ready[key] = _prepared(self, problem, y.dtype, m, stride, device)
        if bias is None:
            ready(weight, x, y)
            return
        with _bias_lock:
            api.set_attribute("MatmulDesc", ready.descriptor, api.DESC_BIAS_POINTER, c_uint64(bias.data_ptr()))
            ready(weight, x, y)

    @cached_property
    def _ready(self) -> dict[tuple[Any, ...], _Call]:
        return {}


class _Call:
    """A product whose descriptors, layouts and algorithm are made: what is left are three addresses."""

    def __init__(self, operands: tuple[Any, ...], algorithm: api.Algorithm, device: int) -> None:
        self.descriptor, w, x, y, _ = operands
        self.algorithm = algorithm  # the call has its address only
        self._device, self._matmul = device, api.library().cublasLtMatmul
        self._handle, self._desc = _handle(device).value, self.descriptor.value
        self._w, self._x, self._y, self._algorithm = w.value, x.value, y.value, addressof(algorithm)

    def __call__(self, weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        out = y.data_ptr()
        status = self._matmul(
            self._handle, self._desc, _ONE_AT, weight.data_ptr(), self._w, x.data_ptr(), self._x, _ZERO_AT,
            out, self._y, out, self._y, self._algorithm, None, 0, torch._C._cuda_getCurrentRawStream(self._device),
        )  # fmt: skip
        api.check("cublasLtMatmul", status)


def _prepared(schedule: CublasLt, problem: Problem, out_dtype: torch.dtype, m: int, stride: int, device: int) -> _Call:
    """Raises RuntimeError where the algorithm cannot do it without workspace."""
    operands = _operands(problem, out_dtype, m, stride)
    if schedule.algo < 0:
        found = _heuristics(device, _operands(problem, problem.dtype, m, stride), 1)
        if not found:
            raise RuntimeError(f"cuBLASLt has no algorithm without split-K for {problem}, M = {m}")
        if out_dtype == problem.dtype:
            return _Call(operands, found[0], device)
        schedule = _described(found[0])  # certification looks at the float32 sums of the algorithm that serves
    algorithm = api.Algorithm()
    operand, result_type = c_int(api.DATA_TYPE[problem.dtype]), c_int(api.DATA_TYPE[out_dtype])
    compute = api.COMPUTE_32F_PEDANTIC if problem.dtype == torch.float32 else api.COMPUTE_32F
    api.call(
        "cublasLtMatmulAlgoInit", _handle(device), c_int(compute), c_int(api.DATA_TYPE[torch.float32]),
        operand, operand, result_type, result_type, c_int(schedule.algo), byref(algorithm),
    )  # fmt: skip
    api.set_config(algorithm, {name: getattr(schedule, name) for name in api.CONFIG})
    result = api.HeuristicResult()
    api.call("cublasLtMatmulAlgoCheck", _handle(device), *operands, byref(algorithm), byref(result))
    if result.state or result.workspace:
        raise RuntimeError(f"{schedule} needs a workspace of {result.workspace} bytes for {problem}, M = {m}")
    return _Call(operands, algorithm, device)


def _described(algorithm: api.Algorithm) -> CublasLt:
    config = api.config_of(algorithm)
    return CublasLt(**{name: value for name, value in config.items() if name != "split_k"})


def candidates(problem: Problem, m: int, device: int, most: int = 16) -> list[CublasLt]:
    """What the library itself would consider for this row count, best guess first; none of it splits K."""
    found = _heuristics(device, _operands(problem, problem.dtype, m, problem.k), most)
    return list(dict.fromkeys(_described(one) for one in found if api.config_of(one)["split_k"] <= 1))
