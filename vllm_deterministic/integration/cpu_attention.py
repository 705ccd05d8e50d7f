"""Attention of the CPU engine: vLLM's own kernel, asked so that it stays on one tree."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

from vllm_deterministic import compat
from vllm_deterministic.kernels.attention import cpu

__all__ = ["arm"]


def arm() -> None:
    """Installs the seam in this worker process. Idempotent. Raises SeamError."""
    # Splitting a long row among idle cores depends on how many rows the neighbours bring. Read when the metadata
    # builder runs, so before the first step is enough.
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
    compat.install(compat.CPU_SEAMS["attention"], _in_rounds_of_one)


def _in_rounds_of_one(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def wrapped(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        batch = common_attn_metadata
        most = cpu.tokens_of_a_round(self.isa, self.num_heads, self.num_kv_heads)
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
