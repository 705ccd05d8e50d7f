"""`verify --level deep` until its million tokens, against a deterministic server of a model small enough for that.

SmolLM2 would take hours on two cores. The model here has two layers and random weights, so its answers are no language;
everything else, from the kernels to HTTP, is what it is for a real one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vllm_deterministic.verify import output, verify
from vllm_deterministic.verify.context import _SENTENCES
from vllm_deterministic.verify.server import serve

pytestmark = [pytest.mark.serving, pytest.mark.slow]

NAME = "two-layers-of-random-weights"
OPTIONS = ("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "128", "--enforce-eager")
OPTIONS += ("--served-model-name", NAME)
# Tokens to compare, and where the report goes: `DEEP_TOKENS=20000` tells in a minute how long a million takes.
TOKENS = int(os.environ.get("DEEP_TOKENS", 1_000_000))
REPORT = os.environ.get("DEEP_REPORT")
PARALLEL = 8  # rounds at once: one alone leaves the server waiting


def small_model(folder: Path) -> Path:
    """Two layers of random weights; a byte-pair tokenizer of 512 tokens made of the sentences that `verify` asks."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(_SENTENCES, vocab_size=512, special_tokens=["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, eos_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,  # logits that spread
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(20261125)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_million_tokens(tmp_path: Path) -> None:
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    model = small_model(tmp_path / NAME)
    with serve(model, *OPTIONS, "--deterministic", env=environment, log=tmp_path / "server.log") as server:
        report = verify(server.base_url, level="deep", tokens=TOKENS, parallel=PARALLEL, require=("all",))
    if REPORT:
        output.write(report, Path(REPORT))
    print(f"{report.tokens:,} tokens in {report.seconds:.0f} s, {report.requests} requests; {report.power}")
    assert report.verdict == "same", report.headline
    assert not report.partial
    assert report.tokens >= TOKENS
