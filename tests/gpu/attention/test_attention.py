"""Attention on a real card: every schedule on the tree, planted faults caught, padded graphs, accuracy against fp64."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.kernels import nvrtc  # noqa: E402
from vllm_deterministic.kernels.attention import certify, launch, prefill_cuda  # noqa: E402
from vllm_deterministic.kernels.attention import decode as decode_module  # noqa: E402
from vllm_deterministic.kernels.attention import prefill as prefill_module  # noqa: E402
from vllm_deterministic.kernels.attention.launch import Attention, Batch, Cache, Scratch  # noqa: E402
from vllm_deterministic.kernels.attention.plan import Plan  # noqa: E402
from vllm_deterministic.kernels.attention.reference import quantised  # noqa: E402
from vllm_deterministic.kernels.attention.schedules import (  # noqa: E402
    DECODE,
    PREFILL,
    REFERENCE,
    Decode,
    Heads,
    Prefill,
)
from vllm_deterministic.kernels.attention.store import store  # noqa: E402
from vllm_deterministic.kernels.attention.tree import Tree, tree_for  # noqa: E402

from vllm_deterministic.errors import CertificationError  # noqa: E402

BF16, FP16 = torch.bfloat16, torch.float16
LONG = 8192 + 33


def attention(tree: Tree, heads: Heads) -> Attention:
    return Attention(tree, heads, "cuda", Scratch.empty(heads.query, tree.head_size, "cuda"))


def case(name: str) -> tuple[Attention, torch.dtype, int]:
    trees = {
        "qwen": (tree_for(128, kv_heads=8), Heads(32, 8, 128), BF16, 32768 + 17),
        "page-16": (dataclasses.replace(tree_for(128), steady=2048), Heads(32, 8, 16), BF16, LONG),
        "group-3": (tree_for(64), Heads(9, 3, 128), BF16, LONG),
        "mha": (dataclasses.replace(tree_for(64), steady=2048), Heads(8, 8, 128), FP16, LONG),
        "mqa": (tree_for(128), Heads(16, 1, 128), FP16, LONG),
        "group-32": (tree_for(128), Heads(32, 1, 128), BF16, 4200),
        "window": (tree_for(128, window=1000), Heads(16, 4, 128), BF16, LONG),
        "sink": (tree_for(64, window=128, sink=True), Heads(16, 2, 128), BF16, LONG),
        "sink-whole": (dataclasses.replace(tree_for(64, sink=True), steady=2048), Heads(16, 2, 128), BF16, LONG),
        "softcap": (dataclasses.replace(tree_for(128, softcap=30.0), steady=1024), Heads(8, 4, 128), BF16, 4200),
        "256": (dataclasses.replace(tree_for(256), steady=2048), Heads(8, 4, 64), BF16, 4200),
        "256-page-16": (tree_for(256, window=512, softcap=50.0), Heads(8, 4, 16), FP16, 4200),
        "96": (tree_for(96), Heads(12, 4, 128), BF16, LONG),
        "96-page-16": (tree_for(96, window=1000, sink=True), Heads(8, 8, 16), FP16, 4200),
        "192": (tree_for(192), Heads(8, 2, 128), BF16, 4200),
        "alibi": (dataclasses.replace(tree_for(128, alibi=True), steady=2048), Heads(16, 4, 128), BF16, LONG),
        "alibi-64": (tree_for(64, softcap=30.0, alibi=True), Heads(12, 12, 16), FP16, 4200),
        "fp8": (tree_for(128, kv_heads=8, cache="e4m3", k_scale=0.05, v_scale=0.1), Heads(32, 8, 128), BF16, LONG),
        "fp8-64": (tree_for(64, cache="e4m3"), Heads(9, 3, 128), FP16, LONG),
        "fp8-192": (
            tree_for(192, window=700, softcap=30.0, sink=True, alibi=True, cache="e4m3", k_scale=0.02, v_scale=1.7),
            Heads(8, 4, 16),
            BF16,
            4200,
        ),
    }
    tree, heads, dtype, longest = trees[name]
    return attention(tree, heads), dtype, longest


NAMES = ["qwen", "page-16", "group-3", "mha", "mqa", "group-32", "window", "sink", "sink-whole", "softcap", "256"]
NAMES += ["256-page-16", "96", "96-page-16", "192", "alibi", "alibi-64", "fp8", "fp8-64", "fp8-192"]


@pytest.mark.parametrize("name", NAMES)
def test_every_eligible_schedule_is_on_the_tree(name: str) -> None:
    shape, dtype, longest = case(name)
    sizes = (1, 2, 8, 33, 64, 128, 256) if name == "qwen" else (2, 33, 64)
    found = certify.certify(shape, dtype, longest, {"card": torch.cuda.get_device_name()}, sizes)
    print(name, f"{found.seconds:.1f} s", sorted(found.schedules), found.dropped)
    assert not found.dropped
    assert len(found.schedules) >= 3


# --- planted faults -----------------------------------------------------------------------------------------------
def broken(module: ModuleType, folder: Path, changes: dict[str, str]) -> ModuleType:
    """A copy of a kernel module with its text changed."""
    text = Path(module.__file__ or "").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / f"{module.__name__.rpartition('.')[2]}_broken.py"
    path.write_text(text)
    name = f"{module.__package__}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy


def dropped(monkeypatch: pytest.MonkeyPatch, only: Decode | Prefill) -> str:
    """Why certification drops the one schedule, run with whatever is planted; empty if it does not."""
    decode, prefill = isinstance(only, Decode), isinstance(only, Prefill)
    by_tma = prefill and only.cuda
    plain_decode, plain_prefill = Decode("decode", tma=by_tma), Prefill("prefill")
    monkeypatch.setattr(certify, "DECODE", (only,) if decode else (plain_decode,))
    monkeypatch.setattr(certify, "PREFILL", (only,) if prefill else (plain_prefill,))
    tree = dataclasses.replace(tree_for(128), steady=2048)
    shape = attention(tree, Heads(16, 4, 128 if by_tma else 16))
    try:
        return certify.certify(shape, BF16, 4200, {}, (8, 64)).dropped.get(only.name, "")
    except CertificationError as error:
        return str(error)


ROW_SUM = {"row_sum(p, ROWS, T)": "tl.sum(p, 1)"}
RELATIVE = {
    "for j in tl.range(begin, plain": "for j in tl.range(begin, begin",
    "tl.range(plain, end": "tl.range(begin, end",
    "ends_split(j, S // T, STEADY // T)": "(end - j - 1) % (S // T) == 0",
}
NEVER_DOUBLED = {"ends_split(j, PER, UNTIL)": "ends_split(j, PER, 0)"}
CONTRACTED = {"A = tl.fma(A, zero + a, ": "A = A * a + ("}


def test_a_schedule_without_faults_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Control: the same route with nothing planted."""
    monkeypatch.setattr(launch, "decode_kernels", broken(decode_module, tmp_path, {}))
    assert not dropped(monkeypatch, Decode("decode"))


