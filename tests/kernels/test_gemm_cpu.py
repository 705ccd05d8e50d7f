"""CPU linear layers: certified row counts, schedules on the tree, and planted faults that certification must catch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.kernels.gemm import cpu, rows  # noqa: E402

from vllm_deterministic.errors import CertificationError  # noqa: E402

N, K = 96, 1536


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A product whose order never changes: one f64 accumulator per output, rounded once."""
    return (x.double()[:, None, :] * w.double()[None]).sum(-1).to(x.dtype)


def ascending(x: torch.Tensor, y: torch.Tensor) -> None:
    y.copy_(product(x, weight()))


def split_k(x: torch.Tensor, y: torch.Tensor) -> None:
    """The planted fault of a library that splits K when there are few rows."""
    if x.shape[0] >= 8:
        return ascending(x, y)
    half = K // 2
    y.copy_(product(x[:, :half], weight()[:, :half]) + product(x[:, half:], weight()[:, half:]))


def leaky(x: torch.Tensor, y: torch.Tensor) -> None:
    """The planted fault of a kernel whose rows see their neighbours."""
    y.copy_(product(x, weight()) + 0 * x.sum())


def position_dependent(x: torch.Tensor, y: torch.Tensor) -> None:
    """The planted fault of a kernel that handles the last row of an odd call in another order."""
    ascending(x, y)
    if x.shape[0] % 2:
        split_k(x[-1:], y[-1:])


def run(gemm: cpu.Gemm, x: torch.Tensor, schedule: cpu.RowSchedule | None = None) -> torch.Tensor:
    y = x.new_empty(x.shape[0], N)
    schedule.run(gemm, x, y) if schedule else gemm(x, y)
    return y


def data() -> torch.Tensor:
    return cpu.hard_rows(48, K, torch.float32)


def test_a_product_without_faults_is_certified_everywhere() -> None:
    assert cpu.certified_row_counts(ascending, data(), N, 40) == tuple(range(1, 41))


def test_the_reference_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in vLLM's CPU worker, where torch.set_num_threads does nothing."""
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)

    def product(x: torch.Tensor, y: torch.Tensor) -> None:
        seen.append(torch.get_num_threads())
        y.zero_()

    cpu.reference(product, torch.ones(40, 8), 4)
    after = torch.get_num_threads()
    torch._C.set_num_threads(before)
    assert seen == [1, 1]
    assert after == 2


def test_split_k_is_caught() -> None:
    assert cpu.certified_row_counts(split_k, data(), N, 40) == tuple(range(8, 41))


def test_rows_at_another_position_are_caught() -> None:
    assert all(count % 2 == 0 for count in cpu.certified_row_counts(position_dependent, data(), N, 40))


def test_a_nan_that_leaks_is_caught() -> None:
    # The poisoned row is in every window of 32 rows, so not even the reference is stable.
    with pytest.raises(CertificationError, match=r"\[rows, 1536\]"):
        cpu.certified_row_counts(leaky, data(), N, 40)


@pytest.mark.parametrize("fault", [split_k, position_dependent])
def test_schedules_stay_on_the_tree(fault: cpu.Gemm) -> None:
    """Any number of rows, run by a library with a fault, gives the reference's bits."""
    x = data()
    certified = cpu.certified_row_counts(fault, x, N, 40)
    schedule = cpu.schedule([fault], x, N, certified)
    many = torch.cat([x, x, x])  # more rows than a tile
    expected = cpu.reference(fault, many, N)
    for count in (0, 1, 2, 7, 8, 9, 31, 39, 40, 41, 79, 100, 144):
        got = run(fault, many[:count], schedule)
        assert torch.equal(got.nan_to_num(), expected[:count].nan_to_num())
    # The control: without the schedule the fault shows.
    assert not torch.equal(run(fault, x[5:6]), expected[5:6])


def test_timing_cannot_change_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    x, certified = data(), tuple(range(8, 41))
    for sign in (1, -1):
        monkeypatch.setattr(cpu, "_seconds", lambda gemms, x, n, counts, s=sign: {c: float(s * c) for c in counts})
        got = run(split_k, x[:3], cpu.schedule([split_k], x, N, certified))
        assert torch.equal(got, cpu.reference(split_k, x, N)[:3])


@pytest.fixture(scope="module")
def faulty_product() -> str:
    """split_k as an operator with the signature of a library's packed product."""
    library = torch.library.Library("vllm_deterministic_test", "FRAGMENT")
    library.define("split_k(Tensor! y, Tensor x, Tensor? bias, Tensor weight) -> ()")
    library.impl("split_k", lambda y, x, bias, weight: split_k(x, y), "CPU")
    _libraries.append(library)
    return "vllm_deterministic_test::split_k"


