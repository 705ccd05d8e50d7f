"""Runs attention of one layer shape: picks schedules by padded sizes, launches kernels, keeps scratch.

Nothing on the host reads a length, so a CUDA graph captured at a padded size serves every batch that fits it: prefills,
chunks and decodes together. Which kernel a sequence takes, is decided on the device (plan.py) by its query tokens
alone.

Contract on the cache: slots past a sequence's end, in its last page, hold finite values (the kernels that load whole
tiles multiply them by 0). Their owner clears them when a page is handed out.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import triton
from vllm_deterministic.kernels.compiled import Compiled, aligned

from vllm_deterministic.errors import ConfigurationError, UnsupportedError

from . import decode as decode_kernels
from . import prefill as prefill_kernels
from .combine import combine_blocks
from .plan import Plan
from .prefill_cuda import PrefillCuda
from .schedules import DECODE, PREFILL, Decode, Heads, Prefill
from .tree import LOG2E, Tree

__all__ = ["FEW_MAX", "Attention", "Batch", "Cache", "Scratch"]

FEW_MAX = 16  # query tokens up to which a whole batch is decoded
SMALL = 512  # query tokens up to which a step's prefill may be cut into pieces: its combine is launched then
_COMBINERS = 8  # programs per multiprocessor that combine the cut blocks of a prefill
_SCRATCH_SPLITS = 8192  # of one query token each
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Cache:
    """A layer's K and V pages: two views of [pages, slots, kv heads, head size], of any strides but the last, which
    is 1."""

    k: torch.Tensor
    v: torch.Tensor

    @cached_property
    def rows(self) -> tuple[int, int, int, int, int]:
        """As rows of slots: (rows, columns, rows per page, rows per head, columns per head).

        Raises ConfigurationError where pages or heads are no whole number of slots apart."""
        pages, slots, heads, size = self.k.shape
        page, slot, head, _ = self.k.stride()
        if self.v.stride() != self.k.stride() or page % slot or (head > slot and head % slot):
            raise ConfigurationError(f"a KV cache of strides {self.k.stride()} and {self.v.stride()} is not covered")
        if head > slot:  # [pages, heads, slots, ...]
            rows = (pages - 1) * (page // slot) + (heads - 1) * (head // slot) + slots
            return rows, size, page // slot, head // slot, 0
        return (pages - 1) * (page // slot) + slots, (heads - 1) * head + size, page // slot, 0, head


@dataclass(frozen=True)
class Batch:
    """What one call works on. q, out: [tokens, query heads, head size], heads adjacent; out of q's dtype or fp32.

    page_table: [sequences, pages] int32. plan: filled for these sequences. sinks, slopes (of ALiBi): [query heads]
    fp32, with a tree that has them.
    """

    q: torch.Tensor
    out: torch.Tensor
    page_table: torch.Tensor
    plan: Plan
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None


@dataclass
class Scratch:
    """What kernels of one call leave to each other; one serves all layers of a stream.

    state, acc: partial results of splits between decode and combine. taken: how many blocks prefill_cuda has handed
    out, and how many of its programs are done; 0 between launches.
    """

    state: torch.Tensor
    acc: torch.Tensor
    taken: torch.Tensor

    @classmethod
    def empty(cls, query_heads: int, head_size: int, device: torch.device | str) -> Scratch:
        rows = _SCRATCH_SPLITS * query_heads
        taken = torch.zeros(2, dtype=torch.int32, device=device)
        width = triton.next_power_of_2(head_size)
        return cls(torch.empty(rows, 2, device=device), torch.empty(rows, width, device=device), taken)


@dataclass
class Attention:
    """Attention of one tree and one shape of heads on one device.

    allowed: names of schedules that may run, as certified; None for all. Raises UnsupportedError where none is left.
    """

    tree: Tree
    heads: Heads
    device: torch.device | str
    scratch: Scratch
    allowed: Collection[str] | None = None
    _descriptors: dict[Any, tuple[Any, Any]] = field(default_factory=dict, repr=False)

    @cached_property
    def hopper(self) -> bool:
        return not _INTERPRETED and torch.cuda.get_device_capability(self.device)[0] == 9

    @cached_property
    def multiprocessors(self) -> int:
        return 1 if _INTERPRETED else torch.cuda.get_device_properties(self.device).multi_processor_count

    def _permitted(self, schedule: Decode | Prefill) -> bool:
        return self.allowed is None or schedule.name in self.allowed

    def few(self, max_query: int) -> int:
        """Sequences of up to so many query tokens are decoded, in a batch of sequences of up to `max_query`: all of a
        batch where those are few, a power of two, for each is a compilation. Where blocks are cut into pieces, those
        are faster than more tokens than fill a decode's rows."""
        cut = any(s.pieces and self._permitted(s) and s.eligible(self.tree, self.heads, self.hopper) for s in PREFILL)
        return max(16 // self.heads.group, 1) if cut or max_query > FEW_MAX else triton.next_power_of_2(max_query)

    def schedules(self, batch: int, tokens: int, max_query: int) -> tuple[Decode, Prefill | None]:
        """The schedules for a padded batch of so many sequences and query tokens: the first that fit it, are eligible
        and allowed."""
        few = self.few(max_query)
        rows = min(few * self.heads.group, 64)
        many = 2 * batch * self.heads.kv >= 3 * self.multiprocessors
        decode = [s for s in DECODE if self._permitted(s) and s.eligible(self.tree, self.heads, self.hopper)]
        decode.sort(key=lambda s: (s.rows < rows, s.rows, s.many != many))
        prefill = [s for s in PREFILL if self._permitted(s) and s.eligible(self.tree, self.heads, self.hopper)]
        prefill.sort(key=lambda s: s.pieces != (tokens <= SMALL))
        if not decode or not prefill:
            raise UnsupportedError(f"no schedule of attention is left for {self.tree} and {self.heads}")
        return decode[0], prefill[0] if max_query > few else None

    def slots(self, decode: Decode) -> int:
        """How many pieces a KV head's work is cut into."""
        return max(decode.per_sm * self.multiprocessors // self.heads.kv, 1)

    def block_slots(self, prefill: Prefill | None) -> int:
        """How many programs share the blocks of one set of packed heads; 0: blocks are not cut."""
        if prefill is None or not prefill.pieces:
            return 0
        return max(self.multiprocessors * self.heads.pack // self.heads.query, 1)

    def plan(self, batch: int, tokens: int, max_query: int, decode: Decode, prefill: Prefill | None) -> Plan:
        """Empty work lists for a padded batch: `batch` sequences, `tokens` query tokens, at most `max_query` in one."""
        block = prefill.rows if prefill else 128
        # Without a prefill all sequences are decoded; powers of two, for each is a compilation.
        few = self.few(max_query) if prefill else triton.next_power_of_2(max_query)
        return Plan.empty(
            batch, tokens, few=few, block=block, unit=block // self.heads.pack,
            slots=self.slots(decode), block_slots=self.block_slots(prefill), capacity=_SCRATCH_SPLITS,
            device=self.device,
        )  # fmt: skip

    def run(self, batch: Batch, cache: Cache, decode: Decode | None, prefill: Prefill | None) -> None:
        """Writes attention of the batch's query tokens into its `out`.

        decode, prefill: as the batch's plan was made for. Raises ConfigurationError for tensors of another layout.
        """
        self._check(batch, cache)
        if decode is not None:
            self._decode(batch, cache, decode)
        if prefill is not None:
            self._prefill(batch, cache, prefill)

    @cached_property
    def _decode_kernel(self) -> Compiled:
        return Compiled(decode_kernels.decode)

    @cached_property
    def _combine_kernel(self) -> Compiled:
        return Compiled(decode_kernels.combine)

    @cached_property
    def _combine_blocks_kernel(self) -> Compiled:
        return Compiled(combine_blocks)

    @cached_property
    def _prefill_kernel(self) -> Compiled:
        return Compiled(prefill_kernels.prefill)

    @cached_property
    def _prefill_ws_kernel(self) -> Compiled:
        from .prefill_ws import prefill_ws  # Gluon: not in Triton's interpreter

        return Compiled(prefill_ws)

    @cached_property
    def _prefill_cuda(self) -> tuple[PrefillCuda, PrefillCuda]:
        return PrefillCuda(self.tree, self.heads, pieces=False), PrefillCuda(self.tree, self.heads, pieces=True)

    @cached_property
    def _constants(self) -> dict[str, Any]:
        tree, heads = self.tree, self.heads
        return {
            "GROUP": heads.group, "D": tree.head_size, "T": tree.tile, "S": tree.split, "STEADY": tree.steady,
            "PAGE": heads.page, "WINDOW": tree.window, "SOFTCAP": tree.softcap > 0, "SINK": tree.sink,
            "enable_fp_fusion": False,
        }  # fmt: skip

    @cached_property
    def _by_pointers(self) -> dict[str, Any]:
        """Constants of the kernels that know every tree."""
        tree = self.tree
        return {**self._constants, "WIDTH": tree.width, "ALIBI": tree.alibi, "E4M3": tree.e4m3}

    def _lengths(self, batch: Batch) -> tuple[Any, ...]:
        tree, table = self.tree, batch.page_table
        return table, tree.log2_scale, tree.tanh_scale, LOG2E, table.stride(0)

    def _key(self, batch: Batch, cache: Cache, schedule: Decode | Prefill) -> tuple[Any, ...] | None:
        """What this layer's kernels are compiled for; None where a pointer is not aligned."""
        plan, q, out, sinks = batch.plan, batch.q, batch.out, batch.sinks
        pointers = (q, out, cache.k, cache.v, batch.page_table, sinks, plan.pieces, plan.blocks, plan.sequences)
        if not aligned(*pointers, plan.counts, batch.slopes):
            return None
        strides = (q.stride(0), out.stride(0), cache.k.stride(), cache.rows[2:])
        return schedule.name, plan.few, q.dtype, out.dtype, sinks is None, batch.slopes is None, *strides

    def _decode(self, batch: Batch, cache: Cache, decode: Decode) -> None:
        tree, heads, plan, rows, out = self.tree, self.heads, batch.plan, cache.rows, batch.out
        tiles = self._tiles(cache, rows, gluon=False) if decode.tma else (None, None)
        partial = (out, batch.sinks, self.scratch.state, self.scratch.acc)
        key = self._key(batch, cache, decode)
        shared = {"Q_HEADS": heads.query, "PDL": self.hopper}
        self._decode_kernel.launch(
            key, (heads.kv, plan.pieces.shape[0], -(-plan.few * heads.group // decode.rows)),
            batch.q, cache.k, cache.v, *tiles, *partial, plan.pieces, plan.counts, *self._lengths(batch),
            batch.q.stride(0), out.stride(0), *cache.k.stride()[:3], *rows[2:],
            batch.slopes, tree.slope_scale, tree.v_scale, plan.few,
            constants=lambda: {
                **self._by_pointers, **shared, "ROWS": decode.rows, "TMA": decode.tma, "STAGES": decode.stages,
                "num_warps": decode.warps,
            },
        )  # fmt: skip
        if self._several_splits(batch):
            # As many programs as the card holds at once: where most sequences have nothing to combine, more cost time.
            share = min(plan.few * heads.query, -(-2 * self.multiprocessors // plan.batch))
            self._combine_kernel.launch(
                key, (plan.batch, share, 1), *partial, plan.sequences, LOG2E, out.stride(0), tree.v_scale,
                constants=lambda: {
                    **shared, "FEW": plan.few, "D": tree.head_size, "WIDTH": tree.width, "SINK": tree.sink,
                    "E4M3": tree.e4m3, "BATCH": 16, "num_warps": tree.width // 32, "enable_fp_fusion": False,
                    "launch_pdl": self.hopper,
                },
            )  # fmt: skip

    def _several_splits(self, batch: Batch) -> bool:
        """Whether a sequence of this padded batch may have splits to combine."""
        return batch.page_table.shape[1] * self.heads.page > self.tree.split

    def _prefill(self, batch: Batch, cache: Cache, prefill: Prefill) -> None:
        tree, heads, plan, rows, q = self.tree, self.heads, batch.plan, cache.rows, batch.q
        if prefill.cuda:
            kernel = self._prefill_cuda[prefill.pieces]
            kernel.launch(batch, cache, self.scratch, tree.log2_scale, self.multiprocessors)
            if prefill.pieces and self._several_splits(batch):
                self._combine_blocks_kernel.launch(
                    self._key(batch, cache, prefill), (_COMBINERS * self.multiprocessors, 1, 1), batch.out,
                    self.scratch.state, self.scratch.acc, plan.cut_blocks, plan.counts, batch.out.stride(0),
                    constants=lambda: {
                        "Q_HEADS": heads.query, "D": tree.head_size, "ROWS": 8, "BATCH": 8, "PDL": self.hopper,
                        "num_warps": 4, "enable_fp_fusion": False, "launch_pdl": self.hopper,
                    },
                )  # fmt: skip
            return
        work = (batch.out, batch.sinks, plan.blocks, plan.counts, *self._lengths(batch))
        blocks, key = plan.blocks.shape[0], self._key(batch, cache, prefill)
        if prefill.warp_specialised:
            tokens = q.as_strided((q.shape[0], heads.query * tree.head_size), (q.stride(0), 1))
            self._prefill_ws_kernel.launch(
                key, (min(self.multiprocessors, blocks * heads.query), 1, 1),
                self._descriptor(tokens, 64, gluon=True), *self._tiles(cache, rows, gluon=True),
                *work, batch.out.stride(0), *rows[2:],
                constants=lambda: {
                    **self._constants, "HEADS": heads.query, "STAGES": prefill.stages, "num_warps": 4, "maxnreg": 168,
                },
            )  # fmt: skip
        else:
            self._prefill_kernel.launch(
                key, (blocks, heads.query, 1), q, cache.k, cache.v, *work, q.stride(0), batch.out.stride(0),
                *cache.k.stride()[:3], batch.slopes, tree.slope_scale, tree.v_scale,
                constants=lambda: {
                    **self._by_pointers, "ROWS": prefill.rows, "STAGES": prefill.stages, "num_warps": prefill.warps,
                },
            )  # fmt: skip

    def _check(self, batch: Batch, cache: Cache) -> None:
        tree, heads, q = self.tree, self.heads, batch.q
        for name, x in (("q", q), ("out", batch.out)):
            if x.shape[1:] != (heads.query, tree.head_size) or x.stride()[1:] != (tree.head_size, 1):
                raise ConfigurationError(
                    f"{name} must be [tokens, {heads.query}, {tree.head_size}] with adjacent heads, not "
                    f"{tuple(x.shape)} of strides {x.stride()}"
                )
        if cache.k.shape[1:] != (heads.page, heads.kv, tree.head_size) or cache.k.stride(3) != 1:
            raise ConfigurationError(f"the KV cache {tuple(cache.k.shape)} does not fit {heads} of {tree.head_size}")
        held = torch.float8_e4m3fn if tree.e4m3 else q.dtype
        if q.dtype not in (torch.bfloat16, torch.float16) or cache.k.dtype != held or cache.v.dtype != held:
            raise UnsupportedError(
                f"attention of {q.dtype} over a cache of {cache.k.dtype} is not covered: bf16 and fp16 are, over "
                f"{'e4m3, as the tree says' if tree.e4m3 else 'their own type'}"
            )
        if tree.sink and batch.sinks is None:
            raise ConfigurationError("the tree has attention sinks: pass sinks")
        if tree.alibi and batch.slopes is None:
            raise ConfigurationError("the tree has ALiBi: pass slopes")

    def _tiles(self, cache: Cache, rows: tuple[int, ...], gluon: bool) -> tuple[Any, Any]:
        """TMA descriptors of the cache's K and V, in tiles."""
        key = (cache.k.data_ptr(), cache.v.data_ptr(), rows, cache.k.stride(1), gluon)
        if key not in self._descriptors:
            views = (x.as_strided(rows[:2], (x.stride(1), 1)) for x in (cache.k, cache.v))
            self._descriptors[key] = tuple(self._descriptor(view, self.tree.tile, gluon) for view in views)
        return self._descriptors[key]

    def _descriptor(self, rows: torch.Tensor, height: int, gluon: bool) -> Any:
        block = [height, self.tree.head_size]
        if gluon:
            from triton.experimental.gluon.language import NVMMASharedLayout
            from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Tiles

            return Tiles.from_tensor(rows, block, NVMMASharedLayout(128, 16, 2))
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(rows, block)