def test_a_row_sum_that_follows_the_warps_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "decode_kernels", broken(decode_module, tmp_path, ROW_SUM))
    assert "elements" in dropped(monkeypatch, Decode("decode"))


def test_splits_counted_from_the_end_of_a_chunk_are_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fault = broken(prefill_module, tmp_path, RELATIVE)
    run = Attention.run

    def swapped(self: Attention, batch: Batch, cache: Cache, decode: Decode | None, prefill: Prefill | None) -> None:
        if prefill is not REFERENCE:
            self = dataclasses.replace(self)  # which has not looked up its kernels yet
        monkeypatch.setattr(launch, "prefill_kernels", prefill_module if prefill is REFERENCE else fault)
        run(self, batch, cache, decode, prefill)

    monkeypatch.setattr(Attention, "run", swapped)
    assert "elements" in dropped(monkeypatch, Prefill("prefill"))


def test_splits_that_never_double_are_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "decode_kernels", broken(decode_module, tmp_path, NEVER_DOUBLED))
    assert "elements" in dropped(monkeypatch, Decode("decode"))


def test_a_merge_left_to_the_compiler_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "decode_kernels", broken(decode_module, tmp_path, CONTRACTED))
    assert "elements" in dropped(monkeypatch, Decode("decode"))


in_cuda = pytest.mark.parametrize("schedule", [s for s in PREFILL if s.cuda], ids=lambda schedule: schedule.name)


