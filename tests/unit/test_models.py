"""The default model: converted whole or not at all, and its weights in the right order."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_deterministic import models
from vllm_deterministic.errors import ConfigurationError

ENGLISH = (
    "The history of science is the study of the development of science, including both the natural and social "
    "sciences. Science is a body of empirical, theoretical, and practical knowledge about the natural world, produced "
    "by scientists who emphasize the observation, explanation, and prediction of real world phenomena."
)


def test_a_wrong_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="float8"):
        models.prepare_default_model(tmp_path / "m", "float8")


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigurationError, match="not empty"):
        models.prepare_default_model(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(gguf: Path, folder: Path, dtype: str) -> None:
        (folder / "half.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(models, "_convert", full_disk)
    with pytest.raises(ConfigurationError, match="No space left"):
        models.prepare_default_model(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_perplexity_of_the_converted_model() -> None:
    """About 11 on ordinary English; 30 to 40 where q and k rows are left in GGUF's order (the control)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = models.prepare_default_model(dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(ENGLISH, return_tensors="pt").input_ids

    def perplexity() -> float:
        with torch.no_grad():
            return float(model(ids, labels=ids).loss.exp())

    assert perplexity() < 14
    heads, size = model.config.num_attention_heads, model.config.head_dim
    for layer in model.model.layers:
        rows = layer.self_attn.q_proj.weight.data
        rows.copy_(rows.view(heads, 2, size // 2, -1).transpose(1, 2).reshape(rows.shape).clone())
    assert perplexity() > 20
