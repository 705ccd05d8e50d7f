"""The norms' kernel through Triton's interpreter: values, views, what is refused. The order of the sum needs a card."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.kernels.norm import rms  # noqa: E402

EPSILON = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [64, 576])
def test_values(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    x, residual = (torch.randn(35, size, generator=generator).to(dtype) for _ in range(2))
    x[3], x[4, 5] = float("nan"), 3e4
    unit = torch.finfo(dtype).eps / 2
    for weight in (torch.randn(size, generator=generator).to(dtype), torch.randn(size, generator=generator), None):
        gain = 1.0 if weight is None else weight.double()
        for added in (None, residual):
            total = x.double() if added is None else x.double() + added.double()
            want = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPSILON) * gain
            found, stored = rms._launch(x, added, weight, EPSILON)
            assert found.dtype == dtype
            assert torch.equal(found.isnan(), want.isnan())
            alive = ~want.isnan()
            # A rounding to the weight's dtype, one to the row's, and the errors of f32 sums and roots.
            allowed = (2.2 * unit + 1e-6) * want.abs() + torch.finfo(dtype).tiny
            assert ((found.double() - want).abs() <= allowed)[alive].all()
            if added is not None:
                assert torch.equal(stored.nan_to_num(), (x.float() + added.float()).to(dtype).nan_to_num())


def test_heads_of_a_fused_projection() -> None:
    qkv = torch.randn(5, 6 * 64, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(64)
    for heads, start in ((4, 0), (2, 256)):
        view = qkv[:, start : start + heads * 64].view(5, heads, 64)
        found = rms._norm(view, weight, EPSILON)
        assert found.is_contiguous()
        assert torch.equal(found, rms._norm(view.contiguous(), weight, EPSILON))
        assert torch.equal(found[2, 1], rms._norm(view[2:3, 1].clone(), weight, EPSILON)[0])


@pytest.mark.parametrize(
    "x",
    [torch.zeros(4, 66), torch.zeros(4 * 65)[1:257].view(4, 64), torch.zeros(64, 4).t(), torch.zeros(1, 16392)],
    ids=["row of 66", "unaligned", "transposed", "too long"],
)
def test_what_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not covered"):
        rms._norm(x, None, EPSILON)


def test_a_weight_whose_elements_lie_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="not covered"):
        rms._norm(torch.zeros(2, 64), torch.ones(128)[::2], EPSILON)


def test_no_rows() -> None:
    assert rms._norm(torch.zeros(0, 64), None, EPSILON).shape == (0, 64)
