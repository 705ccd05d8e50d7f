"""Norms on a real card: a row's bits do not see how many rows there are, where it stands, what its neighbours are."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.kernels.norm.rms import fused_add_rms_norm, rms_norm  # noqa: E402

SIZES = [64, 128, 576, 1024, 2048, 4096, 5120, 8192]
EPSILON = 1e-6


def operands(rows: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(size)
    x, residual = (torch.randn(rows, size, generator=generator, device="cuda") for _ in range(2))
    x[::3] *= 100  # rows of other magnitudes
    x[1::3, :7] *= 3000
    weight = torch.randn(size, generator=generator, device="cuda")
    return x.to(dtype), residual.to(dtype), weight.to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    x = x.double() if residual is None else x.double() + residual.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_a_row_does_not_see_the_batch(size: int, dtype: torch.dtype) -> None:
    rows = 4099
    x, residual, weight = operands(rows, size, dtype)
    x[50], x[51, 3] = float("nan"), float("inf")
    for kind in (weight, weight.float() + 1.0, None):  # Llama's, Gemma's, none
        norm, (added, total) = rms_norm(x, kind, EPSILON), fused_add_rms_norm(x, residual, kind, EPSILON)
        for count in (1, 2, 3, 16, 17, 33, 64, 100, 131, 257, 1024, 4098):
            for start in (0, 49, rows - count - 3):
                part = slice(max(start, 0), max(start, 0) + count)
                again, (fused, summed) = rms_norm(x[part], kind, EPSILON), fused_add_rms_norm(
                    x[part], residual[part], kind, EPSILON
                )  # fmt: skip
                for one, other in ((again, norm[part]), (fused, added[part]), (summed, total[part])):
                    assert torch.equal(one.view(torch.int16), other.view(torch.int16)), (count, start)
    assert torch.equal(total.nan_to_num(), (x.float() + residual.float()).to(dtype).nan_to_num())


@pytest.mark.parametrize("size", [576, 4096])
def test_the_order_of_the_sum_would_be_seen(size: int) -> None:
    """The control: the same rows with their elements, and the weight's, in another order give other bits."""
    x, _, weight = operands(4099, size, torch.bfloat16)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2)).cuda()
    assert not torch.equal(rms_norm(x, weight, EPSILON)[:, order], rms_norm(x[:, order], weight[order], EPSILON))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_values(size: int, dtype: torch.dtype) -> None:
    x, residual, weight = operands(301, size, dtype)
    # Two roundings to the dtype, of the row and of the product, and f32's errors, which are far smaller.
    unit = torch.finfo(dtype).eps / 2
    for found, want in (
        (rms_norm(x, weight, EPSILON), exact(x, weight)),
        (fused_add_rms_norm(x, residual, weight, EPSILON)[0], exact(x, weight, residual)),
    ):
        assert ((found.double() - want).abs() <= 2.2 * unit * want.abs() + torch.finfo(dtype).tiny).all()


def test_heads_in_a_fused_projection() -> None:
    """Per-head norms read q and k out of the projection's output, whose rows are longer."""
    qkv, _, _ = operands(333, 6144, torch.bfloat16)
    weight = operands(1, 128, torch.bfloat16)[2]
    for heads, start in ((32, 0), (8, 4096)):
        view = qkv[:, start : start + heads * 128].view(333, heads, 128)
        found = rms_norm(view, weight, EPSILON)
        assert found.is_contiguous()
        assert torch.equal(found, rms_norm(view.contiguous(), weight, EPSILON))
        assert torch.equal(found.view(-1, 128), rms_norm(view.reshape(-1, 128), weight, EPSILON))


def test_what_is_not_covered() -> None:
    x, residual, weight = operands(4, 128, torch.bfloat16)
    for bad in (
        operands(5, 129, torch.bfloat16)[0],
        torch.zeros(4 * 129, dtype=x.dtype, device="cuda")[4:516].view(4, 128),
    ):
        with pytest.raises(ValueError, match="not covered"):
            rms_norm(bad, None, EPSILON)
    with pytest.raises(ValueError, match="not covered"):
        fused_add_rms_norm(x, residual.t().contiguous().t(), weight, EPSILON)


def test_in_a_compiled_graph_and_a_cuda_graph() -> None:
    x, residual, weight = operands(96, 4096, torch.bfloat16)

    def layer(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out, total = torch.ops.vllm_deterministic.fused_add_rms_norm(x, residual, weight, EPSILON)
        return out * 2 + total

    want = layer(x, residual)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x, residual), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x, residual)
    graph.replay()
    assert torch.equal(captured, want)
