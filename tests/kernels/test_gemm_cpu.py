"""CPU linear layers: certified row counts, schedules on the tree, and planted faults that certification must catch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.kernels.gemm import cpu  # noqa: E402

from vllm_deterministic.errors import CertificationError  # noqa: E402

N, K = 96, 1536


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def ascending(x: torch.Tensor) -> torch.Tensor:
    """A product whose order never changes: one f64 accumulator per output, rounded once."""
    return (x.double()[:, None, :] * weight().double()[None]).sum(-1).to(x.dtype)


def split_k(x: torch.Tensor) -> torch.Tensor:
    """The planted fault of a library that splits K when there are few rows."""
    if x.shape[0] >= 8:
        return ascending(x)
    halves = [x[:, : K // 2], x[:, K // 2 :]]
    parts = [
        (half.double()[:, None, :] * w.double()[None]).sum(-1).to(x.dtype)
        for half, w in zip(halves, weight().chunk(2, dim=1), strict=True)
    ]
    return parts[0] + parts[1]


def leaky(x: torch.Tensor) -> torch.Tensor:
    """The planted fault of a kernel whose rows see their neighbours."""
    return ascending(x) + 0 * x.sum()


def position_dependent(x: torch.Tensor) -> torch.Tensor:
    """The planted fault of a kernel that handles the last row of an odd call in another order."""
    y = ascending(x)
    if x.shape[0] % 2:
        y[-1:] = split_k(x[-1:])
    return y


def data() -> torch.Tensor:
    return cpu.hard_rows(48, K, torch.float32)


def test_a_product_without_faults_is_certified_everywhere() -> None:
    assert cpu.certified_row_counts(ascending, data(), 40) == tuple(range(1, 41))


def test_split_k_is_caught() -> None:
    assert cpu.certified_row_counts(split_k, data(), 40) == tuple(range(8, 41))


def test_rows_at_another_position_are_caught() -> None:
    assert all(rows % 2 == 0 for rows in cpu.certified_row_counts(position_dependent, data(), 40))


def test_a_nan_that_leaks_is_caught() -> None:
    # The poisoned row is in every window of 32 rows, so not even the reference is stable.
    with pytest.raises(CertificationError, match=r"\[rows, 1536\]"):
        cpu.certified_row_counts(leaky, data(), 40)


@pytest.mark.parametrize("fault", [split_k, position_dependent])
def test_schedules_stay_on_the_tree(fault: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Any number of rows, run by a library with a fault, gives the reference's bits."""
    x = data()
    certified = cpu.certified_row_counts(fault, x, 40)
    schedule = cpu.schedule(fault, x, certified)
    many = torch.cat([x, x, x])  # more rows than a tile
    expected = cpu.reference(fault, many)
    for rows in (0, 1, 2, 7, 8, 9, 31, 39, 40, 41, 79, 100, 144):
        got = schedule.run(fault, many[:rows])
        assert torch.equal(got.nan_to_num(), expected[:rows].nan_to_num())
    # The control: without the schedule the fault shows.
    assert not torch.equal(fault(x[5:6]), expected[5:6])


def test_timing_cannot_change_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    x, certified = data(), tuple(range(8, 41))
    for clock in (lambda gemm, rows: float(rows.shape[0]), lambda gemm, rows: -float(rows.shape[0])):
        monkeypatch.setattr(cpu, "_seconds", clock)
        got = cpu.schedule(split_k, x, certified).run(split_k, x[:3])
        assert torch.equal(got, cpu.reference(split_k, x)[:3])


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
        _, gemm = linear.packed_product(weight(dtype), None)
        x = cpu.hard_rows(cpu.MAX_TILE + 40, K, dtype)
        certified = cpu.certified_row_counts(gemm, x, 64)
        schedule = cpu.schedule(gemm, x, certified)
        expected = cpu.reference(gemm, x)
        exact = x.double() @ weight(dtype).double().T
        for rows in (1, 2, 3, 5, 8, 17, 31, 32, 33, 64, 65, 150):
            got = schedule.run(gemm, x[:rows])
            assert torch.equal(got.nan_to_num(), expected[:rows].nan_to_num())
            assert torch.equal(got.isnan(), expected[:rows].isnan())
        # Integers are exact in every order; a normal row is within n * eps of sum |x||w| of the f64 product.
        whole = (weight(torch.float32) * 2).round()
        _, exactly = linear.packed_product(whole.to(dtype), None)
        integers = x[torch.arange(len(x)) % 6 == 4]
        assert torch.equal(cpu.reference(exactly, integers), (integers.double() @ whole.double().T).to(dtype))
        normal = torch.arange(len(x)) % 6 == 0
        scale = x.double().abs() @ weight(dtype).double().abs().T
        bound = (K * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps) * scale
        assert bool(((expected.double() - exact).abs() <= bound)[normal].all())
    finally:
        torch.set_num_threads(before)
