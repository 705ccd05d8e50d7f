"""Causal attention on a card: forward the server's kernels over its pages, backward FlashAttention's gradient."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_deterministic.integration.attention import PAGE, certified_context
from vllm_deterministic.kernels.attention import certify, launch, tree
from vllm_deterministic.kernels.attention.plan import Plan
from vllm_deterministic.kernels.attention.schedules import Decode, Heads, Prefill
from vllm_deterministic.kernels.attention.store import store
from vllm_deterministic.train.attention import Attention

__all__ = ["CUDAAttention"]

_ALONE = 2048  # tokens beyond which a sequence's gradient has the card for itself; a part of the order


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass
class _Workspace:
    """What layers of one shape use one after the other: certified kernels and pages."""

    attention: launch.Attention
    pages: torch.Tensor

    @classmethod
    def of(cls, size: int, heads: Heads, dtype: torch.dtype, device: torch.device) -> _Workspace:
        """Raises CertificationError where no schedule is on the tree."""
        scratch = launch.Scratch.empty(heads.query, size, device)
        attention = launch.Attention(tree.tree_for(size, kv_heads=heads.kv), heads, device, scratch)
        certify.prepare(attention, dtype, certified_context(attention.tree, sys.maxsize))
        return cls(attention, torch.empty(0, PAGE, heads.kv, 2 * size, dtype=dtype, device=device))

    def cache(self, pages: int) -> launch.Cache:
        """At least so many."""
        if len(self.pages) < pages:
            # Descriptors name the old pages, and would keep them.
            self.attention._descriptors.clear()
            self.pages = self.pages.new_empty(2 * pages, *self.pages.shape[1:])
        size = self.attention.tree.head_size
        return launch.Cache(self.pages[..., :size], self.pages[..., size:])


_workspaces: dict[tuple[int, Heads, torch.dtype, torch.device], _Workspace] = {}


class CUDAAttention(Attention):
    page = PAGE

    @functools.cached_property
    def _workspace(self) -> _Workspace:
        heads = Heads(self.heads, self.kv_heads, PAGE)
        key = (self.size, heads, self.dtype, self.packed.device)
        if key not in _workspaces:
            _workspaces[key] = _Workspace.of(*key)
        return _workspaces[key]

    @functools.cached_property
    def _step(self) -> tuple[Plan, Decode, Prefill | None]:
        """Work lists and schedules."""
        attention, longest = self._workspace.attention, max(self.packed.lengths)
        padded = len(self.packed.lengths), self.packed.rows
        decode, prefill = attention.schedules(*padded, longest)
        plan = attention.plan(*padded, longest, decode, prefill)
        plan.fill(self.starts, self.lengths, attention.tree)
        return plan, decode, prefill

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.contiguous().view(len(part), -1, self.size) for part in (q, k, v))
        plan, decode, prefill = self._step
        cache = self._workspace.cache(sum(self.pages))
        store(k, v, cache, self.slots)
        out = torch.empty_like(q)
        self._workspace.attention.run(launch.Batch(q, out, self.block_table, plan), cache, decode, prefill)
        return out.view(len(out), -1)

    def backward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In folding a sequence's gradient does not depend on the others."""
        if self.packed.folds is None:
            return self._backward(q, k, v, dout, self.starts, max(self.packed.lengths))
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for first, last, least in self._groups():
            before, lengths = sum(self.packed.lengths[:first]), self.packed.lengths[first:last]
            rows, empty = slice(before, before + sum(lengths)), max(0, least - len(lengths))
            starts = torch.nn.functional.pad(self.starts[first : last + 1] - before, (0, empty), value=sum(lengths))
            found = self._backward(q[rows], k[rows], v[rows], dout[rows], starts, max(lengths))
            for gradient, part in zip(gradients, found, strict=True):
                gradient[rows] = part
        return gradients

    def _groups(self) -> Iterator[tuple[int, int, int]]:
        """The calls of `_backward`: first sequence, the one after the last, and how many there must seem to be.

        FlashAttention cuts the keys into as many shares as it takes for all sequences and heads to fill the card. A
        long sequence is cut: it has a call for itself. Short ones are not, for empty ones stand beside them until the
        card is full.
        """
        first = 0
        for long, group in itertools.groupby(length > _ALONE for length in self.packed.lengths):
            last = first + len(list(group))
            if long:
                yield from ((i, i + 1, 1) for i in range(first, last))
            else:
                yield first, last, -(-_processors(self.packed.device) // self.heads)
            first = last

    def _backward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, starts: torch.Tensor, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """FlashAttention computes its own forward again, for the row sums that its backward needs."""
        flash, how = torch.ops.aten, {"scale": self.scale}
        q, k, v, dout = (part.view(len(part), -1, self.size) for part in (q, k, v, dout))
        longest = max(longest, 2)  # a batch of single tokens would run another kernel
        rows = (starts, starts, longest, longest)
        with _deterministic():
            out, sums, *random, _ = flash._flash_attention_forward(q, k, v, *rows, 0.0, True, False, **how)
            found = flash._flash_attention_backward(dout, q, k, v, out, sums, *rows, 0.0, True, *random, **how)
        dq, dk, dv = (part.reshape(len(part), -1) for part in found)
        return dq, dk, dv


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """FlashAttention's backward without atomics, whatever the process has chosen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # where it is only to warn, FlashAttention warns
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