_libraries: list[torch.library.Library] = []


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "python"])
def test_the_operator_runs_the_schedule(native: bool, faulty_product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms give the reference's bits for any number of rows, and refuse the number of another weight."""
    assert rows.compiled(), "a C++ compiler is there, so the operator must be the compiled one"
    operator = torch.ops.vllm_deterministic.cpu_linear
    if not native:
        monkeypatch.setattr(rows, "compiled", lambda: False)
        operator = rows._in_python
    x = data()
    schedule = cpu.schedule([split_k], x, N, cpu.certified_row_counts(split_k, x, N, 40))
    number = rows.add_schedule(faulty_product, N, K, schedule)
    packed = torch.zeros(1, dtype=torch.int64)
    many = torch.cat([x, x, x])
    expected = cpu.reference(split_k, many, N)
    for count in (0, 1, 2, 7, 8, 9, 40, 41, 79, 144):
        y = torch.empty(count, N)
        operator(y, many[:count], None, packed, number)
        assert torch.equal(y.nan_to_num(), expected[:count].nan_to_num())
    every_other = many.repeat_interleave(2, 0)[::2]  # rows that do not lie one after another
    y = torch.empty(3, N)
    operator(y, every_other[:3], None, packed, number)
    assert torch.equal(y, expected[:3])
    with pytest.raises(RuntimeError, match=rf"schedule {number} is of weights \[96, 1536\]"):
        operator(torch.empty(1, N + 1), many[:1], None, packed, number)


def test_without_a_compiler_the_bits_are_the_same(tmp_path: Path) -> None:
    """The operator runs from Python, with a warning; shown in a process of its own, since one process has one form."""
    program = """
import logging; logging.basicConfig()
from vllm_deterministic.kernels.gemm import rows
print(rows.compiled())
"""
    environ = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, check=False)
    assert done.stdout.strip() == "False", done.stderr
    assert "Is g++ installed (or CXX set)?" in done.stderr


def counting(calls: list[int]) -> Callable[[torch.Tensor, torch.Tensor | None], cpu.Gemm]:
    def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> cpu.Gemm:
        def gemm(x: torch.Tensor, y: torch.Tensor) -> None:
            calls.append(x.shape[0])
            y.copy_(product(x, weight))

        return gemm

    return pack


def test_a_certificate_is_kept_and_a_broken_cache_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "BEYOND_CACHE", 0)
    monkeypatch.setattr(cpu, "_seconds", lambda gemms, x, n, counts: dict.fromkeys(counts, 1.0))

    def calls(**libraries: str) -> int:
        made: list[int] = []
        schedule, found = cpu.certify(counting(made), 8, 64, torch.float32, False, {"library": "1", **libraries})
        assert (found.certified, found.dropped) == ([(1, 128)], [])
        assert schedule.padded == tuple(range(1, 129))
        return len(made)

    monkeypatch.setenv("VLLM_DETERMINISTIC_CACHE", str(tmp_path))
    assert calls() > 128
    assert calls() == 0
    assert calls(library="2") > 128  # another version of the library is another machine
    for file in (tmp_path / "certificates").iterdir():
        file.write_text(file.read_text()[:-9])
    assert calls() > 128
    assert "certifying again" in caplog.text
    assert calls() == 0
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_DETERMINISTIC_CACHE", str(tmp_path / "file"))
    assert calls() > 128
    assert "certificates are not kept" in caplog.text


def test_the_machine_names_what_bits_may_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cpu.machine({"vllm": "1"})
    assert plain != cpu.machine({"vllm": "2"})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert plain != cpu.machine({"vllm": "1"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_vllms_onednn_product_on_the_tree(dtype: torch.dtype, threads: int) -> None:
    """The real library: with the schedule every row count gives one set of bits, without it some do not."""
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("the CPU kernel is in the CPU build only")
    platforms.current_platform.import_kernels()
    from vllm_deterministic.integration import linear

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gemm = linear.packed_product(weight(dtype), None)
        x = cpu.hard_rows(cpu.MAX_TILE + 40, K, dtype)
        certified = cpu.certified_row_counts(gemm, x, N, 64)
        schedule = cpu.schedule([gemm], x, N, certified)
        expected = cpu.reference(gemm, x, N)
        exact = x.double() @ weight(dtype).double().T
        for count in (1, 2, 3, 5, 8, 17, 31, 32, 33, 64, 65, 150):
            got = run(gemm, x[:count], schedule)
            assert torch.equal(got.nan_to_num(), expected[:count].nan_to_num())
            assert torch.equal(got.isnan(), expected[:count].isnan())
        # Integers are exact in every order; a normal row is within n * eps of sum |x||w| of the f64 product.
        whole = (weight(torch.float32) * 2).round()
        exactly = linear.packed_product(whole.to(dtype), None)
        integers = x[torch.arange(len(x)) % 6 == 4]
        assert torch.equal(cpu.reference(exactly, integers, N), (integers.double() @ whole.double().T).to(dtype))
        normal = torch.arange(len(x)) % 6 == 0
        scale = x.double().abs() @ weight(dtype).double().abs().T
        bound = (K * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps) * scale
        assert bool(((expected.double() - exact).abs() <= bound)[normal].all())
    finally:
        torch.set_num_threads(before)
