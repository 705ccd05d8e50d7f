"""Small models with random weights: every family that the trainer has, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def _make(family: str, dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    """Two layers, grouped heads, a vocabulary that the server pads."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=500,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.2,  # logits that spread, gradients that are seen
        tie_word_embeddings=tied,
    )
    torch.manual_seed(20261125)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # made as ones and zeros, which would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def _save(model: Any, folder: Path) -> Any:
    """Writes a model that a server can load, with a tokenizer that has one word for each id; returns the tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w2", unk_token="w0")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small products are done before a second thread has woken up, on a busy machine long before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def save() -> Callable[[Any, Path], Any]:
    return _save


@pytest.fixture(scope="session")
def make() -> Callable[..., Any]:
    return _make


@pytest.fixture(params=["Llama", "Qwen2", "Qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def plain_logprobs() -> Callable[..., torch.Tensor]:
    """transformers' own: (model, token ids) -> [length - 1]."""

    def scoring(model: Any, ids: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        wide = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return wide.gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(1)

    return scoring


@pytest.fixture(scope="session")
def sequences() -> list[list[int]]:
    """Lengths around the pages (128) and the tiles (32), in no order."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 500, (n,), generator=generator).tolist() for n in (5, 131, 2, 33, 64, 200, 17, 128)]
