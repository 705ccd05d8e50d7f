"""Attention without a card: the tree, its reference, and the Triton kernels' logic in Triton's interpreter.

The interpreter's products are not a tensor core's, so bits are a matter for tests/gpu/attention; here answers are
close to the exact ones, work lists cover every query token once, and nothing of a neighbour or of a stale slot comes
in.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.configs import numerics  # noqa: E402
from vllm_deterministic.kernels.attention.combine import combine_blocks  # noqa: E402
from vllm_deterministic.kernels.attention.launch import Attention, Batch, Cache, Scratch  # noqa: E402
from vllm_deterministic.kernels.attention.plan import Plan  # noqa: E402
from vllm_deterministic.kernels.attention.reference import exact, follow, quantised  # noqa: E402
from vllm_deterministic.kernels.attention.schedules import DECODE, PREFILL, Decode, Heads, Prefill  # noqa: E402
from vllm_deterministic.kernels.attention.tree import SINGLE_SPLITS, Tree, tree_for  # noqa: E402

from vllm_deterministic.errors import ConfigurationError, UnsupportedError  # noqa: E402

SMALL = dataclasses.replace(tree_for(64), tile=16, split=64)
VARIANTS = {
    "plain": SMALL,
    "window": dataclasses.replace(SMALL, window=40),
    "softcap": dataclasses.replace(SMALL, softcap=3.0),
    "sink": dataclasses.replace(SMALL, sink=True),
    "all": dataclasses.replace(SMALL, sink=True, window=100, softcap=5.0),
    "doubling": dataclasses.replace(SMALL, split=16, steady=32),
    "96": dataclasses.replace(tree_for(96), tile=16, split=64),
    "192": dataclasses.replace(tree_for(192), tile=16, split=64),
    "alibi": dataclasses.replace(SMALL, alibi=True),
    "e4m3": dataclasses.replace(SMALL, cache="e4m3", k_scale=0.03, v_scale=0.4),
    "new all": dataclasses.replace(
        tree_for(96, window=70, softcap=4.0, sink=True, alibi=True, cache="e4m3", k_scale=0.02, v_scale=1.5),
        tile=16,
        split=64,
    ),
}
NEW = ("doubling", "96", "192", "alibi", "e4m3", "new all")
# (keys, query tokens): one decode, a chunk, a whole prompt, a verify step, one key.
BATCH = [(150, 1), (133, 40), (20, 20), (90, 3), (1, 1)]


class Sequences:
    """Sequences with their pages scattered in a cache whose other slots hold NaN."""

    def __init__(self, tree: Tree, heads: Heads, lengths: list[int], finite_tail: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        total = sum(-(-length // heads.page) for length in lengths) + 2
        order = torch.randperm(total, generator=generator).tolist()
        pages = torch.full((total, heads.page, heads.kv, 2 * tree.head_size), float("nan"), dtype=torch.float16)
        self.data = []
        self.table = torch.zeros(len(lengths), max(-(-length // heads.page) for length in lengths), dtype=torch.int32)
        for b, length in enumerate(lengths):
            q = torch.randn(length, heads.query, tree.head_size, generator=generator).half()
            kv = torch.randn(length, heads.kv, 2 * tree.head_size, generator=generator)
            if tree.e4m3:  # as the cache's elements
                kv = torch.cat([quantised(kv[..., : tree.head_size], tree.k_scale),
                                quantised(kv[..., tree.head_size :], tree.v_scale)], -1)  # fmt: skip
            kv = kv.half()
            self.data.append((q, kv[..., : tree.head_size], kv[..., tree.head_size :]))
            for at in range(0, length, heads.page):
                page = order.pop()
                self.table[b, at // heads.page] = page
                part = kv[at : at + heads.page]
                pages[page, : len(part)] = part
        if tree.e4m3:  # the interpreter takes its NaN for 480, which is seen as well
            pages = quantised(pages, 1.0)
        self.cache = Cache(pages[..., : tree.head_size], pages[..., tree.head_size :])
        # Flat enough that far keys count.
        self.slopes = torch.exp2(-2 - torch.arange(heads.query)) if tree.alibi else None


def run(
    tree: Tree,
    heads: Heads,
    batch: list[tuple[int, int]],
    decode: Decode,
    prefill: Prefill,
    sinks: torch.Tensor | None,
    slots: int = 7,
) -> tuple[list[torch.Tensor], Sequences]:
    attention = Attention(tree, heads, "cpu", Scratch.empty(heads.query, tree.head_size, "cpu"))
    sequences = Sequences(tree, heads, [keys for keys, _ in batch])
    q = torch.cat([data[0][keys - n :] for data, (keys, n) in zip(sequences.data, batch, strict=True)])
    out = torch.full(q.shape, float("nan"))
    start = torch.tensor([0] + [n for _, n in batch]).cumsum(0).int()
    kv_len = torch.tensor([keys for keys, _ in batch], dtype=torch.int32)
    plan = attention.plan(len(batch), len(q), max(n for _, n in batch), decode, prefill)
    plan.slots = slots
    plan.pieces = torch.zeros(slots + len(batch), 16, dtype=torch.int32)
    plan.fill(start, kv_len, tree)
    batch_ = Batch(q, out, sequences.table, plan, sinks, sequences.slopes)
    attention.run(batch_, sequences.cache, decode, prefill)
    return list(out.split([n for _, n in batch])), sequences


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_is_the_exact_answer(variant: str) -> None:
    tree = VARIANTS[variant]
    sinks = torch.linspace(-1, 2, 6)
    sequences = Sequences(tree, Heads(6, 2, 16), [200])
    (q, k, v), of_heads = sequences.data[0], (sinks, sequences.slopes)
    got, want = follow(tree, q[150:], k, v, 150, *of_heads), exact(tree, q[150:], k, v, 150, *of_heads)
    # p is rounded to half precision, 2^-11 relative; the rest is fp32.
    assert ((got - want).norm() / want.norm()).item() < 2**-11


@pytest.mark.parametrize("page", [8, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_in_the_interpreter_give_the_exact_answer(variant: str, page: int) -> None:
    tree, heads, sinks = VARIANTS[variant], Heads(6, 2, page), torch.linspace(-1, 2, 6)
    got, sequences = run(tree, heads, BATCH, Decode("decode"), Prefill("prefill", rows=16), sinks)
    for out, (q, k, v), (keys, n) in zip(got, sequences.data, BATCH, strict=True):
        want = exact(tree, q[keys - n :], k, v, keys - n, sinks, sequences.slopes)
        assert ((out - want).norm() / want.norm()).item() < 2**-11


@pytest.mark.parametrize("variant", NEW)
def test_pieces_and_blocks_of_other_sizes_give_the_same_bits(variant: str) -> None:
    tree, heads, sinks = VARIANTS[variant], Heads(6, 2, 16), torch.linspace(-1, 2, 6)
    batch = [(150, 2), (133, 40), (20, 20)]
    decode, prefill = Decode("decode"), Prefill("prefill", rows=16)
    whole, cut = (run(tree, heads, batch, decode, prefill, sinks, slots)[0] for slots in (1, 9))
    assert all(map(torch.equal, whole, cut))
    wide = run(tree, heads, batch, Decode("decode", rows=64), Prefill("prefill", rows=64), sinks)[0]
    # numpy's products of other shapes are other sums: in bits this is for a card.
    assert all(torch.allclose(one, other, rtol=0, atol=2e-3) for one, other in zip(whole, wide, strict=True))


@pytest.mark.parametrize(
    ("variant", "wrong", "steeper"),
    [
        ("alibi", {}, 1.05),
        ("alibi", {"alibi": False}, 1),
        ("e4m3", {"k_scale": 0.0315}, 1),
        ("e4m3", {"v_scale": 0.42}, 1),
        ("96", {"scale": 1.05 * 96**-0.5}, 1),
    ],
)
def test_a_wrong_slope_or_scale_is_seen(variant: str, wrong: dict[str, Any], steeper: float) -> None:
    """Control of the tests above: five in a hundred are far outside their bounds."""
    tree, heads = VARIANTS[variant], Heads(6, 2, 16)
    batch = [(150, 1), (133, 40)]
    got, sequences = run(tree, heads, batch, Decode("decode"), Prefill("prefill", rows=16), None)
    slopes = sequences.slopes * steeper if tree.alibi else None
    other = dataclasses.replace(tree, **wrong)
    for out, (q, k, v), (keys, n) in zip(got, sequences.data, batch, strict=True):
        want = exact(other, q[keys - n :], k, v, keys - n, None, slopes)
        assert ((out - want).norm() / want.norm()).item() > 2**-8


def test_alibi_is_counted_from_the_query_s_own_position() -> None:
    """As vLLM's own kernel adds it, but for a constant of the row, which no softmax sees."""
    sequences = Sequences(VARIANTS["alibi"], Heads(6, 2, 16), [64])
    (q, k, v), slopes = sequences.data[0], sequences.slopes
    x = torch.einsum("thd,khd->htk", q.double(), k.double().repeat_interleave(3, 1)) * SMALL.scale
    x += slopes.double()[:, None, None] * torch.arange(64)
    x = x.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    want = torch.einsum("htk,khd->thd", x.softmax(-1), v.double().repeat_interleave(3, 1))
    torch.testing.assert_close(exact(VARIANTS["alibi"], q, k, v, 0, None, slopes), want)


