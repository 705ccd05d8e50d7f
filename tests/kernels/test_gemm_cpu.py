"""CPU linear layers: certified row counts, schedules on the tree, and planted faults that certification must catch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.kernels.gemm import cpu  # noqa: E402

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


def test_split_k_is_caught() -> None:
    assert cpu.certified_row_counts(split_k, data(), N, 40) == tuple(range(8, 41))


def test_rows_at_another_position_are_caught() -> None:
    assert all(rows % 2 == 0 for rows in cpu.certified_row_counts(position_dependent, data(), N, 40))


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
    for rows in (0, 1, 2, 7, 8, 9, 31, 39, 40, 41, 79, 100, 144):
        got = run(fault, many[:rows], schedule)
        assert torch.equal(got.nan_to_num(), expected[:rows].nan_to_num())
    # The control: without the schedule the fault shows.
    assert not torch.equal(run(fault, x[5:6]), expected[5:6])


def test_timing_cannot_change_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    x, certified = data(), tuple(range(8, 41))
    for sign in (1, -1):
        monkeypatch.setattr(cpu, "_seconds", lambda gemms, x, n, counts, s=sign: {c: float(s * c) for c in counts})
        got = run(split_k, x[:3], cpu.schedule([split_k], x, N, certified))
        assert torch.equal(got, cpu.reference(split_k, x, N)[:3])


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
        for rows in (1, 2, 3, 5, 8, 17, 31, 32, 33, 64, 65, 150):
            got = run(gemm, x[:rows], schedule)
            assert torch.equal(got.nan_to_num(), expected[:rows].nan_to_num())
            assert torch.equal(got.isnan(), expected[:rows].isnan())
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
