"""Our linear layers inside a real vLLM on a card: merged, biased and tied layers, and the audit with planted faults.

Attention is vLLM's default here. At contexts this short it gives a row the same bits in any company, so what differs
without our linear layers, and no longer with them, are the linear layers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm")

_COMMON = {
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    # Two layers of Qwen3-8B's size: merged qkv and gate_up, a head of its own.
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 32000, "tie_word_embeddings": False, "attention_bias": False,
    },
    # A bias on qkv, the head tied to the embedding.
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
ENGINES = {
    "default": ("qwen3", "default"),
    "ours": ("qwen3", "ours"),
    "ours, eager": ("qwen3", "ours", "eager"),
    "bias and tied": ("qwen2", "ours"),
    "planted": ("qwen2", "ours", "planted"),
    "planted, eager": ("qwen2", "ours", "planted", "eager"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every engine once, in processes of their own, side by side."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**_COMMON, **config}))

    def run(name: str) -> subprocess.CompletedProcess[str]:
        model, *rest = ENGINES[name]
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(folder / f"cache-{name.replace(' ', '-')}"),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(Path(__file__).with_name("engine_linear.py")), str(folder / model), *rest]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)

    with ThreadPoolExecutor(len(ENGINES)) as pool:
        return dict(zip(ENGINES, pool.map(run, ENGINES), strict=True))


def report(done: subprocess.CompletedProcess[str]) -> dict:
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert done.returncode == 0, done.stderr[-3000:]
    print(lines[0])
    return json.loads(lines[0].removeprefix("REPORT "))


@pytest.mark.parametrize("name", ["ours", "ours, eager", "bias and tied"])
def test_one_answer_in_any_company(runs: dict, name: str) -> None:
    found = report(runs[name])
    for kind in ("greedy", "seeded"):
        assert found[kind]["answers"] == 1, found
        assert found[kind]["distinct_tokens"] > 8  # not a text that could not have differed


def test_control_default_engine_differs(runs: dict) -> None:
    found = report(runs["default"])
    assert found["greedy"]["answers"] > 1
    assert found["seeded"]["answers"] > 1


def test_every_layer_is_ours(runs: dict) -> None:
    shapes = {
        "ours": ("6144x4096", "4096x4096", "24576x4096", "4096x12288", "32000x4096"),
        "bias and tied": ("1536x1024 with bias", "1024x1024", "6144x1024", "1024x3072", "32000x1024"),
    }
    for name, expected in shapes.items():
        assert {layer.replace(" bfloat16", "") for layer in report(runs[name])["layers"]} == set(expected)


@pytest.mark.parametrize("name", ["planted", "planted, eager"])
def test_a_bare_product_stops_the_server_and_is_named(runs: dict, name: str) -> None:
    done = runs[name]
    assert done.returncode != 0
    assert "multiplies matrices outside of its linear layers" in done.stderr + done.stdout
    assert "linear" in (done.stderr + done.stdout).split("outside of its linear layers", 1)[1][:600]
