"""The gradients' kernels through Triton's interpreter: values, and sums that go on. Their order in hardware needs a
card (tests/gpu/test_train.py)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.kernels import gradients  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
import sequences  # noqa: E402
from sequences import spans  # noqa: E402

random = functools.partial(sequences.random, device="cpu")
EPSILON = 1e-5
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


@dtypes
@pytest.mark.parametrize("size", [64, 576])
def test_norms(size: int, dtype: torch.dtype) -> None:
    x, residual, dy, dtotal = (random(35, size, dtype=dtype, seed=i) for i in range(4))
    weight = random(size, dtype=dtype, seed=5)
    for added, dsum in ((None, None), (residual, dtotal)):
        total = (x.double() if added is None else x.double() + added.double()).requires_grad_()
        scale = weight.double().requires_grad_()
        y = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPSILON) * scale
        (y * dy.double()).sum().backward()
        dx, terms = gradients.norm_gradient(dy, dsum, x, added, weight, EPSILON)
        want = total.grad if dsum is None else total.grad + dsum.double()
        torch.testing.assert_close(dx, want.to(dtype))
        # Each term has one rounding of the normalised row.
        unit = torch.finfo(dtype).eps
        assert (terms.sum(0) - scale.grad).abs().max() <= 35 * 4 * unit * scale.grad.abs().max()


@dtypes
def test_silu_and_mul(dtype: torch.dtype) -> None:
    gate, up, dy = (random(7, 600, dtype=dtype, seed=i) * 4 for i in range(3))
    wide = [t.double().requires_grad_() for t in (gate, up)]
    (torch.nn.functional.silu(wide[0]) * wide[1] * dy.double()).sum().backward()
    for found, want in zip(gradients.silu_and_mul_gradient(dy, gate, up), wide, strict=True):
        torch.testing.assert_close(found, want.grad.to(dtype))


LENGTHS = (5, 64, 131, 1, 70)
SPANS = spans(LENGTHS)


def summed(dy: torch.Tensor, x: torch.Tensor, groups: list[list[slice]]) -> torch.Tensor:
    total = torch.zeros(dy.shape[1], x.shape[1])
    for group in groups:
        gradients.add_product(total, dy, x, group)
    return total


@dtypes
def test_products_that_go_on_have_the_same_bits(dtype: torch.dtype) -> None:
    dy, x = random(sum(LENGTHS), 200, dtype=dtype), random(sum(LENGTHS), 300, dtype=dtype, seed=1)
    at_once = summed(dy, x, [SPANS])
    torch.testing.assert_close(at_once, (dy.double().t() @ x.double()).float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(summed(dy, x, [[span] for span in SPANS]), at_once)
    assert torch.equal(summed(dy, x, [SPANS[:2], SPANS[2:]]), at_once)
    # Elsewhere in the batch, a sequence's rows are the same tiles.
    moved = [torch.cat([t[69:], t[:69]]) for t in (dy, x)]
    starts = {0: 202, 1: 207, 2: 0, 3: 131, 4: 132}
    again = [slice(starts[i], starts[i] + length) for i, length in enumerate(LENGTHS)]
    assert torch.equal(summed(*moved, [again]), at_once)
    # What stands beside them is not read.
    beside = [torch.nn.functional.pad(t, (0, 0, 0, 70), value=torch.nan) for t in (dy, x)]
    assert torch.equal(summed(*beside, [SPANS]), at_once)
    # The controls: another order, and tiles that do not begin with a sequence.
    assert not torch.equal(summed(dy, x, [SPANS[::-1]]), at_once)
    assert not torch.equal(summed(dy, x, [[slice(0, sum(LENGTHS))]]), at_once)


@dtypes
@pytest.mark.parametrize("shape", [(200,), (3, 72)])
def test_sums_of_rows_that_go_on_have_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    terms = random(sum(LENGTHS), *shape, dtype=dtype)

    def summed(groups: list[list[slice]]) -> torch.Tensor:
        total = torch.ones(shape[-1])
        for group in groups:
            gradients.add_rows(total, terms, group)
        return total

    at_once = summed([SPANS])
    want = terms.double().reshape(-1, shape[-1]).sum(0) + 1
    torch.testing.assert_close(at_once, want.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(summed([SPANS[:2], SPANS[2:]]), at_once)
    # The controls, as above.
    assert not torch.equal(summed([SPANS[::-1]]), at_once)
    assert not torch.equal(summed([[slice(0, sum(LENGTHS))]]), at_once)


@dtypes
def test_embeddings_are_added_row_after_row(dtype: torch.dtype) -> None:
    dy = random(50, 1100, dtype=dtype)
    ids = torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(1))

    def summed(rows: Iterable[int], cut: int) -> torch.Tensor:
        total, order = random(9, 1100, dtype=torch.float32, seed=2), torch.tensor(list(rows))
        for part in (order[:cut], order[cut:]):
            gradients.add_embeddings(total, dy[part], ids[part])
        return total

    want = random(9, 1100, dtype=torch.float32, seed=2)
    for token, row in zip(ids, dy, strict=True):
        want[token] += row.float()
    assert torch.equal(summed(range(50), 17), want)
    assert torch.equal(summed(range(50), 49), want)
    assert not torch.equal(summed(reversed(range(50)), 17), want)  # the control: another order
