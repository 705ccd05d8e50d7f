"""vLLM's real configuration step, each time in a process of its own: without the flag nothing changes, with it the
policy is applied, and a missing seam keeps the engine from starting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_deterministic.compat import CPU_SEAMS, REQUEST_SEAMS, WIRE_SEAMS

pytest.importorskip("vllm", reason="configures a real vLLM")

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}

OTHER_MODELS = {
    "experts": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "quantised": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
    "sounds": {"architectures": ["Qwen2AudioForConditionalGeneration"], "model_type": "qwen2_audio"},
    "embeddings": {"architectures": ["BertModel"], "model_type": "bert"},
    "classes": {"architectures": ["LlamaForSequenceClassification"]},
}

# Runs the configuration step for each case, and says what came of it and which operator or request seams are replaced.
PROGRAM = """
import inspect, json, os, sys
from vllm.engine.arg_utils import EngineArgs
from vllm_deterministic import compat
SEAMS = {**compat.CPU_SEAMS, **compat.REQUEST_SEAMS, **compat.WIRE_SEAMS}
def run(options, env, sabotage):
    folder = os.path.join(sys.argv[1], options.pop("model", ""))
    args = EngineArgs(model=folder, skip_tokenizer_init=True, **options)
    os.environ.update(env)
    owner, last = SEAMS[sabotage].holder() if sabotage else (None, None)
    whole = owner and inspect.getattr_static(owner, last)
    if owner:
        delattr(owner, last)
    try:
        config = args.create_engine_config()
        # A second API server gets the arguments as the first pass left them, with what vLLM itself changed in them.
        config = args.create_engine_config()
    except Exception as error:
        return {"error": type(error).__name__ + ": " + str(error)}
    finally:
        if owner:
            setattr(owner, last, whole)
        for name in env:
            del os.environ[name]
    config.instance_id = ""
    return {
        "config": repr(config), "hash": config.compute_hash(), "worker": config.parallel_config.worker_cls,
        "replaced": [name for name, seam in SEAMS.items() if hasattr(getattr(*seam.holder()), "_vllm_deterministic")],
        "environ": {name: value for name, value in os.environ.items() if "VLLM_" in name and "PLUGINS" not in name},
    }
print(json.dumps([run(*case) for case in json.load(sys.stdin)]))
"""


def configure(folder: Path, plugins: str, cases: list[tuple[dict, dict, str]]) -> list[dict]:  # type: ignore[type-arg]
    for name, changes in {"": {}, **OTHER_MODELS}.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({**MODEL, **changes}))
    environ = {**os.environ, "VLLM_PLUGINS": plugins, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        input=json.dumps(cases), capture_output=True, text=True, env=environ, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


ON = {"additional_config": {"vllm_deterministic": True}}
REFUSED: list[tuple[dict, dict, str]] = [  # type: ignore[type-arg]
    ({"tensor_parallel_size": 2}, {}, "tensor parallelism"),
    ({"pipeline_parallel_size": 2}, {}, "pipeline parallelism"),
    ({"decode_context_parallel_size": 2}, {}, "context parallelism"),
    ({"kv_transfer_config": {"kv_connector": "Any", "kv_role": "kv_both"}}, {}, "KV connector"),
    ({"enable_lora": True}, {}, "LoRA"),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, {}, "speculative decoding"),
    ({"quantization": "fp8"}, {}, "quantised model"),
    ({"kv_cache_dtype": "fp8"}, {}, "--kv-cache-dtype fp8: it is not proved on cpu"),
    ({"kv_cache_dtype": "fp8_e5m2"}, {}, "KV cache of this dtype"),
    ({"runner": "pooling"}, {}, "--runner"),
    ({"dtype": "float16"}, {}, "float16"),
    ({"block_size": 64}, {}, "--block-size"),
    ({"compilation_config": {"cudagraph_mode": "NONE", "mode": 0}}, {}, "--compilation-config.mode"),
    ({"hf_overrides": {"architectures": ["MixtralForCausalLM"]}}, {}, "--hf-overrides"),
    ({"model": "experts"}, {}, "a mixture-of-experts model"),
    ({"model": "quantised"}, {}, "quantization fp8"),
    ({"model": "sounds"}, {}, "multimodal input"),
    ({"model": "embeddings"}, {}, "architecture BertModel"),
    ({"model": "classes"}, {}, "runner pooling"),
    ({}, {"VLLM_BATCH_INVARIANT": "1"}, "Unset VLLM_BATCH_INVARIANT"),
    ({}, {"VLLM_CPU_ATTN_SPLIT_KV": "1"}, "Unset VLLM_CPU_ATTN_SPLIT_KV"),
    ({}, {"VLLM_USE_RUST_FRONTEND": "1"}, "Unset VLLM_USE_RUST_FRONTEND"),
]
SEAMS = {**CPU_SEAMS, **{name: WIRE_SEAMS[name] for name in ("parser", "parse", "parse_delta", "parser_prompt")}}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict:  # type: ignore[type-arg]
    """The configuration of a vLLM without the plugin. One folder name for both: it is part of the configuration."""
    return configure(tmp_path_factory.getbasetemp(), "", [({}, {}, "")])[0]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:  # type: ignore[type-arg]
    """Every case with the plugin, in one process; the armed one last, since arming is for good."""
    cases: dict[str, tuple[dict, dict, str]] = {"off": ({}, {}, "")}  # type: ignore[type-arg]
    cases |= {named: ({**ON, **options}, env, "") for options, env, named in REFUSED}
    cases |= {
        f"{state} without {seam}": (given, {}, seam) for seam in SEAMS for state, given in (("on", ON), ("off", {}))
    }
    cases["graphs"] = ({**ON, "compilation_config": {"cudagraph_mode": "NONE"}, "cudagraph_capture_sizes": [4]}, {}, "")
    cases["on"] = (ON, {}, "")
    return dict(zip(cases, configure(tmp_path_factory.getbasetemp(), "deterministic", [*cases.values()]), strict=True))


def test_without_the_flag_nothing_changes(ours: dict, stock: dict) -> None:  # type: ignore[type-arg]
    """The resolved configuration, its hash, the environment and every seam are what they are without the plugin."""
    assert ours["off"] == stock
    assert ours["off"]["replaced"] == []


def test_with_the_flag_the_policy_is_applied(ours: dict, stock: dict) -> None:  # type: ignore[type-arg]
    """The control of the test above, and the seams of the front end in place."""
    assert ours["on"]["hash"] != stock["hash"]
    assert ours["on"]["worker"].endswith("DeterministicCPUWorker")
    # The worker's own seams are replaced in its own process.
    assert {*REQUEST_SEAMS, "chat_template", "parser"} <= set(ours["on"]["replaced"])


def test_which_steps_are_captured_is_free(ours: dict) -> None:  # type: ignore[type-arg]
    assert "error" not in ours["graphs"]


@pytest.mark.parametrize("named", [named for _, _, named in REFUSED])
def test_refusals_name_the_option(ours: dict, named: str) -> None:  # type: ignore[type-arg]
    assert named in ours[named].get("error", "started")


@pytest.mark.parametrize("seam", SEAMS)
def test_a_missing_seam_is_named(ours: dict, seam: str) -> None:  # type: ignore[type-arg]
    error = ours[f"on without {seam}"].get("error", "started")
    assert error.startswith("SeamError")
    assert SEAMS[seam].attribute in error
    # The control: without the flag the same vLLM starts.
    assert "error" not in ours[f"off without {seam}"]