# (file, what stands there, what is planted)
IN_BOTH = [
    ("tree.cuh", "", ""),  # the control
    ("tree.cuh", "TILES_OF_SPLIT = 4", "TILES_OF_SPLIT = 8"),
    ("tree.cuh", "STEADY && j >= STEADY", "false"),
    ("tree.cuh", "__fadd_rn(y[e], y[e + n])", "__fadd_rn(y[2 * e], y[2 * e + 1])"),
    ("prefill.cu", "__fmaf_rn(y.x, a[0], __fmul_rn(acc[0], b[0]))", "(y.x * a[0] + acc[0] * b[0])"),
]
IN_PIECES = [("prefill.cu", "keep(a, slot, head, w, rows, old, l, acc)", "keep(a, slot, head, w, rows, m, l, acc)")]


@pytest.mark.parametrize(
    ("schedule", "file", "sound", "fault"),
    [(s, *planted) for s in PREFILL if s.cuda for planted in IN_BOTH + IN_PIECES * s.pieces],
)
def test_faults_in_cuda_are_caught(
    monkeypatch: pytest.MonkeyPatch, schedule: Prefill, file: str, sound: str, fault: str
) -> None:
    sources = {name: prefill_cuda._source(name) for name in ("hopper.cuh", "tree.cuh", "prefill.cu")}
    assert sound in sources[file]
    sources[file] = sources[file].replace(sound, fault)
    monkeypatch.setattr(prefill_cuda, "_source", sources.__getitem__)
    monkeypatch.setattr(prefill_cuda, "_compiled", functools.cache(prefill_cuda._compiled.__wrapped__))
    why = dropped(monkeypatch, schedule)
    assert "elements" in why if fault else not why


@in_cuda
def test_without_nvrtc_the_cuda_prefill_is_dropped_by_name(monkeypatch: pytest.MonkeyPatch, schedule: Prefill) -> None:
    monkeypatch.setattr(prefill_cuda, "_compiled", functools.cache(prefill_cuda._compiled.__wrapped__))
    monkeypatch.setattr(nvrtc, "_nvrtc", nvrtc._nvrtc.__wrapped__)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "no NVRTC" in dropped(monkeypatch, schedule)


def test_splits_that_follow_the_batch_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    fill, run = Plan.fill, Attention.run

    def split(batch: int) -> int:
        return 256 if batch > 4 else 512

    def fill_by_batch(self: Plan, query_start: torch.Tensor, kv_len: torch.Tensor, tree: Tree) -> None:
        if self.few:
            tree = dataclasses.replace(tree, split=split(self.batch))
        fill(self, query_start, kv_len, tree)

    def run_by_batch(
        self: Attention, batch: Batch, cache: Cache, decode: Decode | None, prefill: Prefill | None
    ) -> None:
        if decode is not None:
            self = dataclasses.replace(self, tree=dataclasses.replace(self.tree, split=split(batch.plan.batch)))
        run(self, batch, cache, decode, prefill)

    monkeypatch.setattr(Plan, "fill", fill_by_batch)
    monkeypatch.setattr(Attention, "run", run_by_batch)
    assert "elements" in dropped(monkeypatch, Decode("decode"))