@pytest.mark.parametrize("splits", [20, 50, 115])
def test_many_splits_are_combined_to_the_bits_of_one_piece(splits: int) -> None:
    """As pieces of one split each: the last is combined in small batches, in a large one, in two."""
    tree, heads = dataclasses.replace(SMALL, split=16, sink=True), Heads(2, 1, 16)
    batch, sinks = [(16 * splits - 3, 2), (40, 1)], torch.linspace(-1, 2, 2)
    cut, whole = (run(tree, heads, batch, Decode("decode"), Prefill("prefill"), sinks, slots)[0] for slots in (120, 1))
    assert all(map(torch.equal, cut, whole))


@pytest.mark.parametrize("steady", [0, 16])
@pytest.mark.parametrize(
    ("units", "slots", "longest"),
    [
        ([63] * 4, 16, 16),  # in thirds they would take 21 turns, and a quarter of the slots idle
        ([32] * 5, 16, 11),
        ([256], 16, 16),
        ([1] * 15 + [256], 16, 18),  # no more pieces than slots would leave the long one whole
        ([20] * 9, 4, 20),
        ([48], 16, 3),  # where splits have doubled, by a single one to each double one
        ([80], 16, 5),
        ([41], 16, 3),
        ([17], 16, 2),
        ([1, 16, 17, 18, 40, 100], 33, 7),
    ],
)
def test_pieces_hold_every_split_once_and_are_evenly_long(
    units: list[int], slots: int, longest: int, steady: int
) -> None:
    n, tree = len(units), dataclasses.replace(SMALL, steady=64 * steady)
    plan = Plan.empty(n, n, few=1, block=16, slots=slots, capacity=4096, device="cpu")
    keys = torch.tensor(units, dtype=torch.int32) * 64 - 5
    plan.fill(torch.arange(n + 1, dtype=torch.int32), keys, tree)
    splits = [len(tree.splits(count)) for count in keys.tolist()]
    held, kept, lengths = [], [], []
    for b, first, end, slot, _, _, _, offset, more, more_end in plan.pieces[: int(plan.counts[0]), :10].tolist():
        runs = [*range(first, end), *range(more, more_end)]
        assert end <= steady or not steady
        assert more >= steady or more == more_end
        held += [(b, split) for split in runs]
        lengths.append(sum(1 + bool(steady and split >= steady) for split in runs))
        if slot != -1:
            own, merged, _ = plan.sequences[b, :3].tolist()
            assert slot == (-2 - own if first == 0 else own)
            assert first > 0 or end == merged
            kept += [own] * (first == 0) + [offset + split for split in (runs[merged:] if first == 0 else runs)]
    assert sorted(held) == [(b, split) for b, count in enumerate(splits) for split in range(count)]
    assert sorted(kept) == list(range(len(kept)))
    assert max(lengths) == longest
    slots_of = [(slot, count - merged) for slot, merged, count in plan.sequences[:, :3].tolist() if slot >= 0]
    assert sum(behind + 1 for _, behind in slots_of) == len(kept)


