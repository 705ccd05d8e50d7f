"""Linear layers through Triton's interpreter: values, edges and masks of every kernel, and certification's own logic.

The interpreter adds up each tile from zero (conftest.py), so its sums depend on block_k: values are compared with
float64, and bits only where schedules have the block_k of the reference. bfloat16 is left out: the interpreter gets it
wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.kernels.certificates import Certificate  # noqa: E402
from vllm_deterministic.kernels.gemm import certify, dispatch, schedules, tables  # noqa: E402
from vllm_deterministic.kernels.gemm.hard_data import hard_operands  # noqa: E402
from vllm_deterministic.kernels.gemm.pointer import Pointer  # noqa: E402
from vllm_deterministic.kernels.gemm.reference import bit_reference, error_bound, exact  # noqa: E402
from vllm_deterministic.kernels.gemm.tma import Tma  # noqa: E402
from vllm_deterministic.kernels.gemm.tree import Problem, tree_of  # noqa: E402

from vllm_deterministic.errors import CertificationError, ConfigurationError, UnsupportedError  # noqa: E402

CPU = torch.device("cpu")
SOUND = Pointer(64, 64, 64, 64, False, 4, 3)  # the reference's own tile
KERNELS = [
    SOUND,
    Pointer(16, 64, 64, 32, True, 4, 3),
    Pointer(16, 32, 128, 32, False, 4, 3),
    Tma(16, 64, 64, 8, True, False, 4, 3),
    Tma(64, 64, 64, 2, False, False, 4, 3),
    Tma(32, 64, 64, 8, False, True, 4, 3),
]


@pytest.mark.parametrize("schedule", KERNELS, ids=schedules.name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 96), (5, 72, 200), (37, 64, 128)])
def test_values_at_the_edges(schedule: schedules.Schedule, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, weight, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    x[m // 2, 3] = float("nan")  # stays in its row
    y = torch.full((m, n), 7.0)
    schedule.run(x, weight, bias, y)
    want = exact(x, weight, bias)
    assert torch.equal(y.isnan(), want.isnan())
    # One addition more than the bound counts: the bias.
    allowed = error_bound(x, weight) + 2.0**-23 * want.abs()
    assert ((y - want).abs() <= allowed)[~want.isnan()].all()


def test_reference_is_exact_on_integers() -> None:
    x, weight = torch.randint(-8, 9, (70, 130)).float(), torch.randint(-8, 9, (66, 130)).float()
    assert torch.equal(bit_reference(x, weight).double(), exact(x, weight))


@dataclasses.dataclass(frozen=True)
class Faulty:
    """The reference with a fault at some row counts."""

    at: int
    fault: Callable[[torch.Tensor], None] = lambda y: None

    family = "faulty"
    one_kernel = True

    def refusal(self, problem: Problem) -> None:
        return None

    def rows(self, m: int) -> int:
        return m

    def run(self, x, weight, bias, y) -> None:
        y.copy_(bit_reference(x, weight, bias, y.dtype))
        if x.shape[0] == self.at:
            self.fault(y)


def last_bit(y: torch.Tensor) -> None:
    y.view(torch.int32)[-1, -1] ^= 1


def sign_of_zero(y: torch.Tensor) -> None:
    y[y == 0] = -0.0


def cannot(y: torch.Tensor) -> None:
    raise RuntimeError("no algorithm")


PROBLEM = Problem(64, 128, torch.float32)


@pytest.mark.parametrize("at", [1, 3, 20, 70])
def test_one_wrong_bit_drops_a_schedule(at: int) -> None:
    faulty, sound = Faulty(at, last_bit), Faulty(0)
    certified, dropped = certify.certify(PROBLEM, [(faulty, range(1, 71)), (sound, range(1, 71))], CPU)
    assert list(certified) == [schedules.name_of(sound)]
    assert f"M = {at}" in dropped[schedules.name_of(faulty)]


def test_a_row_count_that_does_not_run_is_left_out() -> None:
    certified, dropped = certify.certify(PROBLEM, [(Faulty(9, cannot), range(1, 21))], CPU)
    assert list(certified.values()) == [[(1, 8), (10, 20)]]
    assert "M = 9: RuntimeError: no algorithm" in next(iter(dropped.values()))


def test_a_library_that_chooses_by_row_count_loses_that_row_count_only() -> None:
    class Library(Faulty):
        one_kernel = False

    certified, dropped = certify.certify(PROBLEM, [(Library(9, last_bit), range(1, 21))], CPU)
    assert list(certified.values()) == [[(1, 8), (10, 20)]]
    assert "1 row counts left out; M = 9" in next(iter(dropped.values()))


def test_the_sign_of_zero_is_a_bit_and_a_nan_is_a_nan() -> None:
    x, weight = torch.zeros(45, 128), torch.zeros(64, 128)
    x[:, 0] = float("nan")
    x[3::2, 0] = 0
    expected = bit_reference(x, weight)
    out = torch.empty_like(expected)
    unable, differing = certify._run(Faulty(5, sign_of_zero), [4, 5], x, weight, None, expected, out)
    assert not unable
    assert list(differing) == [5]


def test_whole_tiles_stand_for_the_counts_that_fill_them() -> None:
    certified, dropped = certify.certify(PROBLEM, [(SOUND, [3, 70])], CPU)
    assert not dropped
    assert certified == {schedules.name_of(SOUND): [(1, 70)]}


def test_another_order_is_dropped() -> None:
    """Twice the block_k is another order under the interpreter: a real planted fault, found in real sums."""
    other = Pointer(16, 64, 128, 64, False, 4, 3)
    certified, dropped = certify.certify(Problem(64, 512, torch.float16), [(other, [1, 16]), (SOUND, [1, 16])], CPU)
    assert list(certified) == [schedules.name_of(SOUND)]
    assert "elements differ" in dropped[schedules.name_of(other)]


def test_a_wrong_reference_is_refused() -> None:
    with pytest.raises(CertificationError, match="reference kernel itself"):
        certify.certify(PROBLEM, [(SOUND, [1])], CPU, lambda x, w, b, dtype: bit_reference(x, w, b, dtype) * 1.001)


def test_row_counts() -> None:
    assert certify.row_counts(5) == [1, 2, 3, 4, 5]
    counts = certify.row_counts(2000)
    assert counts[:1024] == list(range(1, 1025))
    assert counts[1024:] == [1152, 1280, 1408, 1536, 1664, 1792, 1920, 2000]


# --- plans --------------------------------------------------------------------------------------------------------
def plan(certified: dict[schedules.Schedule, list[tuple[int, int]]], table: tables.Table) -> dispatch.Plan:
    found = Certificate("linear", "", {}, {}, {schedules.name_of(s): spans for s, spans in certified.items()})
    return dispatch.Plan.of(PROBLEM, table, found)


def test_a_plan_runs_certified_row_counts_only() -> None:
    first, second = SOUND, Tma(64, 64, 64, 2, False, False, 4, 3)
    table: tables.Table = [(8, [first, second]), (1 << 30, [second, first])]
    made = plan({first: [(1, 4), (6, 20)], second: [(10, 12), (2048, 2048)]}, table)
    assert made.choose(3) == (first, 3)
    assert made.choose(5) == (first, 6)  # 5 is certified for neither: padded
    assert made.choose(11) == (second, 11)
    assert made.choose(13) == (first, 13)
    assert made.choose(1500) == (second, 2048)
    assert made.most == 2048


def test_padded_and_cut_rows_have_the_bits_of_the_reference() -> None:
    x, weight, _ = hard_operands(21, 64, 128, torch.float32)
    made = plan({SOUND: [(8, 8)]}, [(1 << 30, [SOUND])])
    for m in (1, 5, 8, 21):
        y = torch.empty(m, 64)
        made.run(x[:m], weight, None, y)
        want = bit_reference(x[:m], weight)
        assert torch.equal(y.nan_to_num().view(torch.int32), want.nan_to_num().view(torch.int32))


def test_no_schedule_left_is_an_error_that_names_the_dropped() -> None:
    found = Certificate("linear", "", {}, {}, {}, {"pointer x": "dropped; M = 3"})
    with pytest.raises(CertificationError, match=r"64x128 float32.*pointer x: dropped; M = 3"):
        dispatch.Plan.of(PROBLEM, [(1 << 30, [SOUND])], found)


# --- names, tables, trees -----------------------------------------------------------------------------------------
def test_names_read_back() -> None:
    from vllm_deterministic.kernels.gemm.cublaslt import CublasLt

    for schedule in (*KERNELS, CublasLt(), CublasLt(66, 10, 35, 4, option=1)):
        assert schedules.parse(schedules.name_of(schedule)) == schedule
    for wrong in ("", "magic block_m=1", "pointer block_m=sixteen", "pointer block_m=16", "tma x=1"):
        with pytest.raises(ConfigurationError, match="names no schedule"):
            schedules.parse(wrong)


def test_shipped_table_parses_and_has_two_families_everywhere() -> None:
    shapes = tables._tuned("NVIDIA H200")
    assert len(shapes) >= 18
    for shape in shapes:
        n, k = map(int, shape.split("x"))
        table = tables.table_for(Problem(n, k, torch.bfloat16), "NVIDIA H200")
        assert table[-1][0] >= 1 << 30
        for _, entry in table:
            assert len({schedule.family for schedule in entry}) >= 2


def test_unknown_card_and_broken_table_fall_back(tmp_path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    problem = Problem(4096, 12288, torch.bfloat16)
    assert tables.table_for(problem, "Card X") == schedules.default_table(problem)
    monkeypatch.setenv("VLLM_DETERMINISTIC_CACHE", str(tmp_path))
    (tmp_path / "schedules").mkdir()
    for text in ('{"shapes": {"4096x12288": [[1, ["magic"]]]}}', "{", '{"shapes": {"4096x12288": [[1]]}}'):
        (tmp_path / "schedules" / "card-y.json").write_text(text)
        tables._tuned.cache_clear()
        assert tables.table_for(problem, "Card Y") == schedules.default_table(problem)
    tables._tuned.cache_clear()
    assert "the default is used" in caplog.text


def test_every_default_has_two_families() -> None:
    for problem in (
        Problem(4096, 4096, torch.bfloat16),
        Problem(97, 130, torch.float16),
        Problem(64, 64, torch.float32),
    ):
        for _, entry in schedules.default_table(problem):
            eligible = [schedule for schedule in entry if schedule.refusal(problem) is None]
            assert len({schedule.family for schedule in eligible}) == 2


def test_trees() -> None:
    assert tree_of(torch.bfloat16).digest == tree_of(torch.float16).digest != tree_of(torch.float32).digest
    with pytest.raises(UnsupportedError, match="int8"):
        tree_of(torch.int8)