# --- the promise itself -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["qwen", "group-3", "sink", "256", "96", "192", "alibi", "fp8", "fp8-192"])
def test_the_tree_is_close_to_the_exact_answer(name: str) -> None:
    shape, dtype, _ = case(name)
    sequences = certify.Sequences(shape, 3000, dtype)
    for i, kind in enumerate(sequences.kinds[:-1]):
        got = sequences.run([(i, 2800, 3000)], None, REFERENCE)
        want = sequences.exact(i, 2800, 3000)
        error = ((got - want).norm() / want.norm()).item()
        # Half-precision p: 2^-9 in bf16, 2^-12 in fp16, per weight; values that cancel magnify it.
        assert error < 2**-7, (kind, error)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("alibi", {"alibi": False}), ("fp8", {"k_scale": 0.0525}), ("fp8", {"v_scale": 0.105}), ("96", {"scale": 0.1072})],
)
def test_a_wrong_slope_or_scale_is_seen(name: str, wrong: dict[str, float]) -> None:
    """Control of the test above, five in a hundred off."""
    shape, dtype, _ = case(name)
    sequences = certify.Sequences(shape, 3000, dtype)
    got = sequences.run([(0, 2800, 3000)], None, REFERENCE)
    shape.tree = dataclasses.replace(shape.tree, **wrong)
    want = sequences.exact(0, 2800, 3000)
    assert ((got - want).norm() / want.norm()).item() > 2**-7


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("size", [64, 96])
def test_an_e4m3_cache_holds_quotients_rounded_once(dtype: torch.dtype, size: int) -> None:
    """Every bit of them; saturated beyond the largest; the rest of a page that was opened is zeros."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    k, v = (torch.randn(100, 3, size, device="cuda", generator=generator) for _ in range(2))
    k, v = ((x * torch.exp2(16 * torch.rand_like(x) - 10)).to(dtype) for x in (k, v))
    k[3, 1, :4] = torch.tensor([float("inf"), float("-inf"), 6e4, -6e4], device="cuda")
    v[5, 2, 7] = float("nan")
    pages = torch.full((4, 128, 3, 2 * size), 100.0, device="cuda").to(torch.float8_e4m3fn)
    cache = Cache(pages[..., :size], pages[..., size:])
    store(k, v, cache, 2 * 128 + torch.arange(100, device="cuda"), 0.07, 1.3)
    for found, x, scale in ((cache.k, k, 0.07), (cache.v, v, 1.3)):
        found, want = found[2, :100], quantised(x, scale)
        there = ~want.float().isnan()
        assert torch.equal(found.float().isnan(), ~there)
        assert torch.equal(found.view(torch.uint8)[there], want.view(torch.uint8)[there])
    assert bool((cache.v[2, 100:].float() == 0).all())
    others = pages.float()[[0, 1, 3]]
    assert bool((others == others[0, 0, 0, 0]).all())


def test_one_captured_graph_serves_every_batch_of_its_size() -> None:
    """Captured at 8 padded sequences and 256 tokens; replayed with decodes, chunks and prompts of other lengths."""
    shape, dtype, _ = case("qwen")
    sequences = certify.Sequences(shape, 3000, dtype, kinds=("normal", "heavy"))
    gold = [sequences.run([(i, 0, 3000)], None, REFERENCE, dtype) for i in range(2)]
    decode, prefill = shape.schedules(8, 256, 256)
    q = torch.zeros(256, 32, 128, dtype=dtype, device="cuda")
    out, table = torch.zeros_like(q), torch.zeros(8, sequences.table.shape[1], dtype=torch.int32, device="cuda")
    start, kv_len = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in (9, 8))
    plan = shape.plan(8, 256, 256, decode, prefill)

    def step() -> None:
        plan.fill(start, kv_len, shape.tree)
        shape.run(Batch(q, out, table, plan), sequences.cache, decode, prefill)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    batches = [
        [(0, 2999, 3000), (1, 100, 101), (1, 400, 500), (0, 0, 60)],
        [(1, 2744, 3000)],
        [(i % 2, 300 * i + 99, 300 * i + 100) for i in range(8)],
    ]
    for batch in batches:
        lengths = [b - a for _, a, b in batch]
        start.fill_(sum(lengths))
        start[: len(batch) + 1] = torch.tensor([0, *lengths]).cumsum(0).int()
        kv_len.zero_()
        kv_len[: len(batch)] = torch.tensor([b for _, _, b in batch])
        table[: len(batch)] = sequences.table[[i for i, _, _ in batch]]
        q.fill_(float("nan"))
        q[: sum(lengths)] = torch.cat([sequences.data[i][0][a:b] for i, a, b in batch])
        out.fill_(7.0)
        graph.replay()
        assert torch.equal(out[: sum(lengths)], sequences.rows(batch, gold))
        assert bool((out[sum(lengths) :] == 7.0).all()), "padding rows are not written"
    assert not torch.equal(gold[0][2999], gold[1][2999])


def test_schedules_that_are_not_certified_are_not_chosen() -> None:
    shape, _, _ = case("qwen")
    chosen = {schedule.name for schedule in shape.schedules(1, 200, 200) if schedule}
    shape.allowed = {"decode-64-tma", "prefill"}
    assert {schedule.name for schedule in shape.schedules(1, 200, 200) if schedule} == shape.allowed
    assert not chosen & shape.allowed
    assert {s.name for s in (*DECODE, *PREFILL)} >= shape.allowed