@pytest.mark.parametrize(
    ("sequences", "slots", "capacity", "pieces"),
    [
        ([(20, 640)], 16, 4096, 5),  # two units, 16 slots, ten splits
        ([(20, 640), (1, 300), (30, 2000)], 16, 4096, 4),
        ([(40, 640)], 3, 4096, 1),  # three units fill the card
        ([(40, 1280)], 16, 40, 1),  # the scratch holds no split of all three blocks' rows
        ([(16, 1280)], 16, 16 * 6, 2),  # or of one block five, behind a first piece of fifteen
        ([(70, 100), (5, 70)], 16, 4096, 2),  # early blocks end before the second piece
    ],
)
@pytest.mark.parametrize("steady", [0, 4])
def test_cut_blocks_hold_every_split_once(
    sequences: list[tuple[int, int]], slots: int, capacity: int, pieces: int, steady: int
) -> None:
    """(query tokens, keys) of sequences as blocks of 16 tokens, 10 tokens a unit, 64 keys a split, or twice as many."""
    n, tokens, tree = (
        len(sequences),
        sum(queries for queries, _ in sequences),
        dataclasses.replace(SMALL, steady=64 * steady),
    )

    def splits_of(first: int, end: int) -> range:
        """Which end in the units [first, end)."""
        return range(len(tree.splits(64 * first)), len(tree.splits(64 * end)))

    plan = Plan.empty(n, tokens, few=1, block=16, unit=10, slots=7, block_slots=slots, capacity=capacity, device="cpu")
    start = torch.tensor([0, *(queries for queries, _ in sequences)]).cumsum(0).int()
    plan.fill(start, torch.tensor([keys for _, keys in sequences], dtype=torch.int32), tree)
    held: dict[tuple[int, int], list[int]] = {}
    places: dict[int, list[int]] = {}  # of a block's splits, in order, by its first row
    for b, first_row, rows, oldest, first, end, slot, _ in plan.blocks[: int(plan.counts[1])].tolist():
        queries, keys = sequences[b]
        assert oldest == keys - queries + first_row - int(start[b])
        splits = held.setdefault((first_row, oldest + rows), [])
        splits += splits_of(first, end)
        assert first <= steady or not steady or first % 2 == 0
        if slot != -1 and first < end:
            kept = [-2 - slot] if slot < -1 else [slot + i * rows for i in range(len(splits_of(first, end)))]
            places.setdefault(first_row, []).extend(kept)
            assert max(kept) + rows <= capacity
    assert sorted(first_row for first_row, _ in held) == [
        int(start[b]) + i for b, (queries, _) in enumerate(sequences) if queries > 1 for i in range(0, queries, 16)
    ]
    assert all(splits == list(range(len(tree.splits(keys)))) for (_, keys), splits in held.items())
    cuts = plan.cut_blocks[: int(plan.counts[2]), :6].tolist()
    assert sorted(first_row for *_, first_row, _, _ in cuts) == sorted(places)
    taken: list[int] = []
    for i, (slot, merged, splits, first_row, rows, before) in enumerate(cuts):
        assert places[first_row] == [slot + split * rows for split in range(splits - merged + 1)]
        taken += [place + row for place in places[first_row] for row in range(rows)]
        assert before == sum(rows for *_, rows, _ in cuts[:i])
    assert len(set(taken)) == len(taken)
    number = Counter(row[1] for row in plan.blocks[: int(plan.counts[1])].tolist() if row[4] < row[5])
    assert max(number.values()) == pieces


