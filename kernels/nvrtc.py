"""CUDA C++ kernels, compiled on the user's machine by the NVRTC that PyTorch brings: no toolkit is asked for.

What was compiled is kept below the cache folder, so that the next process loads it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from typing import Any

import torch

from vllm_deterministic.errors import SeamError

from .certificates import cache_dir

__all__ = ["Kernel", "tensor_map"]


@cache
def _nvrtc() -> Any:
    """The library that PyTorch has loaded. Raises SeamError where it has no CUDA or no NVRTC."""
    if torch.version.cuda is None:
        raise SeamError("this PyTorch is built without CUDA: there is no NVRTC")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError as missing:
        raise SeamError(f"{name} of this PyTorch cannot be loaded: {missing}") from missing


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name} failed with status {status}")


def _call(library: Any, name: str, *args: Any) -> None:
    _check(name, getattr(library, name)(*args))


def _compile(source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
    """The machine code. Raises RuntimeError with the compiler's words."""
    nvrtc, program, size, n = _nvrtc(), c_void_p(), c_size_t(), len(headers)
    texts, names = ((c_char_p * n)(*(x.encode() for x in side)) for side in (headers.values(), headers))
    _call(nvrtc, "nvrtcCreateProgram", byref(program), source.encode(), b"kernel.cu", n, texts, names)
    status = nvrtc.nvrtcCompileProgram(program, len(options), (c_char_p * len(options))(*(o.encode() for o in options)))
    if status:
        _call(nvrtc, "nvrtcGetProgramLogSize", program, byref(size))
        log = ctypes.create_string_buffer(size.value)
        _call(nvrtc, "nvrtcGetProgramLog", program, log)
        raise RuntimeError(f"NVRTC refused a kernel: {log.value.decode()}")
    _call(nvrtc, "nvrtcGetCUBINSize", program, byref(size))
    image = ctypes.create_string_buffer(size.value)
    _call(nvrtc, "nvrtcGetCUBIN", program, image)
    _call(nvrtc, "nvrtcDestroyProgram", byref(program))
    return image.raw


def _image(source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
    """As `_compile`, from the cache folder where it is there."""
    major, minor = c_int(), c_int()
    _call(_nvrtc(), "nvrtcVersion", byref(major), byref(minor))
    subject = repr((torch.version.cuda, major.value, minor.value, list(options), source, dict(headers)))
    path = cache_dir() / "kernels" / f"{hashlib.sha256(subject.encode()).hexdigest()}.cubin"
    if path.exists():
        return path.read_bytes()
    image = _compile(source, headers, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(image)
        part.replace(path)  # whole or not at all
    except OSError:  # a cache that cannot be written costs time only
        pass
    return image


class Kernel:
    """The function `name` of a source, on the current card. Its one parameter is a structure, passed by value.

    headers: texts by the names that the source includes. defines: macros. shared: bytes of shared memory that each
    block asks for. Nothing is contracted but what is written fma. Raises SeamError without NVRTC, RuntimeError where it
    does not compile or load.
    """

    def __init__(
        self, source: str, headers: Mapping[str, str], name: str, defines: Mapping[str, Any], shared: int
    ) -> None:
        major, minor = torch.cuda.get_device_capability()
        options = [f"-arch=sm_{major}{minor}a", "-std=c++17", "-fmad=false"]
        image = _image(source, headers, [*options, *(f"-D{key}={value}" for key, value in defines.items())])
        module, self._function, self._shared = c_void_p(), c_void_p(), shared
        _call(_driver(), "cuModuleLoadData", byref(module), image)
        _call(_driver(), "cuModuleGetFunction", byref(self._function), module, name.encode())
        largest_dynamic_shared = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call(_driver(), "cuFuncSetAttribute", self._function, largest_dynamic_shared, shared)
        self._launch = _driver().cuLaunchKernel

    def launch(self, blocks: int, threads: int, argument: ctypes.Structure) -> None:
        """On the current card and stream. argument: copied before this returns."""
        stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
        pointers = (c_void_p * 1)(ctypes.addressof(argument))
        launched = self._launch(
            self._function, blocks, 1, 1, threads, 1, 1, self._shared, c_void_p(stream), pointers, None
        )
        _check("cuLaunchKernel", launched)


def tensor_map(x: torch.Tensor, box: tuple[int, ...]) -> bytes:
    """TMA's description of a tensor of 16-bit elements in boxes of these sizes and 64 columns, swizzled by 128 bytes;
    past its end zeros are read, and nothing is written.

    x: [..., columns], columns adjacent. box: of the dimensions before them.
    """
    at = ctypes.create_string_buffer(128 + 64)
    aligned = -(-ctypes.addressof(at) // 64) * 64
    u64, u32, n = ctypes.c_uint64, ctypes.c_uint32, x.dim()
    sizes, strides = (u64 * n)(*x.shape[::-1]), (u64 * (n - 1))(*(stride * 2 for stride in x.stride()[-2::-1]))
    bf16, swizzle_128, l2_128 = 9, 3, 2  # as 16 bits: nothing is computed with them
    _call(
        _driver(), "cuTensorMapEncodeTiled", c_void_p(aligned), bf16, u32(n), c_void_p(x.data_ptr()), sizes, strides,
        (u32 * n)(64, *box[::-1]), (u32 * n)(*[1] * n), 0, swizzle_128, l2_128, 0,
    )  # fmt: skip
    return ctypes.string_at(aligned, 128)
