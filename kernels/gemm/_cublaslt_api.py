"""The part of cuBLASLt's C interface that is needed here, through ctypes: PyTorch's own copy of the library.

Names and numbers are those of NVIDIA's documentation ("cuBLASLt API", cublasLt.h); every call's status is checked.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch

from vllm_deterministic.errors import SeamError

__all__ = ["CONFIG", "DATA_TYPE", "Algorithm", "HeuristicResult", "call", "check", "create", "library", "set_attribute"]

DATA_TYPE = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
COMPUTE_32F, COMPUTE_32F_PEDANTIC = 68, 69
DESC_TRANSA, DESC_EPILOGUE, DESC_BIAS_POINTER, DESC_BIAS_TYPE = 3, 7, 8, 26
EPILOGUE_BIAS = 4
PREF_WORKSPACE, PREF_REDUCTION_SCHEMES = 1, 3
# cublasLtMatmulAlgoConfigAttributes_t: what an algorithm is made of. Split-K and its reduction scheme stay at none.
CONFIG = {"tile": 1, "swizzle": 4, "option": 5, "stages": 6, "inner": 7, "cluster": 8}
CONFIG_ID, CONFIG_SPLIT_K = 0, 2
_SHORT = ("inner", "cluster")  # these two are 16 bits wide


class Algorithm(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class HeuristicResult(ctypes.Structure):
    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@cache
def library() -> Any:
    """The library that this process's PyTorch uses. Raises SeamError where PyTorch has no CUDA or none is found."""
    if torch.version.cuda is None:
        raise SeamError("this PyTorch is built without CUDA: there is no cuBLASLt")
    torch.cuda.current_blas_handle()  # makes PyTorch load its copy
    name = f"libcublasLt.so.{torch.version.cuda.split('.')[0]}"
    try:
        lib = ctypes.CDLL(name)
    except OSError as missing:
        raise SeamError(f"{name} of this PyTorch cannot be loaded: {missing}") from missing
    lib.cublasLtGetVersion.restype = c_size_t
    lib.cublasLtMatmul.argtypes = [c_void_p] * 14 + [c_size_t, c_void_p]  # plain numbers are converted fastest
    return lib


def call(name: str, *args: Any) -> None:
    """Calls a function of the library. Raises RuntimeError with the function's name and status where it fails."""
    check(name, getattr(library(), name)(*args))


def check(name: str, status: int) -> None:
    """Raises RuntimeError where a function of the library has failed."""
    if status:
        raise RuntimeError(f"{name} failed with status {status}")


def create(name: str, *args: Any) -> c_void_p:
    """A new handle, descriptor, layout or preference. It lives as long as the process: all of them are cached."""
    handle = c_void_p()
    call(name, byref(handle), *args)
    return handle


def set_attribute(kind: str, thing: Any, attribute: int, value: Any) -> None:
    """Sets an attribute of a "MatmulDesc", "MatmulPreference" or "MatmulAlgoConfig" from a ctypes value."""
    call(f"cublasLt{kind}SetAttribute", thing, attribute, byref(value), c_size_t(ctypes.sizeof(value)))


def config_of(algorithm: Algorithm) -> dict[str, int]:
    """What an algorithm is made of: its id, split_k, and everything in CONFIG."""
    found = {}
    for name, attribute in {"algo": CONFIG_ID, "split_k": CONFIG_SPLIT_K, **CONFIG}.items():
        value = ctypes.c_uint16() if name in _SHORT else c_uint32()
        written = c_size_t()
        call(
            "cublasLtMatmulAlgoConfigGetAttribute",
            byref(algorithm), attribute, byref(value), c_size_t(ctypes.sizeof(value)), byref(written),
        )  # fmt: skip
        found[name] = value.value
    return found


def set_config(algorithm: Algorithm, config: dict[str, int]) -> None:
    """Sets everything in CONFIG."""
    for name, attribute in CONFIG.items():
        number = (ctypes.c_uint16 if name in _SHORT else c_uint32)(config[name])
        set_attribute("MatmulAlgoConfig", byref(algorithm), attribute, number)
