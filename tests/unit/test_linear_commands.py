"""`certify` and `tune` without a card, and the shapes of a model's layers as vLLM merges them."""

from __future__ import annotations

import types

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.cli import main  # noqa: E402
from vllm_deterministic.errors import UnsupportedError  # noqa: E402
from vllm_deterministic.linear_commands import model_problems  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a card")
@pytest.mark.parametrize("command", ["certify", "tune"])
def test_without_a_card_it_says_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--shape", "64x64"]) == 2
    assert "needs a CUDA card" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--shape", "64"], "write N x K as in 4096x12288"), (["--shape", "0x64"], "write N x K"), ([], "name a --model")],
)
def test_mistakes_are_explained(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["certify", *arguments]) == 2
    assert said in capsys.readouterr().err


QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "attention_bias": False,
}  # fmt: skip


def shapes(**config: object) -> list[tuple[int, int, bool]]:
    return [(p.n, p.k, p.bias) for p in model_problems(types.SimpleNamespace(**config), torch.bfloat16)]


def test_layers_of_a_model() -> None:
    assert shapes(**QWEN3_8B) == [
        (6144, 4096, False),
        (4096, 4096, False),
        (24576, 4096, False),
        (4096, 12288, False),
        (151936, 4096, False),
    ]


def test_biased_attention_odd_vocabulary_and_derived_head_size() -> None:
    found = shapes(**{**QWEN3_8B, "model_type": "qwen2", "head_dim": None, "vocab_size": 1001})
    assert found[0] == (6144, 4096, True)
    assert found[1] == (4096, 4096, False)
    assert found[-1] == (1024, 4096, False)


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no dense Llama-like model"):
        shapes(model_type="mamba", hidden_size=4096)