@pytest.mark.parametrize("programs", [1, 7, 64])
def test_what_cut_blocks_kept_is_combined(programs: int) -> None:
    heads, size, generator = 2, 16, torch.Generator().manual_seed(1)
    state = torch.randn(4096 * heads, 2, generator=generator).abs() * 3
    acc = torch.randn(4096 * heads, size, generator=generator)
    # slot, splits merged there, splits, first row, rows, rows before: each split in the slots behind
    blocks = torch.tensor([[8, 3, 25, 0, 5, 0, 0, 0], [700, 1, 2, 5, 16, 5, 0, 0]], dtype=torch.int32)
    out = torch.full((21, heads, size), float("nan"))
    counts = torch.tensor([0, 0, 2], dtype=torch.int32)
    combine_blocks[(programs,)](
        out, state, acc, blocks, counts, out.stride(0), Q_HEADS=heads, D=size, ROWS=4, BATCH=4, PDL=False
    )
    for slot, merged, splits, first_row, rows, *_ in blocks.tolist():
        at = torch.arange(rows)[:, None] + slot + rows * torch.arange(splits - merged + 1)
        m, sums = state.view(4096, heads, 2)[at].double().unbind(-1)  # [rows, splits, heads]
        weights = torch.exp2(m - m.amax(1, keepdim=True))
        values, sums = weights[..., None] * acc.view(4096, heads, size)[at].double(), weights * sums
        for used, near in ((values.shape[1], True), (values.shape[1] - 1, False)):  # control: one split less is seen
            want = values[:, :used].sum(1) / sums[:, :used].sum(1)[..., None]
            error = ((out[first_row : first_row + rows] - want).norm() / want.norm()).item()
            assert error < 2**-18 if near else error > 2**-10


