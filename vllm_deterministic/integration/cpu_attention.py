"""Attention of the CPU engine: vLLM's own kernel, asked so that it stays on one tree."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from vllm import _custom_ops as ops

from vllm_deterministic import compat
from vllm_deterministic.kernels.attention import cpu

__all__ = ["Shape", "arm", "certified", "certify_layers", "one_sequence", "seconds"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel's arithmetic may depend on. window: tokens that a query sees to its left; -1 for all."""

    isa: str
    heads: int
    groups: int
    head_size: int
    dtype: torch.dtype
    page: int
    window: int


# Shape -> query tokens of a round, and the seconds that certifying them took.
_certified: dict[Shape, tuple[int, float]] = {}


def arm() -> None:
    """Installs the seam in this worker process. Idempotent. Raises SeamError."""
    # Splitting a long row among idle cores depends on how many rows the neighbours bring. Read when the metadata
    # builder runs, so before the first step is enough.
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
    compat.install(compat.CPU_SEAMS["attention"], _in_rounds_of_one)


def certified() -> list[dict[str, Any]]:
    """The certified attention shapes of this worker."""
    return [
        {
            "operator": "attention", **dataclasses.asdict(shape), "dtype": str(shape.dtype).removeprefix("torch."),
            "schedules": [(1, most)],
        }
        for shape, (most, _) in _certified.items()
    ]  # fmt: skip


def seconds() -> float:
    """What certification took in this process."""
    return sum(took for _, took in _certified.values())


def _in_rounds_of_one(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def wrapped(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        batch = common_attn_metadata
        most = _round(self)
        if batch.max_query_len > most:
            starts, lengths, owner = cpu.pieces(batch.query_start_loc, batch.seq_lens, most)
            batch = dataclasses.replace(
                batch,
                num_reqs=len(owner),
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=lengths,
                max_query_len=most,
                block_table_tensor=batch.block_table_tensor[owner],
            )
        return build(self, common_prefix_len, batch, fast_build)

    return wrapped


def certify_layers(groups: Iterable[Iterable[Any]]) -> None:
    """Certifies the attention of a model runner's layers before the first request. Raises CertificationError."""
    for group in itertools.chain.from_iterable(groups):
        for builder in group.metadata_builders:
            _round(builder)


def _round(builder: Any) -> int:
    """Query tokens of a round."""
    shape = Shape(
        builder.isa,
        builder.num_heads,
        builder.num_kv_heads,
        builder.head_dim,
        builder.dtype,
        builder.block_size,
        builder.window_size,
    )
    if shape not in _certified:
        most = cpu.tokens_of_a_round(shape.isa, shape.heads, shape.groups)
        start = time.perf_counter()
        cpu.certify(one_sequence(shape), most)
        _certified[shape] = (most, time.perf_counter() - start)
    return _certified[shape][0]


def one_sequence(shape: Shape) -> cpu.Attend:
    """The kernel over one sequence of random keys and values, in pages of its own."""
    generator = torch.Generator().manual_seed(0)
    tokens, pages = cpu.CONTEXT, -(-cpu.CONTEXT // shape.page)
    queries, new_keys, new_values = (
        torch.randn(tokens, heads, shape.head_size, generator=generator).to(shape.dtype)
        for heads in (shape.heads, shape.groups, shape.groups)
    )
    # As vLLM lays it out: a page holds the keys of a head, then its values.
    cache = torch.zeros(pages, shape.groups, 2 * shape.page, shape.head_size, dtype=shape.dtype)
    keys, values = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(new_keys, new_values, keys, values, torch.arange(tokens), shape.isa)

    def attend(chunks: Sequence[tuple[int, int]]) -> torch.Tensor:
        query = torch.cat([queries[start:stop] for start, stop in chunks])
        lengths = torch.tensor([stop for _, stop in chunks], dtype=torch.int32)
        starts = torch.tensor([0, *(stop - start for start, stop in chunks)]).cumsum(0).int()
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(chunks), num_heads=shape.heads, num_kv_heads=shape.groups, head_dim=shape.head_size,
            seq_lens=lengths, dtype=shape.dtype, query_start_loc=starts, causal=True,
            sliding_window_size=shape.window, isa=shape.isa, enable_kv_split=False,
        )  # fmt: skip
        output = torch.empty_like(query)
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=keys, value_cache=values, output=output, query_start_loc=starts, seq_lens=lengths,
            scale=shape.head_size**-0.5, causal=True, alibi_slopes=None, sliding_window=shape.window,
            block_table=torch.arange(pages, dtype=torch.int32).expand(len(chunks), -1).contiguous(), softcap=0.0,
            scheduler_metadata=plan, s_aux=None,
        )  # fmt: skip
        return output

    return attend
