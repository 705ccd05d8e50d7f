"""The allow-list refuses what is not on it, by name and with a way out."""

from __future__ import annotations

import pytest

from vllm_deterministic import policy
from vllm_deterministic.errors import UnsupportedError

SERVED = {
    "device": "cpu",
    "dtype": "bfloat16",
    "architecture": "LlamaForCausalLM",
    "runner": "generate",
    "quantization": None,
    "kv_cache_dtype": "auto",
    "is_moe": False,
    "is_multimodal": False,
    "weight_transfer": None,
    "compiled": True,
    "api_servers": 1,
}


def test_what_is_proved_is_served() -> None:
    assert policy.resolved_refusals(SERVED) == []
    assert policy.engine_refusals({"model": "m", "max_num_seqs": 8, "dtype": "float32", "block_size": 128}) == []
    assert policy.engine_refusals({"compilation_config.cudagraph_mode": "NONE", "cudagraph_capture_sizes": [1]}) == []
    assert policy.environment_refusals("cpu", {"VLLM_BATCH_INVARIANT": "0", "PATH": "x"}) == []


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("speculative_config", {"method": "ngram"}, "speculative decoding"),
        ("enable_lora", True, "LoRA"),
        ("enable_sleep_mode", True, "--enable-sleep-mode"),
        ("quantization", "fp8", "quantised model"),
        ("kv_cache_dtype", "fp8_e5m2", "KV cache of this dtype .* fp8_e4m3"),
        ("kv_cache_dtype_skip_layers", ["0"], "several dtypes"),
        ("calculate_kv_scales", True, "the first requests set"),
        ("kv_transfer_config", {"kv_connector": "x"}, "KV connector"),
        ("tensor_parallel_size", 2, "tensor parallelism"),
        ("pipeline_parallel_size", 2, "pipeline parallelism"),
        ("decode_context_parallel_size", 2, "context parallelism"),
        ("data_parallel_backend", "ray", "data parallelism over Ray"),
        ("enable_expert_parallel", True, "expert parallelism"),
        ("enable_prompt_embeds", True, "embeddings"),
        ("logits_processors", ["x"], "logits processors"),
        ("runner", "pooling", "--runner"),
        ("block_size", 64, "128"),
        ("dtype", "float64", "bfloat16"),
        ("worker_cls", "my.Worker", "worker class"),
        ("compilation_config.pass_config", {"fuse_norm_quant": True}, "compilation configuration"),
        ("option_of_a_later_vllm", "on", "--option-of-a-later-vllm"),
    ],
)
def test_engine_options_off_the_list(option: str, value: object, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        policy.refuse(policy.engine_refusals({option: value}))


@pytest.mark.parametrize(
    ("device", "name"), [(device, name) for device, names in policy.ENVIRONMENT.items() for name in sorted(names)]
)
def test_environment(device: str, name: str) -> None:
    harmless, _ = policy.ENVIRONMENT[device][name]
    with pytest.raises(UnsupportedError, match=f"Unset {name}"):
        policy.refuse(policy.environment_refusals(device, {name: "0" if "1" in harmless else "1"}))


def test_previews_are_devices_that_are_served() -> None:
    assert set(policy.PREVIEWS) <= set(policy.ARCHITECTURES)


def test_a_card_of_another_family_and_another_executor() -> None:
    card = {**SERVED, "device": "cuda", "capability": (9, 0), "executor": "uni"}
    assert policy.resolved_refusals(card) == []
    assert policy.resolved_refusals({**card, "kv_cache_dtype": "fp8"}) == []
    (refusal,) = policy.resolved_refusals({**card, "kv_cache_dtype": "fp8_e5m2"})
    assert "--kv-cache-dtype fp8_e5m2" in str(refusal)
    (refusal,) = policy.resolved_refusals({**card, "capability": (8, 0)})
    assert "8.0" in str(refusal)
    assert "Hopper" in str(refusal)
    (refusal,) = policy.resolved_refusals({**card, "executor": "mp"})
    assert "--distributed-executor-backend mp" in str(refusal)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("device", "xpu"),
        ("dtype", "float16"),
        ("architecture", "MixtralForCausalLM"),
        ("architecture", "GptOssForCausalLM"),  # its prompts name the day, past every chat template
        ("runner", "pooling"),
        ("quantization", "awq"),
        ("kv_cache_dtype", "fp8"),  # on CPU
        ("is_moe", True),
        ("is_multimodal", True),
    ],
)
def test_resolved_facts_off_the_list(fact: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=str(value)):
        policy.refuse(policy.resolved_refusals({**SERVED, fact: value}))


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"weight_transfer": "nccl"}, "nccl"),
        ({"compiled": True}, "--enforce-eager"),
        ({"api_servers": 2}, "--api-server-count"),
    ],
)
def test_weight_updates(facts: dict[str, object], named: str) -> None:
    proved = {**SERVED, "weight_transfer": policy.WEIGHT_TRANSFER, "compiled": False}
    assert policy.resolved_refusals(proved) == []
    with pytest.raises(UnsupportedError, match=named):
        policy.refuse(policy.resolved_refusals({**proved, **facts}))


def test_request_fields() -> None:
    assert policy.request_refusal(["temperature", "seed", "messages"]) is None
    assert policy.request_refusal(["temperature", "use_beam_search"]) == "use_beam_search"
    assert policy.request_refusal(["messages", "use_beam_search"]) == "use_beam_search"
    assert policy.request_refusal(["field_of_a_later_vllm"]) == "field_of_a_later_vllm"


@pytest.mark.parametrize(
    ("kinds", "choices", "field"),
    [([], 4, None), (["function", "function"], 1, None), (["function"], 2, "n"), (["function", "mcp"], 1, "tools")],
)
def test_tools(kinds: list[str], choices: int, field: str | None) -> None:
    refused = policy.tools_refusal(kinds, choices)
    assert (refused and refused[0]) == field
