"""Prefill on Hopper in CUDA C++ (prefill.cu): the schedule for head size 128 without window, softcap and sinks.

Tiles are loaded whole: slots of a sequence's last page beyond its end must hold finite values (they are multiplied by
0).
"""

from __future__ import annotations

import ctypes
from ctypes import c_byte, c_float, c_int, c_void_p
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from vllm_deterministic.kernels.nvrtc import Kernel, tensor_map

if TYPE_CHECKING:
    from .launch import Batch, Cache

__all__ = ["PrefillCuda"]

_SHARED = 232448  # bytes
_TILE = 128


class _Arguments(ctypes.Structure):
    """prefill.cu's structure of this name."""

    _fields_ = (
        ("q", c_byte * 128), ("k", c_byte * 128), ("v", c_byte * 128), ("o", c_byte * 128), ("out", c_void_p),
        ("blocks", c_void_p), ("counts", c_void_p), ("page_table", c_void_p), ("taken", c_void_p), ("c", c_float),
        ("page_table_row", c_int), ("out_token", c_int), ("row_page", c_int), ("row_head", c_int),
        ("column_head", c_int),
    )  # fmt: skip


def _source(name: str) -> str:
    return files("vllm_deterministic.kernels.attention").joinpath(name).read_text()


@cache
def _compiled(defines: tuple[tuple[str, int], ...], _card: int) -> Kernel:
    headers = {name: _source(name) for name in ("hopper.cuh", "tree.cuh")}
    return Kernel(_source("prefill.cu"), headers, "prefill", dict(defines), _SHARED)


class PrefillCuda:
    """prefill.cu for one shape of heads, compiled on first use. cluster: 1, or 2 programs that share tiles.

    Raises SeamError, RuntimeError as kernels/nvrtc.py's Kernel.
    """

    def __init__(self, query_heads: int, group: int, page: int, cluster: int) -> None:
        self._shape = {"HEADS": query_heads, "GROUP": group, "PAGE": page, "CLUSTER": cluster}
        self._maps: dict[Any, Any] = {}

    def _kernel(self, dtype: torch.dtype, out: torch.dtype) -> Kernel:
        kinds = {"FP16": int(dtype == torch.float16), "OUT32": int(out == torch.float32)}
        return _compiled(tuple({**self._shape, **kinds}.items()), torch.cuda.current_device())

    def _tiles(self, x: torch.Tensor, rows: int, columns: int) -> Any:
        """TMA's description of a cache's K or V as rows of slots."""
        key = (x.data_ptr(), rows, columns, x.stride(1))
        if key not in self._maps:
            self._maps[key] = _map(x.as_strided((rows, columns), (x.stride(1), 1)), _TILE)
        return self._maps[key]

    def launch(self, batch: Batch, cache: Cache, taken: torch.Tensor, c: float, programs: int) -> None:
        """On the current stream. taken: [2] int32, zeros; launches that share it must follow each other. c: turns
        scores to log2 units. programs: multiprocessors."""
        q, out, plan, table = batch.q, batch.out, batch.plan, batch.page_table
        rows, columns, *strides = cache.rows
        heads, cluster = self._shape["HEADS"], self._shape["CLUSTER"]
        argument = _Arguments(
            _map(_flat(q), _TILE), self._tiles(cache.k, rows, columns), self._tiles(cache.v, rows, columns),
            _map(_flat(out), _TILE // 2), out.data_ptr(), plan.blocks.data_ptr(), plan.counts.data_ptr(),
            table.data_ptr(), taken.data_ptr(), c, table.stride(0), out.stride(0), *strides,
        )  # fmt: skip
        blocks = min(programs, plan.blocks.shape[0] * heads) // cluster * cluster
        self._kernel(q.dtype, out.dtype).launch(blocks, 384, argument)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, 128] as rows of tokens."""
    return x.as_strided((x.shape[0], x.shape[1] * x.shape[2]), (x.stride(0), 1))


def _map(x: torch.Tensor, height: int) -> Any:
    return (c_byte * 128).from_buffer_copy(tensor_map(x, height))
