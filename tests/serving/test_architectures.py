"""Further architectures of the allow-list, proved over HTTP with small models of random weights made here.

Their layers have the shapes at which the library leaves the tree (K = 1536), so the control can fail.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vllm_deterministic import policy
from vllm_deterministic.verify.server import serve

pytestmark = [pytest.mark.serving, pytest.mark.slow]

# What each brings that Llama has not: biases of q, k and v; a norm of each head's queries and keys.
FAMILIES = {"Qwen2ForCausalLM": "Qwen2", "Qwen3ForCausalLM": "Qwen3"}


@dataclasses.dataclass(frozen=True)
class Made:
    """A model folder, and how it is served. 64 tokens a step: prefills are cut where the neighbours leave room."""

    name: str
    folder: Path
    dtype: str

    def options(self, *more: str) -> tuple[str, ...]:
        sizes = ("--max-model-len", "2048", "--max-num-batched-tokens", "64", "--max-num-seqs", "64")
        return (str(self.folder), "--dtype", self.dtype, *sizes, *more)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def made(request, dtype, model, tmp_path_factory) -> Made:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{FAMILIES[request.param]}Config")(
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
        # transformers makes them zeros and ones, which would hide that they were left out
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(weight, mean=1.0, std=0.2)
    path = tmp_path_factory.mktemp(request.param)
    built.to(getattr(torch, dtype)).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(model("bfloat16")).save_pretrained(path)
    return Made(f"{request.param}-{dtype}", path, dtype)


ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}


def test_the_list_is_the_proof():
    """Llama is proved by the other files of this folder."""
    assert policy.ARCHITECTURES["cpu"] == {"LlamaForCausalLM", *FAMILIES}


def test_served(made, servers, axes, probes, said):
    servers.stop()
    eager = ("--enforce-eager",) if made.dtype == "float32" else ()
    with serve(*made.options("--deterministic", *eager), env=ENV) as server:
        for kind, probe in probes.items():
            # Alone, among neighbours, streamed, cold and cached: one answer. Its tokens, read, have their logprobs.
            answers = [
                one for axis in ("batch", "prefix", "delivery") for one in getattr(axes, axis)(server.endpoint, probe)
            ]
            assert said(made.name, "batch, prefix, stream", kind, answers).identical
            read = axes.scored(server.endpoint, probe)
            assert said(made.name, "decode against prompt", kind, read).identical


def test_control(made, servers, axes, probes, said):
    servers.stop()
    with serve(*made.options("--enforce-eager"), env=ENV) as server:
        answers = axes.batch(server.endpoint, probes["greedy"])
        assert not said(f"plain {made.name}", "batch", "greedy", answers).identical
