"""Who computes what: work lists written on the device, once for all layers of a step. Nothing here can change a bit.

The host knows padded sizes only, so that a CUDA graph captured once serves every step of its size. Lengths are read
here: sequences of few query tokens are cut into *pieces* (runs of splits, one decode program per piece and KV head)
so that the card is evenly full; longer ones into blocks of query tokens for the prefill kernel.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["Plan"]


@triton.jit(do_not_specialize=["slots", "capacity"])
def _plan(
    QUERY_START, KV_LEN, PIECES, BLOCKS, SEQUENCES, COUNTS, batch, slots, capacity,
    PADDED: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, PADDED)
    real = b < batch
    start = tl.load(QUERY_START + b, mask=real, other=0)
    queries = tl.load(QUERY_START + b + 1, mask=real, other=0) - start
    keys = tl.load(KV_LEN + b, mask=real, other=0)
    few = (queries > 0) & (queries <= FEW)
    first = tl.zeros((PADDED,), tl.int32)
    if WINDOW > 0:
        first = tl.maximum(keys - queries - WINDOW + 1, 0) // SPLIT
    end = (keys + SPLIT - 1) // SPLIT
    splits = tl.where(few, end - first, 0)
    # Even pieces: as many per sequence as its share of the slots, so there are at most slots + batch of them.
    share = tl.maximum((tl.sum(splits, 0) + slots - 1) // slots, 1)
    pieces = tl.where(few, tl.maximum(splits // share, 1), 0)
    # That is rounded down: of 4 x 63 splits, 16 slots get 4 x 3 pieces of 21. Taken instead, where there is one: the
    # shortest length that is no longer than these pieces and leaves no more pieces than slots (there, 16).
    length = share
    longest = tl.max((splits + pieces - 1) // tl.maximum(pieces, 1), 0)
    while length < longest:
        middle = (length + longest) // 2
        fits = tl.sum((splits + middle - 1) // middle, 0) <= slots
        length = tl.where(fits, length, middle + 1)
        longest = tl.where(fits, middle, longest)
    cut = (splits + length - 1) // length
    if tl.sum(cut, 0) <= slots:
        pieces = cut
    if tl.sum(tl.where(pieces > 1, splits, 0), 0) > capacity:
        pieces = tl.minimum(pieces, 1)
    length = tl.maximum((splits + pieces - 1) // tl.maximum(pieces, 1), 1)
    pieces = (splits + length - 1) // length
    kept = tl.where(pieces > 1, splits, 0)
    slot = tl.where(pieces > 1, tl.cumsum(kept, 0) - kept, -1)
    tl.store(SEQUENCES + b * 8, slot, mask=real)
    tl.store(SEQUENCES + b * 8 + 1, length, mask=real)
    tl.store(SEQUENCES + b * 8 + 2, splits, mask=real)
    tl.store(SEQUENCES + b * 8 + 3, start, mask=real)
    tl.store(SEQUENCES + b * 8 + 4, queries, mask=real)
    at = tl.cumsum(pieces, 0) - pieces
    for i in range(tl.max(pieces, 0)):
        to = PIECES + (at + i) * 8
        tl.store(to, b, mask=i < pieces)
        tl.store(to + 1, first + i * length, mask=i < pieces)
        tl.store(to + 2, tl.minimum(first + (i + 1) * length, end), mask=i < pieces)
        # Negative for a piece that begins its sequence: -1 where it is all of it, else -2 - slot.
        tl.store(to + 3, tl.where(slot < 0, -1, tl.where(i == 0, -2 - slot, slot + i * length)), mask=i < pieces)
        tl.store(to + 4, start, mask=i < pieces)
        tl.store(to + 5, queries, mask=i < pieces)
        tl.store(to + 6, keys, mask=i < pieces)
    blocks = tl.where(queries > FEW, (queries + BLOCK - 1) // BLOCK, 0)
    at = tl.cumsum(blocks, 0) - blocks
    for i in range(tl.max(blocks, 0)):
        # The last block sees the most keys: it starts first.
        to = BLOCKS + (at + blocks - 1 - i) * 4
        tl.store(to, b, mask=i < blocks)
        tl.store(to + 1, start + i * BLOCK, mask=i < blocks)
        tl.store(to + 2, tl.minimum(queries - i * BLOCK, BLOCK), mask=i < blocks)
        tl.store(to + 3, keys - queries + i * BLOCK, mask=i < blocks)
    tl.store(COUNTS, tl.sum(pieces, 0))
    tl.store(COUNTS + 1, tl.sum(blocks, 0))


@dataclass
class Plan:
    """The work lists of one padded batch; int32, on the device.

    pieces: [slots + batch, 8] sequence, first split, end split, where the scratch keeps the first of them, first row of
    its queries, how many, keys, unused. The scratch: -1 for a whole sequence, which keeps nothing, -2 - slot for a
    sequence's first piece, which keeps its merged splits in one slot. blocks: [tokens // block + batch, 4] sequence,
    first row, rows, position of the first. sequences: [batch, 8] scratch slot, splits per piece, splits, first
    row, rows.
    counts: [2] how many pieces and blocks there are. few: sequences of up to so many query tokens are pieces.
    block: query tokens per block.
    """

    batch: int
    tokens: int
    few: int
    block: int
    slots: int
    capacity: int
    pieces: torch.Tensor
    blocks: torch.Tensor
    sequences: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def empty(
        cls, batch: int, tokens: int, *, few: int, block: int, slots: int, capacity: int, device: torch.device | str
    ) -> Plan:
        """For up to `batch` sequences with `tokens` query tokens in all, and `capacity` splits of scratch."""

        def table(rows: int, columns: int) -> torch.Tensor:
            return torch.zeros(rows, columns, dtype=torch.int32, device=device)

        return cls(
            batch, tokens, few, block, slots, capacity,
            table(slots + batch, 8), table(tokens // block + batch, 4), table(batch, 8), table(1, 2)[0],
        )  # fmt: skip

    def part(self, batch: int, tokens: int, slots: int) -> Plan:
        """The same lists for a smaller padded batch: a graph captured for one size and one for another share memory."""
        pieces, blocks = self.pieces[: slots + batch], self.blocks[: tokens // self.block + batch]
        return dataclasses.replace(self, batch=batch, tokens=tokens, slots=slots, pieces=pieces, blocks=blocks)

    def fill(self, query_start: torch.Tensor, kv_len: torch.Tensor, split: int, window: int) -> None:
        """Reads the lengths on the device. query_start: [batch + 1], kv_len: [batch]; both int32. A padding sequence
        has no query tokens."""
        _plan[(1,)](
            query_start, kv_len, self.pieces, self.blocks, self.sequences, self.counts, self.batch, self.slots,
            self.capacity, PADDED=max(triton.next_power_of_2(self.batch), 32), FEW=self.few, BLOCK=self.block,
            SPLIT=split, WINDOW=window, num_warps=4,
        )  # fmt: skip