def test_a_wrong_window_is_seen() -> None:
    """Control of the tests above: one key more or less in the window is far outside the bound."""
    tree = VARIANTS["window"]
    q, k, v = Sequences(tree, Heads(6, 2, 16), [200]).data[0]
    want = exact(dataclasses.replace(tree, window=41), q[150:], k, v, 150)
    assert ((follow(tree, q[150:], k, v, 150) - want).norm() / want.norm()).item() > 2**-6


def test_the_digest_names_every_part_of_the_tree() -> None:
    changed = [
        dataclasses.replace(SMALL, tile=32),
        dataclasses.replace(SMALL, split=128),
        dataclasses.replace(SMALL, scale=0.1),
        dataclasses.replace(SMALL, steady=256),
        dataclasses.replace(VARIANTS["e4m3"], k_scale=1.0),
        dataclasses.replace(VARIANTS["e4m3"], v_scale=1.0),
        dataclasses.replace(VARIANTS["e4m3"], k_scale=1.0, v_scale=1.0),
        *VARIANTS.values(),
    ]
    assert len({tree.digest for tree in changed}) == len(changed)


def test_splits_double_where_those_before_them_occupy_the_card() -> None:
    assert SMALL.splits(200) == [0, 64, 128, 192]
    assert dataclasses.replace(SMALL, steady=128).splits(500) == [0, 64, 128, 256, 384]
    assert [tree_for(128, kv_heads=kv).steady for kv in (1, 3, 8, 32, 100)] == [65536, 21504, 8192, 2048, 1024]
    assert tree_for(128, kv_heads=8, window=4096).steady == 0


def test_the_numerics_version_says_the_sizes() -> None:
    said = numerics("v1")["cuda"]["attention"]
    assert said["splits_before_they_double"] == SINGLE_SPLITS
    assert {int(size): tuple(sizes) for size, sizes in said["tile_and_split"].items()} == {
        tree.head_size: (tree.tile, tree.split) for tree in map(tree_for, (64, 128, 256))
    }


