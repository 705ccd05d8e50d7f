"""Causal attention on CPU: vLLM's own kernel forward, plain f32 products sequence by sequence backward."""

from __future__ import annotations

from functools import cached_property

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_deterministic.kernels.attention import cpu
from vllm_deterministic.train.attention import Attention

__all__ = ["PAGE", "CPUAttention"]

PAGE = 128  # the server's KV-cache page


class CPUAttention(Attention):
    page = PAGE

    @cached_property
    def isa(self) -> str:
        return str(_get_attn_isa(self.dtype, PAGE, self.size, "auto"))

    @cached_property
    def _requests(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Starts [requests + 1], lengths and rows of the block table, as the server's attention is asked: in rounds."""
        most = cpu.tokens_of_a_round(self.isa, self.heads, self.kv_heads)
        starts, lengths, owner = cpu.pieces(self.starts, self.lengths, most)
        return starts, lengths, self.block_table[owner]

    @cached_property
    def _schedule(self) -> torch.Tensor:
        starts, lengths, _ = self._requests
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.size,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=False,
        )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.view(len(part), -1, self.size) for part in (q, k, v))
        cache = q.new_zeros(sum(self.pages), self.kv_heads, 2 * PAGE, self.size)
        keys, values = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(k, v, keys, values, self.slots, self.isa)
        starts, lengths, table = self._requests
        out = torch.empty(q.shape, dtype=q.dtype)
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=self._schedule,
            s_aux=None,
        )
        return out.view(len(out), -1)

    def backward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows in self.packed.slices():
            found = self._backward(*(part[rows].float() for part in (q, k, v, dout)))
            for gradient, part in zip(gradients, found, strict=True):
                gradient[rows] = part
        return gradients

    def _backward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One sequence, in f32, its probabilities computed anew. Query heads of one key share its product."""
        length, group = q.shape[0], self.heads // self.kv_heads
        q, k, v = (part.view(length, -1, self.size) for part in (q, k, v))
        q = self._grouped(q, group)
        dout = self._grouped(dout.view(length, -1, self.size), group)
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1).repeat_interleave(group, dim=0)
        p = (q @ k.transpose(1, 2) * self.scale).masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        dp = dout @ v.transpose(1, 2)
        ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * self.scale
        dq = (ds @ k).view(self.kv_heads, length, group, self.size).permute(1, 0, 2, 3).reshape(length, -1)
        dk = (ds.transpose(1, 2) @ q).transpose(0, 1).reshape(length, -1)
        dv = (p.transpose(1, 2) @ dout).transpose(0, 1).reshape(length, -1)
        return dq, dk, dv

    def _grouped(self, x: torch.Tensor, group: int) -> torch.Tensor:
        """[length, heads, size] -> [kv_heads, length * group, size]: the queries of one key head, token by token."""
        return x.view(x.shape[0], self.kv_heads, group, self.size).transpose(0, 1).reshape(self.kv_heads, -1, self.size)
