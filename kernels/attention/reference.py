"""Attention's tree in plain torch, step by step, and the exact answer it approximates.

`follow` is the meaning of the kernels: the numbers of the steps are those in tree.py. It is not their bits: torch has
no tensor-core chain (steps 1 and 6 are summed as torch sums) and its exp2 is not the card's ex2. The bits are defined
by the simplest kernel on the tree (certify.py), which is held to `exact`.
"""

from __future__ import annotations

import math

import torch

from .tree import E4M3_MAX, LOG2E, Tree

__all__ = ["exact", "follow", "quantised"]


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[heads, rows, keys] of q [rows, heads, D] and k [keys, kv heads, D]; heads of one group share a kv head."""
    group = q.shape[1] // k.shape[1]
    return torch.einsum("thd,khd->htk", q, k.repeat_interleave(group, 1))


def _visible(tree: Tree, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    seen = keys[None, :] <= positions[:, None]
    if tree.window:
        seen &= keys[None, :] > positions[:, None] - tree.window
    return seen


def _biases(slopes: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[heads, rows, keys] of ALiBi."""
    return slopes[:, None, None] * (keys[None, :] - positions[:, None])


def quantised(x: torch.Tensor, scale: float) -> torch.Tensor:
    """What an e4m3 cache holds of keys or values."""
    # By a tensor: torch divides by a number on a card as it multiplies with the inverse.
    divisor = torch.tensor(scale, dtype=torch.float32, device=x.device)
    return (x.float() / divisor).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def follow(
    tree: Tree,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 [rows, heads, D]: queries at positions start, start + 1 … over keys from 0.

    q: [rows, heads, D], k and v: [keys, kv heads, D] as the cache holds them, of q's type or e4m3; sinks, slopes:
    [heads] fp32 where the tree has them.
    """
    rows, heads, size = q.shape
    half, c = q.dtype, torch.tensor(tree.log2_scale, dtype=torch.float32)
    positions = torch.arange(start, start + rows)
    minus = torch.full((heads, rows, 1), -math.inf)
    zero = torch.zeros(heads, rows, 1)
    group = heads // k.shape[1]

    def merge(state: tuple[torch.Tensor, ...], part: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        top = torch.maximum(state[0], part[0])  # 7
        base = torch.where(top == -math.inf, zero, top)
        a, b = torch.exp2(state[0] - base), torch.exp2(part[0] - base)
        return top, state[1] * a + part[1] * b, state[2] * a + part[2] * b

    total = (minus, zero, torch.zeros(heads, rows, size))
    splits = tree.splits(start + rows)
    for split, end in zip(splits, [*splits[1:], start + rows], strict=True):
        m, l, acc = minus, zero, torch.zeros(heads, rows, size)
        for tile in range(split, end, tree.tile):
            keys = torch.arange(tile, min(tile + tree.tile, start + rows))
            x = _scores(q.float(), k[keys].float())  # 1
            if tree.softcap:
                x = 1 - 2 / (1 + torch.exp2(x * tree.tanh_scale))
            if tree.alibi:
                assert slopes is not None
                x = (x.double() + _biases((slopes * tree.slope_scale).double(), positions, keys)).float()
            x = x.masked_fill(~_visible(tree, positions, keys), -math.inf)  # 2
            top = torch.maximum(m, x.amax(-1, keepdim=True) * c)  # 3
            base = torch.where(top == -math.inf, zero, top)
            p, alpha = torch.exp2(x * c - base), torch.exp2(m - base)  # 4
            r = torch.nn.functional.pad(p, (0, tree.tile - len(keys)))
            while r.shape[-1] > 1:  # 5
                r = r[..., : r.shape[-1] // 2] + r[..., r.shape[-1] // 2 :]
            l = l * alpha + r  # 6
            values = v[keys].float().repeat_interleave(group, 1)
            acc = acc * alpha + torch.einsum("htk,khd->htd", p.to(half).float(), values)
            m = top
        total = merge(total, (m, l, acc))
    if tree.sink:  # 8
        assert sinks is not None
        total = merge(
            total, ((sinks.float() * LOG2E)[:, None, None].expand(heads, rows, 1), zero + 1, torch.zeros_like(total[2]))
        )
    out = torch.where(total[1] == 0, torch.zeros_like(total[2]), total[2] * (tree.v_scale / total[1]) + 0.0)  # 9
    return out.transpose(0, 1)


def exact(
    tree: Tree,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp64 [rows, heads, D]: softmax attention by its definition. Arguments as `follow`; on any device."""
    positions = torch.arange(start, start + q.shape[0], device=q.device)
    x = _scores(q.double(), k.double()) * tree.scale * tree.k_scale
    if tree.softcap:
        x = tree.softcap * torch.tanh(x / tree.softcap)
    keys = torch.arange(k.shape[0], device=q.device)
    if tree.alibi:
        assert slopes is not None
        x = x + _biases(slopes.double(), positions, keys)
    x = x.masked_fill(~_visible(tree, positions, keys), -math.inf)
    if tree.sink:
        assert sinks is not None
        x = torch.cat([x, sinks.double()[:, None, None].expand(-1, x.shape[1], 1)], -1)
    p = x.softmax(-1)[..., : k.shape[0]]
    values = v.double().repeat_interleave(q.shape[1] // k.shape[1], 1) * tree.v_scale
    return torch.einsum("htk,khd->thd", p, values)