def test_digests_are_what_they_were() -> None:
    """A certificate or a golden that names one of them holds on."""
    found = [
        tree_for(64), tree_for(128), tree_for(256), tree_for(128, window=300), tree_for(64, window=128, sink=True),
        tree_for(128, softcap=30.0), tree_for(128, kv_heads=8),
    ]  # fmt: skip
    assert [tree.digest for tree in found] == [
        "3b362f245d128102aa86563d3c207caae77625ce01727492a24f05e5fd29d445",
        "0a2a2c76e033c43baefeb5d6e6cf2eea5412dced4de78b44f4258eea5d3446bd",
        "7a5c7549b9a980198444b59c04577e0adfc976b3dd98be27e69095f96f34f078",
        "493045fdc92d3e605088679cd1fc1a7c0d0110f900ef1fae5cde56a0c88e9ebb",
        "6226a38c74f16ff037c316d56b2a9692685f375b970c61e71d07cf500d18bce5",
        "8a43c77961dd6d59f25910a6643d0bc49615700f9ecfd2ea13cc7827df0ad6e1",
        "39e99a30936efdef9beba25671bc9733284ec39a9f3b279c60ad6612922e55bd",
    ]


@pytest.mark.parametrize("tree", [tree_for(96), tree_for(192), tree_for(128, alibi=True), tree_for(64, cache="e4m3")])
def test_on_hopper_such_trees_run_by_pointers(tree: Tree) -> None:
    names = {s.name for s in (*DECODE, *PREFILL) if s.eligible(tree, Heads(8, 4, 128), hopper=True)}
    blocks = {"prefill", "prefill-64"} if tree.head_size <= 128 else {"prefill-64"}
    assert names == {"decode", "decode-64"} | blocks


def test_what_has_no_tree_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"head size 80 .*96"):
        tree_for(80)
    with pytest.raises(UnsupportedError, match=r"cache of e5m2 .*e4m3"):
        tree_for(64, cache="e5m2")
    for wrong in ({"k_scale": 0.0}, {"v_scale": float("inf")}, {"k_scale": float("nan")}):
        with pytest.raises(UnsupportedError, match="positive and finite"):
            tree_for(64, cache="e4m3", **wrong)
    with pytest.raises(UnsupportedError, match=r"scales 0\.5"):
        tree_for(64, k_scale=0.5)
    with pytest.raises(UnsupportedError, match="scale"):
        tree_for(64, -1.0)


def test_what_the_tree_needs_is_asked_for() -> None:
    def ask(tree: Tree, kept: Tree) -> None:
        heads = Heads(2, 1, 16)
        attention = Attention(tree, heads, "cpu", Scratch.empty(2, 64, "cpu"))
        sequences, plan = Sequences(kept, heads, [20]), attention.plan(1, 1, 1, DECODE[-1], None)
        q = sequences.data[0][0]
        attention.run(Batch(q, q, sequences.table, plan), sequences.cache, None, None)

    ask(SMALL, SMALL)
    with pytest.raises(ConfigurationError, match="pass slopes"):
        ask(VARIANTS["alibi"], SMALL)
    with pytest.raises(UnsupportedError, match=r"cache of torch.float16 .*e4m3"):
        ask(VARIANTS["e4m3"], SMALL)
    with pytest.raises(UnsupportedError, match=r"cache of torch.float8_e4m3fn .*their own type"):
        ask(SMALL, VARIANTS["e4m3"])


def test_a_cache_that_is_no_rows_of_slots_is_refused() -> None:
    odd = torch.zeros(4, 17 * 96 + 8)[:, : 17 * 96].reshape(4, 17, 2, 48)
    with pytest.raises(ConfigurationError, match="strides"):
        _ = Cache(torch.zeros(4, 1033).as_strided((4, 16, 1, 64), (1033, 64, 64, 1)), odd).rows


def test_every_schedule_has_its_own_name() -> None:
    names = [schedule.name for schedule in (*DECODE, *PREFILL)]
    assert len(set(names)) == len(names)
