"""Who computes what: work lists written on the device, once for all layers of a step. Nothing here can change a bit.

The host knows padded sizes only, so that a CUDA graph captured once serves every step of its size. Lengths are read
here: sequences of few query tokens are cut into *pieces* (runs of splits, one decode program per piece and KV head)
so that the card is evenly full; longer ones into blocks of query tokens for the prefill kernel. Where those are too few
to fill the card, as a chat's next turn is, blocks are cut into pieces as well.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["Plan"]


@triton.jit
def _shortest(splits, count, low, high, slots):
    """The shortest length of pieces from `low` on that leaves no more of them than slots, where `count` lots of each
    number of splits are cut; `high` where there is none."""
    while low < high:
        middle = (low + high) // 2
        fits = tl.sum((splits + middle - 1) // middle * count, 0) <= slots
        low = tl.where(fits, low, middle + 1)
        high = tl.where(fits, middle, high)
    return low


@triton.jit(do_not_specialize=["slots", "capacity", "block_slots"])
def _plan(
    QUERY_START, KV_LEN, PIECES, BLOCKS, SEQUENCES, CUT_BLOCKS, COUNTS, batch, slots, capacity, block_slots,
    PADDED: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, CUT: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr,
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
    longest = tl.max((splits + pieces - 1) // tl.maximum(pieces, 1), 0)
    length = _shortest(splits, 1, share, longest, slots)
    cut = (splits + length - 1) // length
    if tl.sum(cut, 0) <= slots:
        pieces = cut
    if tl.sum(tl.where(pieces > 1, splits, 0), 0) * FEW > capacity:
        pieces = tl.minimum(pieces, 1)
    length = tl.maximum((splits + pieces - 1) // tl.maximum(pieces, 1), 1)
    pieces = (splits + length - 1) // length
    kept = tl.where(pieces > 1, splits - length + 1, 0)
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
        tl.store(
            to + 3, tl.where(slot < 0, -1, tl.where(i == 0, -2 - slot, slot + 1 + (i - 1) * length)), mask=i < pieces
        )
        tl.store(to + 4, start, mask=i < pieces)
        tl.store(to + 5, queries, mask=i < pieces)
        tl.store(to + 6, keys, mask=i < pieces)
    tl.store(COUNTS, tl.sum(pieces, 0))
    # --- blocks ---
    longer = tl.where(queries > FEW, queries, 0)
    blocks = (longer + BLOCK - 1) // BLOCK
    splits = tl.where(longer > 0, end, 0)
    pieces = tl.minimum(blocks, 1)
    length = splits
    kept = pieces * 0
    if CUT:
        longest = tl.max(splits, 0)
        shortest = _shortest(splits, (longer + UNIT - 1) // UNIT, tl.minimum(longest, 1), longest, block_slots)
        pieces = (splits + shortest - 1) // tl.maximum(shortest, 1)
        # Of the splits behind a block's first piece, each keeps the block's rows.
        height = tl.maximum(tl.minimum(longer, BLOCK), 1)
        room = capacity // tl.maximum(tl.sum(blocks, 0), 1) // height
        length = tl.maximum((splits + pieces - 1) // tl.maximum(pieces, 1), tl.maximum(splits - room, 0) + 1)
        pieces = (splits + length - 1) // length
        kept = tl.where(pieces > 1, (splits - length + 1) * height, 0)
        # Blocks that end in the first piece are not cut: those with no more keys than it.
        first_piece = tl.maximum(length * SPLIT - keys + queries, 0)
        whole = tl.where(first_piece < longer, first_piece // BLOCK, blocks)
        number = tl.cumsum(blocks - whole, 0) - blocks  # of a sequence's block 0, if it were one of the cut
        before = tl.cumsum(longer - tl.minimum(whole * BLOCK, longer), 0) - longer  # of its first row, likewise
        tl.store(COUNTS + 2, tl.sum(blocks - whole, 0))
        tl.store(COUNTS + 3, (tl.max(height, 0) + UNIT - 1) // UNIT)
    slot = tl.cumsum(blocks * kept, 0) - blocks * kept
    at = tl.cumsum(blocks * pieces, 0) - blocks * pieces
    for i in range(tl.max(blocks, 0)):
        rows = tl.minimum(queries - i * BLOCK, BLOCK)
        oldest = keys - queries + i * BLOCK
        here = (oldest + rows + SPLIT - 1) // SPLIT
        for piece in range(tl.max(pieces, 0)):
            mine = (i < blocks) & (piece < pieces)
            # The last block sees the most keys: it starts first.
            to = BLOCKS + (at + (blocks - 1 - i) * pieces + piece) * 8
            tl.store(to, b, mask=mine)
            tl.store(to + 1, start + i * BLOCK, mask=mine)
            tl.store(to + 2, rows, mask=mine)
            tl.store(to + 3, oldest, mask=mine)
            tl.store(to + 4, piece * length, mask=mine)
            tl.store(to + 5, tl.minimum((piece + 1) * length, here), mask=mine)
            later = slot + (1 + (piece - 1) * length) * rows
            tl.store(to + 6, tl.where(here > length, tl.where(piece == 0, -2 - slot, later), -1), mask=mine)
        if CUT:
            to = CUT_BLOCKS + (number + i) * 8
            mine = (i < blocks) & (here > length)
            tl.store(to, slot, mask=mine)
            tl.store(to + 1, length, mask=mine)
            tl.store(to + 2, here, mask=mine)
            tl.store(to + 3, start + i * BLOCK, mask=mine)
            tl.store(to + 4, rows, mask=mine)
            tl.store(to + 5, before + i * BLOCK, mask=mine)
        slot += kept
    tl.store(COUNTS + 1, tl.sum(blocks * pieces, 0))


@dataclass
class Plan:
    """The work lists of one padded batch; int32, on the device.

    pieces: [slots + batch, 8] sequence, first split, end split, where the scratch keeps the first of them, first row of
    its queries, how many, keys, unused. The scratch: -1 for a whole sequence, which keeps nothing, -2 - slot for a
    sequence's first piece, which keeps its merged splits in one slot; splits behind it have the slots behind that.
    sequences: [batch, 8] scratch slot, splits per piece, splits, first row, rows.
    blocks: [tokens // block + batch, at least block_slots; 8] sequence, first row, rows, position of the first, first
    split, end split, and as in pieces where the scratch keeps them, but in query tokens: a split of a block has as many
    as the block has rows. A piece may be of no splits. cut_blocks: [block_slots, 8] as sequences, of blocks that are
    cut, and how many rows those before it have.
    counts: [4] how many pieces, pieces of blocks and cut blocks there are, and units of the largest block.
    few: sequences of up to so many query tokens are pieces. block: query tokens per block. unit: query tokens of what a
    prefill's program works on at a time. slots, block_slots: pieces, and units of blocks, that the card works on at a
    time; no block is cut with 0. capacity: query tokens of splits that the scratch holds.
    """

    batch: int
    tokens: int
    few: int
    block: int
    unit: int
    slots: int
    block_slots: int
    capacity: int
    pieces: torch.Tensor
    blocks: torch.Tensor
    sequences: torch.Tensor
    cut_blocks: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        tokens: int,
        *,
        few: int,
        block: int,
        slots: int,
        capacity: int,
        device: torch.device | str,
        unit: int = 1,
        block_slots: int = 0,
    ) -> Plan:
        """For up to `batch` sequences with `tokens` query tokens in all."""

        def table(rows: int, columns: int) -> torch.Tensor:
            return torch.zeros(rows, columns, dtype=torch.int32, device=device)

        return cls(
            batch, tokens, few, block, unit, slots, block_slots, capacity, table(slots + batch, 8),
            table(max(tokens // block + batch, block_slots), 8), table(batch, 8),
            table(block_slots, 8), table(1, 4)[0],
        )  # fmt: skip

    def part(self, batch: int, tokens: int, slots: int, block_slots: int) -> Plan:
        """The same lists for a smaller padded batch: a graph captured for one size and one for another share memory."""
        pieces, blocks = self.pieces[: slots + batch], self.blocks[: max(tokens // self.block + batch, block_slots)]
        changed = {"batch": batch, "tokens": tokens, "slots": slots, "block_slots": block_slots}
        return dataclasses.replace(self, **changed, pieces=pieces, blocks=blocks)

    def fill(self, query_start: torch.Tensor, kv_len: torch.Tensor, split: int, window: int) -> None:
        """Reads the lengths on the device. query_start: [batch + 1], kv_len: [batch]; both int32. A padding sequence
        has no query tokens."""
        _plan[(1,)](
            query_start, kv_len, self.pieces, self.blocks, self.sequences, self.cut_blocks, self.counts, self.batch,
            self.slots, self.capacity, self.block_slots, PADDED=max(triton.next_power_of_2(self.batch), 32),
            FEW=self.few, BLOCK=self.block, UNIT=self.unit, CUT=len(self.cut_blocks) > 0, SPLIT=split, WINDOW=window,
            num_warps=4,
        )  # fmt: skip
