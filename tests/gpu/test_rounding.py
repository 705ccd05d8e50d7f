"""Compiled elementwise code on a real card: it rounds at the same places whatever is fused, tuned or hinted."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch._inductor import config  # noqa: E402

HIDDEN = 3072


def layer(x: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """What a model does between products, as vLLM's native layers write it: SwiGLU, rotary embedding, residual."""
    gate, up = x.chunk(2, dim=-1)
    y = torch.nn.functional.silu(gate) * up
    cos, sin = table.index_select(0, positions).unsqueeze(-2).chunk(2, dim=-1)
    left, right = y.view(-1, HIDDEN // 128, 128).chunk(2, dim=-1)
    rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).view(-1, HIDDEN)
    return (rotated + residual) * 0.3125 + residual


def operands(rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(4)
    make = lambda *shape: torch.randn(*shape, generator=generator, device="cuda").bfloat16()  # noqa: E731
    return make(2048, 2 * HIDDEN)[:rows], make(2048, HIDDEN)[:rows], torch.arange(rows, device="cuda"), make(4096, 128)


def compiled(hint: int, **settings: object) -> dict[int, torch.Tensor]:
    """Results for several numbers of rows, of one graph that was compiled with `hint` rows at hand."""
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True, **settings):
        graph = torch.compile(layer, fullgraph=True)
        first = operands(hint)
        for operand in first[:3]:
            torch._dynamo.mark_dynamic(operand, 0)
        graph(*first)
        return {rows: graph(*operands(rows)) for rows in (3, 17, 200, 2048)}


UNFUSED = {"realize_opcount_threshold": 1, "realize_reads_threshold": 1, "max_fusion_size": 1}


def test_neither_fusion_nor_hints_nor_tuning_reach_a_bit() -> None:
    want = compiled(2048, emulate_precision_casts=True)[2048]
    for hint, settings in ((2048, UNFUSED), (16, {}), (16, UNFUSED), (2048, {"max_autotune_pointwise": True})):
        for rows, found in compiled(hint, emulate_precision_casts=True, **settings).items():
            assert torch.equal(found, want[:rows]), (hint, settings, rows)
    eager = layer(*operands(2048))
    share = float((eager != want).float().mean())
    print(f"{share:.2e} of the elements differ from the eager layer's, whose exp is another")
    assert share < 1e-3


def test_without_the_emulation_fusion_would_be_seen() -> None:
    """The control: Inductor's default keeps intermediates of a fused kernel in f32."""
    assert not torch.equal(compiled(2048)[2048], compiled(2048, **UNFUSED)[2048])
