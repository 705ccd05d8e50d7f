"""Further architectures of the allow-list, proved over HTTP with small models of random weights made here.

Their layers have the shapes at which the library leaves the tree (K = 1536), so the control can fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_deterministic.verify.server import serve

pytestmark = [pytest.mark.serving, pytest.mark.slow]

# What each brings that Llama has not: biases of q, k and v; a norm of each head's queries and keys.
FAMILIES = {"Qwen2ForCausalLM": "Qwen2", "Qwen3ForCausalLM": "Qwen3"}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folder(request, model, tmp_path_factory) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    family = FAMILIES[request.param]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.08,
    )
    built = getattr(transformers, request.param)(config)
    for name, weight in built.named_parameters():
        if name.endswith("bias"):  # transformers makes them zero
            torch.nn.init.normal_(weight, std=0.5)
    path = tmp_path_factory.mktemp(request.param)
    built.to(torch.bfloat16).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(model("bfloat16")).save_pretrained(path)
    return path


OPTIONS = ("--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "64")
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}


def test_served(folder, servers, axes, probes, said):
    servers.stop()
    with serve(folder, *OPTIONS, "--deterministic", env=ENV) as server:
        for kind, probe in probes.items():
            for axis in ("batch", "prefix", "scored"):
                answers = getattr(axes, axis)(server.endpoint, probe)
                assert said(folder.name, axis, kind, answers).identical


def test_control(folder, servers, axes, probes, said):
    servers.stop()
    with serve(folder, *OPTIONS, "--enforce-eager", env=ENV) as server:
        for axis in ("batch", "scored"):
            answers = getattr(axes, axis)(server.endpoint, probes["greedy"])
            assert not said(f"plain {folder.name}", axis, "greedy", answers).identical
