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
    from .launch import Batch, Cache, Scratch
    from .schedules import Heads
    from .tree import Tree

__all__ = ["PrefillCuda"]

_SHARED = 232448  # bytes
_TILE = 128


class _Arguments(ctypes.Structure):
    """prefill.cu's structure of this name."""

    _fields_ = (
        ("q", c_byte * 128), ("k", c_byte * 128), ("v", c_byte * 128), ("o", c_byte * 128), ("out", c_void_p),
        ("state", c_void_p), ("kept", c_void_p), ("blocks", c_void_p), ("counts", c_void_p), ("page_table", c_void_p),
        ("taken", c_void_p), ("c", c_float), ("page_table_row", c_int), ("out_token", c_int), ("row_page", c_int),
        ("row_head", c_int), ("column_head", c_int),
    )  # fmt: skip


def _source(name: str) -> str:
    return files("vllm_deterministic.kernels.attention").joinpath(name).read_text()


@cache
def _compiled(defines: tuple[tuple[str, int], ...], _card: int) -> Kernel:
    headers = {name: _source(name) for name in ("hopper.cuh", "tree.cuh")}
    return Kernel(_source("prefill.cu"), headers, "prefill", dict(defines), _SHARED)


class PrefillCuda:
    """prefill.cu for one tree and shape of heads, compiled on first use. pieces: for plans that cut blocks.

    Raises SeamError, RuntimeError as kernels/nvrtc.py's Kernel.
    """

    def __init__(self, tree: Tree, heads: Heads, pieces: bool) -> None:
        # Where steps are large, rows of one head are a little faster.
        self._shape = {
            "HEADS": heads.query, "PACK": heads.pack if pieces else 1, "GROUP": heads.group, "PAGE": heads.page,
            "PIECES": int(pieces), "STEADY": tree.steady // tree.tile,
        }  # fmt: skip
        self._maps: dict[Any, Any] = {}

    def _kernel(self, dtype: torch.dtype, out: torch.dtype) -> Kernel:
        kinds = {"FP16": int(dtype == torch.float16), "OUT32": int(out == torch.float32)}
        return _compiled(tuple({**self._shape, **kinds}.items()), torch.cuda.current_device())

    def _tiles(self, x: torch.Tensor, rows: int, columns: int) -> Any:
        """TMA's description of a cache's K or V as rows of slots."""
        key = (x.data_ptr(), rows, columns, x.stride(1))
        if key not in self._maps:
            self._maps[key] = _map(x.as_strided((rows, columns), (x.stride(1), 1)), (_TILE,))
        return self._maps[key]

    def launch(self, batch: Batch, cache: Cache, scratch: Scratch, c: float, programs: int) -> None:
        """On the current stream; launches that share scratch must follow each other. c: turns scores to log2 units.
        programs: multiprocessors."""
        q, out, plan, table = batch.q, batch.out, batch.plan, batch.page_table
        rows, columns, *strides = cache.rows
        heads, pack = self._shape["HEADS"], self._shape["PACK"]
        argument = _Arguments(
            _map(q, (_TILE // pack, pack)), self._tiles(cache.k, rows, columns), self._tiles(cache.v, rows, columns),
            _map(out, (_TILE // 2 // pack, pack)), out.data_ptr(), scratch.state.data_ptr(), scratch.acc.data_ptr(),
            plan.blocks.data_ptr(), plan.counts.data_ptr(), table.data_ptr(), scratch.taken.data_ptr(), c,
            table.stride(0), out.stride(0), *strides,
        )  # fmt: skip
        self._kernel(q.dtype, out.dtype).launch(min(programs, plan.blocks.shape[0] * heads), 384, argument)


def _map(x: torch.Tensor, box: tuple[int, ...]) -> Any:
    return (c_byte * 128).from_buffer_copy(tensor_map(x, box))
