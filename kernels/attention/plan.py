"""Who computes what: work lists written on the device, once for all layers of a step. Nothing here can change a bit.

The host knows padded sizes only, so that a CUDA graph captured once serves every step of its size. Lengths are read
here: sequences of few query tokens are cut into *pieces* (one decode program per piece and KV head) so that the card
is evenly full; longer ones into blocks of query tokens for the prefill kernel. Where those are too few to fill the
card, as a chat's next turn is, blocks are cut into pieces as well.

Lengths are in units: splits before they double (tree.py, `steady`), halves of splits after. A piece of a sequence is a
run of single splits and a run of double ones, so that a unit more or less evens out; of a block, one run of either.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .arithmetic import split_of
from .tree import Tree

__all__ = ["Plan"]


@triton.jit
def _pieces(units, doubles, length):
    """How many pieces of at most `length` units a sequence is; so many of its splits are of two."""
    half = tl.maximum(length // 2, 1)
    return tl.maximum((units + length - 1) // length, (doubles + half - 1) // half)


@triton.jit
def _length(units, doubles, pieces):
    """The shortest length of so many pieces."""
    pieces = tl.maximum(pieces, 1)
    return tl.maximum(tl.maximum((units + pieces - 1) // pieces, (doubles + pieces - 1) // pieces * 2), 1)


@triton.jit
def _before(i, pieces, length, singles, doubles):
    """How many of a sequence's single and of its double splits the pieces before piece i hold. Double ones fill the
    last pieces, single ones what is left from the first piece on."""
    twos = tl.maximum(doubles - tl.maximum(length // 2, 1) * (pieces - i), 0)
    return tl.minimum(i * length - 2 * twos, singles), twos


@triton.jit
def _split(unit, STEADY: tl.constexpr):
    """How many splits end in so many units; a split that is half there counts."""
    return split_of(unit - 1, 1, STEADY) + 1


@triton.jit
def _shortest(units, doubles, count, low, high, slots):
    """The shortest length of pieces from `low` on that leaves no more of them than slots, where `count` lots of each
    number of units are cut; `high` where there is none."""
    while low < high:
        middle = (low + high) // 2
        fits = tl.sum(_pieces(units, doubles, middle) * count, 0) <= slots
        low = tl.where(fits, low, middle + 1)
        high = tl.where(fits, middle, high)
    return low


@triton.jit(do_not_specialize=["few", "slots", "capacity", "block_slots"])
def _plan(
    QUERY_START, KV_LEN, PIECES, BLOCKS, SEQUENCES, CUT_BLOCKS, COUNTS, batch, few, slots, capacity, block_slots,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, CUT: tl.constexpr,
    SPLIT: tl.constexpr, STEADY: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, PADDED)
    real = b < batch
    start = tl.load(QUERY_START + b, mask=real, other=0)
    queries = tl.load(QUERY_START + b + 1, mask=real, other=0) - start
    keys = tl.load(KV_LEN + b, mask=real, other=0)
    decoded = (queries > 0) & (queries <= few)
    first = tl.zeros((PADDED,), tl.int32)
    if WINDOW > 0:
        first = tl.maximum(keys - queries - WINDOW + 1, 0) // SPLIT
    end = (keys + SPLIT - 1) // SPLIT
    splits = tl.where(decoded, _split(end, STEADY) - first, 0)
    doubles = splits * 0
    if STEADY > 0:
        doubles = tl.maximum(splits - STEADY, 0)
    units = splits + doubles
    # Even pieces: as many per sequence as its share of the slots, so there are at most slots + batch of them.
    share = tl.maximum((tl.sum(units, 0) + slots - 1) // slots, tl.where(tl.max(doubles, 0) > 0, 2, 1))
    pieces = tl.where(decoded, tl.maximum(units // share, 1), 0)
    # That is rounded down: of 4 x 63 units, 16 slots get 4 x 3 pieces of 21. Taken instead, where there is one: the
    # shortest length that is no longer than these pieces and leaves no more pieces than slots (there, 16).
    longest = tl.max(_length(units, doubles, pieces), 0)
    length = _shortest(units, doubles, 1, share, longest, slots)
    cut = _pieces(units, doubles, length)
    if tl.sum(cut, 0) <= slots:
        pieces = cut
    if tl.sum(tl.where(pieces > 1, splits, 0), 0) * few > capacity:
        pieces = tl.minimum(pieces, 1)
    length = _length(units, doubles, pieces)
    pieces = _pieces(units, doubles, length)
    singles = splits - doubles
    merged, _ = _before(1, pieces, length, singles, doubles)
    kept = tl.where(pieces > 1, splits - merged + 1, 0)
    slot = tl.where(pieces > 1, tl.cumsum(kept, 0) - kept, -1)
    tl.store(SEQUENCES + b * 8, slot, mask=real)
    tl.store(SEQUENCES + b * 8 + 1, merged, mask=real)
    tl.store(SEQUENCES + b * 8 + 2, splits, mask=real)
    tl.store(SEQUENCES + b * 8 + 3, start, mask=real)
    tl.store(SEQUENCES + b * 8 + 4, queries, mask=real)
    at = tl.cumsum(pieces, 0) - pieces
    for i in range(tl.max(pieces, 0)):
        to = PIECES + (at + i) * 16
        mine = i < pieces
        ones, twos = _before(i, pieces, length, singles, doubles)
        ones_end, twos_end = _before(i + 1, pieces, length, singles, doubles)
        tl.store(to, b, mask=mine)
        tl.store(to + 1, first + ones, mask=mine)
        tl.store(to + 2, first + ones_end, mask=mine)
        # Negative for a piece that begins its sequence: -1 where it is all of it, else -2 - slot.
        tl.store(to + 3, tl.where(slot < 0, -1, tl.where(i == 0, -2 - slot, slot)), mask=mine)
        tl.store(to + 4, start, mask=mine)
        tl.store(to + 5, queries, mask=mine)
        tl.store(to + 6, keys, mask=mine)
        tl.store(to + 7, slot + 1 - first - merged, mask=mine)
        tl.store(to + 8, singles + twos, mask=mine)
        tl.store(to + 9, singles + twos_end, mask=mine)
    tl.store(COUNTS, tl.sum(pieces, 0))
    # --- blocks ---
    longer = tl.where(queries > few, queries, 0)
    blocks = (longer + BLOCK - 1) // BLOCK
    units = tl.where(longer > 0, end, 0)
    pieces = tl.minimum(blocks, 1)
    length = units
    kept = pieces * 0
    if CUT:
        longest = tl.max(units, 0)
        programs = (longer + UNIT - 1) // UNIT
        shortest = _shortest(units, units * 0, programs, tl.minimum(longest, 1), longest, block_slots)
        pieces = (units + shortest - 1) // tl.maximum(shortest, 1)
        # Of the splits behind a block's first piece, each keeps the block's rows.
        height = tl.maximum(tl.minimum(longer, BLOCK), 1)
        room = capacity // tl.maximum(tl.sum(blocks, 0), 1) // height
        length = tl.maximum((units + pieces - 1) // tl.maximum(pieces, 1), tl.maximum(units - room, 0) + 1)
        if STEADY > 0:  # an even number of units ends no double split in its middle
            length += tl.where(units > STEADY, length % 2, 0)
        pieces = (units + length - 1) // length
        first_splits = _split(length, STEADY)
        kept = tl.where(pieces > 1, (_split(units, STEADY) - first_splits + 1) * height, 0)
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
            later = slot
            if CUT:
                later += (1 + _split(piece * length, STEADY) - first_splits) * rows
            tl.store(to + 6, tl.where(here > length, tl.where(piece == 0, -2 - slot, later), -1), mask=mine)
        if CUT:
            to = CUT_BLOCKS + (number + i) * 8
            mine = (i < blocks) & (here > length)
            tl.store(to, slot, mask=mine)
            tl.store(to + 1, first_splits, mask=mine)
            tl.store(to + 2, _split(here, STEADY), mask=mine)
            tl.store(to + 3, start + i * BLOCK, mask=mine)
            tl.store(to + 4, rows, mask=mine)
            tl.store(to + 5, before + i * BLOCK, mask=mine)
        slot += kept
    tl.store(COUNTS + 1, tl.sum(blocks * pieces, 0))


@dataclass
class Plan:
    """The work lists of one padded batch; int32, on the device.

    pieces: [slots + batch, 16] sequence, first split, end split, scratch slot of the sequence, first row of its
    queries, how many, keys, what a split's slot is ahead of its number, first and end split of the second run. The
    scratch slot: -1 for a whole sequence, which keeps nothing, -2 - slot for a sequence's first piece, which keeps its
    merged first run in that slot; splits behind it have the slots behind that.
    sequences: [batch, 8] scratch slot, splits merged there, splits, first row, rows.
    blocks: [tokens // block + batch, at least block_slots; 8] sequence, first row, rows, position of the first, first
    unit, end unit, and where the scratch keeps its splits, in query tokens (a split of a block has as many as the block
    has rows): -1, -2 - place of the merged first piece, or the place of the first. A piece may be of no splits.
    cut_blocks: [block_slots, 8] as sequences, of blocks that are cut, and how many rows those before it have.
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
            batch, tokens, few, block, unit, slots, block_slots, capacity, table(slots + batch, 16),
            table(max(tokens // block + batch, block_slots), 8), table(batch, 8),
            table(block_slots, 8), table(1, 4)[0],
        )  # fmt: skip

    def part(self, batch: int, tokens: int, slots: int, block_slots: int) -> Plan:
        """The same lists for a smaller padded batch: a graph captured for one size and one for another share memory."""
        pieces, blocks = self.pieces[: slots + batch], self.blocks[: max(tokens // self.block + batch, block_slots)]
        changed = {"batch": batch, "tokens": tokens, "slots": slots, "block_slots": block_slots}
        return dataclasses.replace(self, **changed, pieces=pieces, blocks=blocks)

    def fill(self, query_start: torch.Tensor, kv_len: torch.Tensor, tree: Tree) -> None:
        """Reads the lengths on the device. query_start: [batch + 1], kv_len: [batch]; both int32. A padding sequence
        has no query tokens."""
        _plan[(1,)](
            query_start, kv_len, self.pieces, self.blocks, self.sequences, self.cut_blocks, self.counts, self.batch,
            self.few, self.slots, self.capacity, self.block_slots,
            PADDED=max(triton.next_power_of_2(self.batch), 32), BLOCK=self.block, UNIT=self.unit,
            CUT=len(self.cut_blocks) > 0, SPLIT=tree.split, STEADY=tree.steady // tree.split, WINDOW=tree.window,
            num_warps=4,
        )  # fmt: skip
