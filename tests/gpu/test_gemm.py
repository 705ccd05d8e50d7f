"""Linear layers on a real card: certification, planted faults, invariance with its control, shapes, graphs."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from vllm_deterministic.kernels.gemm import certify, dispatch, schedules  # noqa: E402
from vllm_deterministic.kernels.gemm.cublaslt import CublasLt  # noqa: E402
from vllm_deterministic.kernels.gemm.hard_data import hard_operands  # noqa: E402
from vllm_deterministic.kernels.gemm.pointer import Pointer  # noqa: E402
from vllm_deterministic.kernels.gemm.reference import bit_reference, error_bound, exact  # noqa: E402
from vllm_deterministic.kernels.gemm.tma import Tma  # noqa: E402
from vllm_deterministic.kernels.gemm.tree import Problem  # noqa: E402

from vllm_deterministic.errors import CertificationError, UnsupportedError  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CUDA = torch.device("cuda", 0)
QWEN3_8B = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)]
SMALL = [(4096, 1024), (1024, 2048), (1024, 3072), (576, 576), (576, 1536), (1536, 576)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


# --- certification ------------------------------------------------------------------------------------------------
def families_everywhere(found: object, max_m: int) -> None:
    """Two families for every row count, and the one that dispatch chose among them."""
    counts: dict[str, set[int]] = {}
    for name, spans in found.schedules.items():
        for first, last in spans:
            counts.setdefault(name.split()[0], set()).update(range(first, last + 1))
    for m in certify.row_counts(max_m):
        assert sum(m in certified for certified in counts.values()) >= 2, (m, found.dropped)


@pytest.mark.parametrize(("n", "k"), [*QWEN3_8B, *SMALL])
def test_every_row_count_has_two_families(n: int, k: int) -> None:
    problem = Problem(n, k, BF16)
    found = dispatch.prepare(problem, 8192, CUDA, fresh=True)
    print(f"{problem}: {found.seconds:.1f} s, dropped {dict(found.dropped)}")
    families_everywhere(found, 8192)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bias", [False, True])
def test_bias_and_half_precision(dtype: torch.dtype, bias: bool) -> None:
    found = dispatch.prepare(Problem(4096, 2048, dtype, bias), 2048, CUDA, fresh=True)
    families_everywhere(found, 2048)


def test_lm_head_to_its_rows() -> None:
    found = dispatch.prepare(Problem(151936, 1024, BF16), 512, CUDA, fresh=True)
    families_everywhere(found, 512)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_reference_is_exact_on_integers_and_bounded(dtype: torch.dtype) -> None:
    x, weight, bias = hard_operands(64, 96, 1000, dtype, CUDA)
    y = bit_reference(x, weight, None, FP32).double()
    bound = error_bound(x, weight)
    held = bound / (1000 * 2.0**-21) < 2.0**127
    assert held[:5].all()
    assert ((y - exact(x, weight)).abs() <= bound + 1000 * 2.0**-126)[held].all()
    integers = (
        torch.randint(-8, 9, (64, 1000), device=CUDA).to(dtype),
        torch.randint(-8, 9, (96, 1000), device=CUDA).to(dtype),
    )
    assert torch.equal(bit_reference(*integers, None, FP32).double(), exact(*integers))
    with_bias = bit_reference(x, weight, bias)
    assert torch.equal(bits(with_bias[:1]), bits((y[:1].float() + bias.float()).to(dtype)))


# --- planted faults -----------------------------------------------------------------------------------------------
@triton.jit
def _faulty(x, w, y, m, n, k, SPLITS: tl.constexpr, PRECISION: tl.constexpr):
    """A product that sums SPLITS parts of k apart and adds them at the end."""
    rm, rn = tl.program_id(0) * 16 + tl.arange(0, 16), tl.program_id(1) * 64 + tl.arange(0, 64)
    total = tl.zeros((16, 64), tl.float32)
    part = k // SPLITS
    for split in tl.static_range(SPLITS):
        acc = tl.zeros((16, 64), tl.float32)
        for start in range(split * part, (split + 1) * part, 64):
            rk = start + tl.arange(0, 64)
            a = tl.load(x + rm[:, None] * k + rk[None, :], mask=rm[:, None] < m, other=0.0)
            b = tl.load(w + rn[None, :] * k + rk[:, None], mask=rn[None, :] < n, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        total += acc
    tl.store(
        y + rm[:, None] * n + rn[None, :], total.to(y.dtype.element_ty), mask=(rm[:, None] < m) & (rn[None, :] < n)
    )


@dataclasses.dataclass(frozen=True)
class Faulty:
    splits: int
    precision: str = "ieee"
    only_at: int | None = None  # the row count at which the fault shows; None: at all

    family = "faulty"
    one_kernel = True

    def refusal(self, problem: Problem) -> str | None:
        return None

    def rows(self, m: int) -> int:
        return m

    def run(self, x, weight, bias, y) -> None:
        splits = self.splits if self.only_at in (None, x.shape[0]) else 1
        precision = self.precision if self.only_at in (None, x.shape[0]) else "ieee"
        grid = (triton.cdiv(x.shape[0], 16), triton.cdiv(weight.shape[0], 64))
        _faulty[grid](x, weight, y, x.shape[0], weight.shape[0], x.shape[1], splits, precision)


@pytest.mark.parametrize("only_at", [None, 777], ids=["at every M", "at one M"])
@pytest.mark.parametrize(
    ("fault", "dtype"),
    [(Faulty(4), BF16), (Faulty(2), FP16), (Faulty(1, "tf32"), FP32)],
    ids=["split-K", "two accumulators", "TF32"],
)
def test_planted_faults_are_caught(fault: Faulty, dtype: torch.dtype, only_at: int | None) -> None:
    problem = Problem(256, 2048, dtype)
    planted = dataclasses.replace(fault, only_at=only_at)
    sound = dataclasses.replace(fault, splits=1, precision="ieee")
    counts = certify.row_counts(1024)
    certified, dropped = certify.certify(problem, [(planted, counts), (sound, counts)], CUDA)
    assert schedules.name_of(planted) in dropped
    assert schedules.name_of(planted) not in certified
    assert certified[schedules.name_of(sound)] == [(1, 1024)], dropped  # the control: the same kernel without the fault


def test_a_wrong_reference_is_refused() -> None:
    def wrong(x, weight, bias, out_dtype):
        return bit_reference(x, weight, bias, out_dtype) * (1 + 2**-6)

    with pytest.raises(CertificationError, match="reference kernel itself"):
        certify.certify(Problem(64, 512, BF16), [(Pointer(16, 64, 64, 64, True, 4, 3), [1])], CUDA, wrong)


# --- invariance ---------------------------------------------------------------------------------------------------
def differing_row_counts(product, problem: Problem, counts) -> list[int]:
    """The row counts at which row 0 has other bits than when it is alone."""
    x, weight, _ = hard_operands(max(counts), problem.n, problem.k, problem.dtype, CUDA, seed=5)
    x[1:] = x[1:].roll(3, 0)
    alone = product(x[:1].contiguous(), weight)
    return [m for m in counts if not torch.equal(bits(product(x[:m], weight)[:1]), bits(alone))]


COUNTS = [*range(1, 130), 192, 255, 256, 257, 384, 511, 512, 1000, 1024, 1025, 1100, 2047, 2048, 4097, 8192]


@pytest.mark.parametrize(("n", "k"), [(4096, 12288), (4096, 4096), (1024, 2048), (576, 1536)])
def test_a_row_has_its_bits_in_any_company(n: int, k: int) -> None:
    problem = Problem(n, k, BF16)
    dispatch.prepare(problem, 8192, CUDA)
    assert differing_row_counts(dispatch.linear, problem, COUNTS) == []


def test_control_default_linear_changes_a_row() -> None:
    assert differing_row_counts(torch.nn.functional.linear, Problem(4096, 12288, BF16), COUNTS) != []


def test_poison_stays_in_its_row() -> None:
    problem = Problem(4096, 4096, BF16)
    dispatch.prepare(problem, 8192, CUDA)
    for m in (2, 17, 33, 100, 300, 1500):
        x = torch.randn(m, 4096, device=CUDA).to(BF16)
        weight = torch.randn(4096, 4096, device=CUDA).to(BF16)
        clean = dispatch.linear(x, weight)
        x[m // 2] = float("nan")
        x[0] = float("inf")
        dirty = dispatch.linear(x, weight)
        others = [row for row in range(m) if row not in (0, m // 2)]
        assert torch.equal(bits(clean[others]), bits(dirty[others]))
        assert dirty[m // 2].isnan().all()


# --- shapes, strides, refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("n", "k"), [(100, 72), (97, 130), (63, 1000), (8, 16)])
def test_odd_shapes(n: int, k: int, dtype: torch.dtype) -> None:
    dispatch.prepare(Problem(n, k, dtype, True), 256, CUDA, fresh=True)
    x, weight, bias = hard_operands(200, n, k, dtype, CUDA)
    for m in (1, 3, 64, 200):
        want = bit_reference(x[:m].contiguous(), weight, bias)
        got = dispatch.linear(x[:m], weight, bias)
        assert torch.equal(bits(got.nan_to_num()), bits(want.nan_to_num()))


def test_strides_and_leading_dimensions() -> None:
    dispatch.prepare(Problem(512, 256, BF16), 256, CUDA)
    weight = torch.randn(512, 256, device=CUDA).to(BF16)
    wide = torch.randn(6, 40, 264, device=CUDA).to(BF16)
    for x in (wide[:, :, :256], wide[:, :, 3:259], wide[::2, 1:3, 8:], wide[0, :, :256].unsqueeze(0), wide[:, 0, 8:]):
        want = bit_reference(x.reshape(-1, 256).contiguous(), weight).view(*x.shape[:-1], 512)
        assert torch.equal(bits(dispatch.linear(x, weight)), bits(want))
    transposed = torch.randn(256, 7, device=CUDA).to(BF16).t()
    assert torch.equal(bits(dispatch.linear(transposed, weight)), bits(bit_reference(transposed.contiguous(), weight)))
    assert dispatch.linear(wide[:0, :, :256], weight).shape == (0, 40, 512)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(4, 256, device=CUDA).to(BF16), torch.randn(512, 256, device=CUDA).to(BF16)
    with pytest.raises(ValueError, match=r"x \(4, 255\)"):
        dispatch.linear(x[:, :255], weight)
    with pytest.raises(ValueError, match="contiguous weight"):
        dispatch.linear(x, weight.t().contiguous().t())
    with pytest.raises(ValueError, match="one dtype"):
        dispatch.linear(x.half(), weight)
    with pytest.raises(CertificationError, match="333x256 bfloat16 was never certified"):
        dispatch.linear(x, torch.randn(333, 256, device=CUDA).to(BF16))
    with pytest.raises(UnsupportedError, match="float64"):
        dispatch.prepare(Problem(64, 64, torch.float64), 16, CUDA)


def test_uncertified_row_counts_are_padded_and_cut() -> None:
    """A plan whose only schedule is certified at 8 rows runs 5 rows as 8, 21 as three times 8, and no other number."""
    problem, seen = Problem(512, 256, BF16), []

    @dataclasses.dataclass(frozen=True)
    class Watched(CublasLt):
        def run(self, x, weight, bias, y) -> None:
            seen.append(x.shape[0])
            super().run(x, weight, bias, y)

    schedule = Watched()
    plan = dispatch.Plan(problem, [(1 << 30, [schedule])], {schedule: [(8, 8)]})
    x, weight, _ = hard_operands(21, 512, 256, BF16, CUDA)
    for m, ran in ((5, [8]), (21, [8, 8, 8])):
        seen.clear()
        y = x.new_empty(m, 512)
        plan.run(x[:m], weight, None, y)
        assert seen == ran
        assert torch.equal(bits(y.nan_to_num()), bits(bit_reference(x[:m], weight).nan_to_num()))


# --- tables, graphs, compilation ------------------------------------------------------------------------------------
def test_a_table_changes_the_schedule_and_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(1024, 2048, BF16)
    x, weight, _ = hard_operands(300, 1024, 2048, BF16, CUDA)
    results, used = [], []
    for first in (CublasLt(), Pointer(16, 64, 128, 32, True, 4, 4), Tma(64, 64, 64, 8, False, False, 4, 4)):
        monkeypatch.setattr(dispatch, "table_for", lambda problem, card, first=first: [(1 << 30, [first])])
        dispatch.prepare(problem, 512, CUDA, fresh=True)
        results.append([dispatch.linear(x[:m], weight) for m in (1, 7, 64, 300)])
        used.append(dispatch.plan(weight, None).choose(300)[0])
    assert len(set(used)) == 3
    for other in results[1:]:
        assert all(
            torch.equal(bits(a.nan_to_num()), bits(b.nan_to_num())) for a, b in zip(results[0], other, strict=True)
        )


@pytest.mark.parametrize("m", [1, 24, 200, 2000])
def test_captured_in_a_graph(m: int) -> None:
    dispatch.prepare(Problem(4096, 4096, BF16), 8192, CUDA)
    x, weight, _ = hard_operands(m, 4096, 4096, BF16, CUDA)
    static = torch.zeros_like(x)
    dispatch.linear(static, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dispatch.linear(static, weight)
    static.copy_(x)
    graph.replay()
    assert torch.equal(bits(y.nan_to_num()), bits(dispatch.linear(x, weight).nan_to_num()))


def test_one_node_for_every_row_count_when_compiled() -> None:
    dispatch.prepare(Problem(512, 256, BF16), 512, CUDA)
    weight = torch.randn(512, 256, device=CUDA).to(BF16)
    graphs = []

    def backend(module, example_inputs):
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    compiled = torch.compile(lambda x: dispatch.linear(x, weight), backend=backend, dynamic=True)
    for m in (2, 3, 40, 333):
        x = torch.randn(m, 256, device=CUDA).to(BF16)
        assert torch.equal(bits(compiled(x)), bits(bit_reference(x, weight)))
    assert graphs == [["vllm_deterministic.linear"]]


def test_process_wide_switches_stay_as_they_are() -> None:
    def switches() -> tuple[object, ...]:
        matmul = torch.backends.cuda.matmul
        return matmul.allow_bf16_reduced_precision_reduction, torch.backends.cuda.preferred_blas_library()

    before = switches()
    dispatch.prepare(Problem(512, 256, BF16), 512, CUDA, fresh=True)
    dispatch.linear(torch.randn(4, 256, device=CUDA).to(BF16), torch.randn(512, 256, device=CUDA).to(BF16))
    assert switches() == before


# --- the commands ---------------------------------------------------------------------------------------------------
def test_tune_then_certify(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A tuned table is read by the next process, and what it names is certified."""
    from vllm_deterministic.kernels.gemm import tables, tune

    from vllm_deterministic.cli import main

    monkeypatch.setenv("VLLM_DETERMINISTIC_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "SIZES", (1, 64))
    monkeypatch.setattr(tune, "compile_all", lambda *args, **kwargs: [])  # the finalists are compiled where they run
    assert main(["tune", "--shape", "768x512"]) == 0
    card = torch.cuda.get_device_name()
    tables._tuned.cache_clear()
    first = tables.table_for(Problem(768, 512, BF16), card)[0]
    assert first[0] == 1
    assert (tmp_path / "schedules" / tables.card_file(card)).exists()
    assert main(["certify", "--shape", "768x512", "--max-m", "256"]) == 0
    assert schedules.name_of(first[1][0]).split()[0] in capsys.readouterr().out
    tables._tuned.cache_clear()


def test_a_second_start_reads_the_certificate(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DETERMINISTIC_CACHE", str(tmp_path))
    problem = Problem(640, 512, BF16)
    first = dispatch.prepare(problem, 256, CUDA)
    monkeypatch.setattr(certify, "certify", lambda *args, **kwargs: pytest.fail("certified again"))
    assert dispatch.prepare(problem, 256, CUDA) == first
