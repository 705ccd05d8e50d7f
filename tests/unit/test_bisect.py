"""The first operator whose bits depend on the batch is found in a small model, and none where there is none."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic import cli  # noqa: E402
from vllm_deterministic.bisect import first_difference  # noqa: E402
from vllm_deterministic.integration.digests import Pass, Recorder  # noqa: E402


class Layer(torch.nn.Module):
    """Elementwise, by other operators for many rows; a fault: with more rows than one, the last bits are others."""

    def __init__(self, faulty: bool) -> None:
        super().__init__()
        self.faulty = faulty

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unwritten = torch.empty_like(x)
        left, right = x.chunk(2, dim=-1)  # views of the same bits
        torch.add(torch.cat((right, left), dim=-1) if len(x) == 1 else x.roll(4, 1), x, out=unwritten)
        return unwritten * (1 + 2**-22 if self.faulty and len(x) > 1 else 1)


class Model(torch.nn.Module):
    """As vLLM calls one."""

    def __init__(self, faulty: int | None) -> None:
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.arange(400.0).sin().view(50, 8))
        self.layers = torch.nn.ModuleList(Layer(at == faulty) for at in range(3))
        self.cache = torch.zeros(3, 8)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids) + positions[:, None]
        for layer in self.layers:
            x = layer(x)
        return x

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (hidden_states[:, None, :] * self.table.weight).sum(-1)


def passes(model: Model, recorder: Recorder, ids: list[int], positions: list[int]) -> list[Pass]:
    hidden = model(torch.tensor(ids), torch.tensor(positions))
    model.compute_logits(hidden)
    return recorder.taken()


def recorded(faulty: int | None) -> tuple[list[Pass], list[Pass]]:
    """Two tokens after each other, alone and then in other company."""
    model, recorder = Model(faulty), Recorder()
    recorder.watch(model)
    alone = passes(model, recorder, [7], [0]) + passes(model, recorder, [8], [1])
    return alone, passes(model, recorder, [3, 7, 4], [5, 0, 0]) + passes(model, recorder, [5, 9, 8], [1, 4, 1])


@pytest.mark.parametrize("faulty", [0, 1, 2])
def test_the_first_operator_is_named(faulty: int) -> None:
    culprit, compared = first_difference(*recorded(faulty))
    assert culprit is not None
    assert culprit.alone.layer == f"layers.{faulty}"
    assert culprit.alone.operator == culprit.other.operator == "aten.mul.Tensor"
    assert culprit.rows == (1, 3)
    assert culprit.key == (7, 0)
    assert compared > faulty
    assert f"layers.{faulty}: aten.mul.Tensor" in str(culprit)


def test_nothing_is_named_where_nothing_differs() -> None:
    culprit, compared = first_difference(*recorded(None))
    assert culprit is None
    assert compared > 20


@pytest.mark.parametrize("words", [[], ["--"], ["--", "--deterministic"]])
def test_a_model_must_be_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bisect", *words]) == 2
    assert "name a model after --" in capsys.readouterr().err


def test_a_digest_sees_every_bit_and_every_place() -> None:
    recorder = Recorder()
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    first, swapped, same = recorder._digests(x)
    assert first == same != swapped
    x[2, 1] = torch.nextafter(x[2, 1], torch.tensor(9.0, dtype=torch.bfloat16))
    assert recorder._digests(x)[2] != first
