"""Merges what the pieces of a prefill's blocks kept (prefill.cu), in ascending order of splits: the tree of tree.py.

As decode's combine, but of so many rows that programs take several at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .arithmetic import finish, merge

__all__ = ["combine_blocks"]


@triton.jit
def combine_blocks(
    O, STATE, ACC, CUT_BLOCKS, COUNTS, o_token,
    Q_HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: programs that take turns, over the rows (query token, head) of all cut blocks, ROWS at a time.

    CUT_BLOCKS, COUNTS: plan.py. STATE: [query tokens * heads, 2] m and l; ACC: [query tokens * heads, D]. A block's
    first slot holds a merge already; its splits ascend behind it.
    """
    blocks = tl.load(COUNTS + 2)
    programs = tl.num_programs(0)
    d = tl.arange(0, D)
    if PDL:
        gdc_wait()
    for block in range(blocks):
        at = CUT_BLOCKS + block * 8
        slot = tl.load(at).to(tl.int64)
        merged, splits, start = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        rows, before = tl.load(at + 4) * Q_HEADS, tl.load(at + 5) * Q_HEADS
        turn = (tl.program_id(0) + programs - before // ROWS % programs) % programs
        for first in range(turn * ROWS, rows, programs * ROWS):
            place = first + tl.arange(0, ROWS)
            real = place < rows
            row = slot * Q_HEADS + place
            M = tl.load(STATE + row * 2, mask=real, other=0.0)
            L = tl.load(STATE + row * 2 + 1, mask=real, other=1.0)
            A = tl.load(ACC + ((row * D)[:, None] + d[None, :]), mask=real[:, None], other=0.0)
            row += rows
            for split in range(merged, splits, BATCH):
                # All of a batch are on their way before the first is merged.
                batch = ()
                for i in tl.static_range(BATCH):
                    # Past the end -inf and zeros, which change nothing. As wide as a row: Triton's interpreter cannot
                    # broadcast a truth value.
                    there = real & (place * 0 + split + i < splits)
                    m = tl.load(STATE + row * 2, mask=there, other=float("-inf"))
                    l = tl.load(STATE + row * 2 + 1, mask=there, other=0.0)
                    acc = tl.load(ACC + ((row * D)[:, None] + d[None, :]), mask=there[:, None], other=0.0)
                    batch += ((m, l, acc),)
                    row += rows
                for i in tl.static_range(BATCH):
                    m, l, acc = batch[i]
                    M, L, A = merge(M, L, A, m, l, acc)
            o = finish(M, L, A, M, 1.0, False, False)
            to = (start + place // Q_HEADS).to(tl.int64) * o_token + place % Q_HEADS * D
            tl.store(O + (to[:, None] + d[None, :]), o.to(O.dtype.element_ty), mask=real[:, None])
