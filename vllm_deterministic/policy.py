"""What is served deterministically: one allow-list. Pure: plain values in, refusals out.

An option, architecture, dtype, device or request field that is not on it is refused, so an option that a later vLLM
adds is refused too until somebody has proved it harmless. A value equal to vLLM's own default is not an option taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_deterministic.errors import UnsupportedError

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "ENGINE_OPTIONS",
    "ENVIRONMENT",
    "KV_CACHES",
    "PREVIEWS",
    "REQUEST_FIELDS",
    "SAMPLING_FIELDS",
    "TOOL_CALL_PARSERS",
    "WEIGHT_TRANSFER",
    "Refusal",
    "engine_refusals",
    "environment_refusals",
    "flag",
    "front_end_refusals",
    "refuse",
    "refused_features",
    "request_refusal",
    "resolved_refusals",
    "tools_refusal",
]


@dataclass(frozen=True)
class Refusal:
    """One thing that is asked for and not promised. `option` is named as the user wrote it."""

    option: str
    reason: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.option}: {self.reason}. {self.way_out}."


# --- what the engine may be -------------------------------------------------------------------------------------
ARCHITECTURES = {
    "cpu": frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}),
    "cuda": frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}),
}
DTYPES = {"cpu": frozenset({"bfloat16", "float32"}), "cuda": frozenset({"bfloat16", "float16"})}
# fp8 is e4m3, with scales that are known before the first request.
KV_CACHES = {"cpu": ("auto",), "cuda": ("auto", "fp8", "fp8_e4m3")}
# Device -> what is still to be proved where it is served already. Said at every start and in GET /deterministic.
PREVIEWS = {
    "cuda": "whole engines are proved on an H200 with vLLM 0.33, in part with 0.32 (docs/reports/engine-gpu.txt); "
    "servers over HTTP and other Hopper cards are proved in parts only"
}
# Compute capability -> the name of the family whose kernels are proved to be on the trees.
CARDS = {(9, 0): "Hopper"}

# Option -> the values it may take; ANY where every value gives the same bits, or is part of the fingerprint.
ANY: Collection[Any] | None = None
ENGINE_OPTIONS: dict[str, Collection[Any] | None] = {
    # the weights and the request's meaning
    **dict.fromkeys(
        "model served_model_name tokenizer tokenizer_mode tokenizer_revision trust_remote_code revision code_revision "
        "hf_token hf_config_path config_format max_model_len seed generation_config override_generation_config "
        "reasoning_parser reasoning_parser_plugin structured_outputs_config skip_tokenizer_init".split(),
        ANY,
    ),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "load_format": ("auto", "safetensors", "hf", "pt", "dummy"),
    "kv_cache_dtype": KV_CACHES["cuda"],  # by device: see resolved_refusals
    "logprobs_mode": ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"),
    "additional_config": ANY,
    # how the weights are read
    **dict.fromkeys(
        "download_dir safetensors_load_strategy safetensors_prefetch_num_threads safetensors_prefetch_block_size "
        "max_parallel_loading_workers use_tqdm_on_load ignore_patterns".split(),
        ANY,
    ),
    # who is served when, and where the cache lies: schedules, which the trees do not see
    **dict.fromkeys(
        "max_num_batched_tokens max_num_scheduled_tokens long_prefill_token_threshold "
        "long_prefill_token_threshold_adaptive max_num_seqs max_num_active_seqs max_num_queued_reqs "
        "max_num_queued_tokens gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override "
        "enable_prefix_caching prefix_caching_hash_algo enable_chunked_prefill scheduler_reserve_full_isl "
        "prefill_schedule_interval scheduling_policy stream_interval max_logprobs shutdown_timeout "
        "renderer_num_workers _api_process_count _api_process_rank".split(),
        ANY,
    ),
    "async_scheduling": (None, False, True),
    "block_size": (None, 128),  # the fixed KV-cache page
    "distributed_executor_backend": (None, "mp", "uni"),
    # ranks of a dense model are engines of their own, which must agree: see integration/wire.py
    **dict.fromkeys(
        "data_parallel_size data_parallel_size_local data_parallel_rank data_parallel_start_rank data_parallel_address "
        "data_parallel_rpc_port data_parallel_hybrid_lb".split(),
        ANY,
    ),
    "data_parallel_backend": ("mp",),
    "worker_cls": ("auto",),
    "weight_transfer_config": ANY,  # its backend: see resolved_refusals
    # compiled and eager round at other places: the mode is part of the numerics id
    "enforce_eager": ANY,
    # which steps are captured as CUDA graphs
    **dict.fromkeys(
        "cudagraph_capture_sizes max_cudagraph_capture_size compilation_config.cudagraph_mode "
        "compilation_config.cudagraph_capture_sizes compilation_config.max_cudagraph_capture_size".split(),
        ANY,
    ),
    # watching
    **dict.fromkeys(
        "disable_log_stats aggregate_engine_logging enable_log_requests show_hidden_metrics_for_version "
        "otlp_traces_endpoint collect_detailed_traces kv_cache_metrics kv_cache_metrics_sample cudagraph_metrics "
        "custom_histogram_buckets enable_mfu_metrics enable_logging_iteration_details logging_config log_level "
        "log_config_file fail_on_environ_validation profiler_config".split(),
        ANY,
    ),
}

# The backend of vLLM's weight-update API that is proved: --weight-transfer-config '{"backend": "safetensors"}'.
WEIGHT_TRANSFER = "safetensors"

# How a tool call is found in an answer's text (--tool-call-parser).
TOOL_CALL_PARSERS = ("hermes",)

_OFF = frozenset({"", "0"})
_ON = frozenset({"", "1"})
_EVERYWHERE = {
    "VLLM_BATCH_INVARIANT": (_OFF, "vLLM's own mode replaces the operators that this plugin brings"),
    "VLLM_USE_RUST_FRONTEND": (_OFF, "the Rust front end bypasses the checks of requests"),
}
# Device -> environment variable -> the values under which it may be set.
ENVIRONMENT: dict[str, dict[str, tuple[frozenset[str], str]]] = {
    "cpu": {
        **_EVERYWHERE,
        "VLLM_USE_V2_MODEL_RUNNER": (_OFF, "the V2 runner is not proved on CPU"),
        "VLLM_CPU_ATTN_SPLIT_KV": (_OFF, "where the KV cache is split depends on the neighbours"),
    },
    "cuda": {
        **_EVERYWHERE,
        "VLLM_USE_V2_MODEL_RUNNER": (_ON, "the V1 runner is not proved on CUDA"),
        "VLLM_USE_FLASHINFER_SAMPLER": (_OFF, "it samples by the neighbours' parameters"),
    },
}

_KNOWN_FEATURES = {
    "speculative_config": "speculative decoding",
    "spec_method": "speculative decoding",
    "spec_model": "speculative decoding",
    "enable_lora": "LoRA",
    "quantization": "a quantised model",
    "kv_cache_dtype": "a KV cache of this dtype",
    "kv_cache_dtype_skip_layers": "a KV cache of several dtypes",
    "calculate_kv_scales": "a KV cache whose scales the first requests set",
    "kv_transfer_config": "a KV connector",
    "kv_offloading_size": "KV offloading",
    "pipeline_parallel_size": "pipeline parallelism",
    "tensor_parallel_size": "tensor parallelism",
    "data_parallel_backend": "data parallelism over Ray",
    "enable_expert_parallel": "expert parallelism",
    "prefill_context_parallel_size": "context parallelism",
    "decode_context_parallel_size": "context parallelism",
    "enable_prompt_embeds": "prompts given as embeddings",
    "logits_processors": "custom logits processors",
    "attention_backend": "another attention backend",
    "compilation_config": "another compilation configuration",
    "worker_cls": "another worker class",
}

# --- what a request may ask for ---------------------------------------------------------------------------------
REQUEST_FIELDS = frozenset(
    # the prompt
    "model messages prompt input instructions echo suffix add_generation_prompt continue_final_message "
    "add_special_tokens chat_template chat_template_kwargs documents truncate_prompt_tokens truncation_side "
    "truncation previous_input_messages "
    # the answer's length, form and stops
    "max_tokens max_completion_tokens max_output_tokens min_tokens stop stop_token_ids include_stop_str_in_output "
    "ignore_eos n stream stream_options skip_special_tokens spaces_between_special_tokens text "
    "return_tokens_as_token_ids return_token_ids return_token_offsets return_prompt_text enable_response_messages "
    "stream_interval include_reasoning reasoning reasoning_effort "
    # sampling, row by row
    "temperature top_p top_k min_p seed repetition_penalty presence_penalty frequency_penalty logit_bias bad_words "
    "allowed_token_ids response_format structured_outputs "
    # see tools_refusal
    "tools tool_choice parallel_tool_calls "
    # scores
    "logprobs top_logprobs prompt_logprobs logprob_token_ids "
    # bookkeeping
    "user request_id session_id priority cache_salt metadata store service_tier prompt_cache_key background "
    "previous_response_id safety_identifier".split()
)

# What a request becomes in the engine, and what `LLM.generate` is given: fields of vLLM's SamplingParams.
SAMPLING_FIELDS = REQUEST_FIELDS | frozenset(
    # how the answer is handed over, and what vLLM sets itself
    "detokenize flat_logprobs output_kind output_text_buffer_length skip_clone skip_reading_prefix_cache".split()
)


def refuse(refusals: Iterable[Refusal]) -> None:
    """Raises UnsupportedError that lists every refusal; returns where there is none."""
    if listed := list(refusals):
        lines = "".join(f"\n  - {refusal}" for refusal in listed)
        raise UnsupportedError(f"--deterministic cannot promise the same bits with this configuration:{lines}")


def refused_features() -> list[str]:
    """The well-known features that are refused because nobody has proved them yet."""
    return sorted({feature for option, feature in _KNOWN_FEATURES.items() if option not in ENGINE_OPTIONS})


def flag(option: str) -> str:
    """The option as it is written on the command line, where a dot leads inside of another option."""
    name, dot, inside = option.strip("_").partition(".")
    return "--" + name.replace("_", "-") + dot + inside


def engine_refusals(stated: Mapping[str, Any]) -> list[Refusal]:
    """Refusals of engine options. `stated` holds only the options whose value is not vLLM's default; those inside of
    --compilation-config under dotted names."""
    found = []
    for option, value in stated.items():
        if option not in ENGINE_OPTIONS:
            what = _KNOWN_FEATURES.get(option.partition(".")[0], "this option")
            found.append(Refusal(f"{flag(option)} {value!r}", f"{what} is not proved deterministic", "Leave it out"))
        elif (allowed := ENGINE_OPTIONS[option]) is not None and value not in allowed:
            names = ", ".join(str(name) for name in allowed if name is not None)
            what = _KNOWN_FEATURES.get(option, "this value")
            found.append(
                Refusal(f"{flag(option)} {value!r}", f"{what} is not proved deterministic", f"Proved: {names}")
            )
    return found


def front_end_refusals(stated: Mapping[str, Any]) -> list[Refusal]:
    """Refusals of options of the HTTP server. `stated`: option -> value, None where it is not given."""
    found = []
    if (parser := stated.get("tool_call_parser")) and parser not in TOOL_CALL_PARSERS:
        proved = f"Proved: {', '.join(TOOL_CALL_PARSERS)}"
        found.append(Refusal(f"--tool-call-parser {parser}", "this parser is not proved", proved))
    if plugin := stated.get("tool_parser_plugin"):
        found.append(Refusal(f"--tool-parser-plugin {plugin}", "nobody has proved it", "Leave it out"))
    return found


def environment_refusals(device: str, environ: Mapping[str, str]) -> list[Refusal]:
    """Refusals of environment variables, on a device that is proved."""
    return [
        Refusal(f"{name}={environ[name]}", reason, f"Unset {name}")
        for name, (harmless, reason) in ENVIRONMENT[device].items()
        if environ.get(name, "") not in harmless
    ]


def resolved_refusals(facts: Mapping[str, Any]) -> list[Refusal]:
    """Refusals of what vLLM made of the options.

    `facts`: device, dtype, architecture, runner ("generate" or "pooling"), quantization, kv_cache_dtype, is_moe,
    is_multimodal, weight_transfer (a backend, or None), compiled, api_servers; on CUDA also capability and executor.
    """
    device = facts["device"]
    if device not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return [Refusal(f"device {device}", "this device is not proved yet", f"Proved: {known}")]
    found = []
    if facts["runner"] != "generate":
        found.append(
            Refusal(
                f"runner {facts['runner']}",
                "embedding, scoring and classifying are not proved",
                "Serve a model that generates",
            )
        )
    if facts["architecture"] not in ARCHITECTURES[device]:
        known = ", ".join(sorted(ARCHITECTURES[device]))
        found.append(Refusal(f"model architecture {facts['architecture']}", "it is not proved", f"Proved: {known}"))
    if facts["dtype"] not in DTYPES[device]:
        known = ", ".join(sorted(DTYPES[device]))
        found.append(Refusal(f"--dtype {facts['dtype']}", f"it is not proved on {device}", f"Proved: {known}"))
    if (cache := facts["kv_cache_dtype"]) not in KV_CACHES[device]:
        proved = ", ".join(KV_CACHES[device])
        found.append(Refusal(f"--kv-cache-dtype {cache}", f"it is not proved on {device}", f"Proved: {proved}"))
    if device == "cuda":
        found += _card_refusals(facts)
    if facts["weight_transfer"] is not None:
        found += _update_refusals(facts)
    for fact, what in (
        ("quantization", "a quantised model"),
        ("is_moe", "a mixture-of-experts model"),
        ("is_multimodal", "multimodal input"),
    ):
        if facts[fact]:
            found.append(
                Refusal(f"{fact} {facts[fact]}", f"{what} is not proved", "Serve a dense text model in bf16 or f32")
            )
    return found


def _update_refusals(facts: Mapping[str, Any]) -> list[Refusal]:
    option = "--weight-transfer-config"
    found = []
    if (backend := facts["weight_transfer"]) != WEIGHT_TRANSFER:
        proved = f'Proved: {{"backend": "{WEIGHT_TRANSFER}"}}'
        found.append(Refusal(f"{option} {backend!r}", "this backend is not proved", proved))
    if facts["compiled"]:
        found.append(Refusal(option, "a compiled graph holds the packed weights", "Add --enforce-eager"))
    if facts["api_servers"] > 1:
        reason = "the other API servers would go on promising the old weights"
        found.append(Refusal(option, reason, "Add --api-server-count 1"))
    return found


def _card_refusals(facts: Mapping[str, Any]) -> list[Refusal]:
    found = []
    if tuple(facts["capability"]) not in CARDS:
        known = ", ".join(f"{name} ({major}.{minor})" for (major, minor), name in CARDS.items())
        what = f"a card of compute capability {facts['capability'][0]}.{facts['capability'][1]}"
        found.append(Refusal(what, "its kernels are not proved to be on the trees", f"Proved: {known}"))
    if facts["executor"] != "uni":
        option = f"--distributed-executor-backend {facts['executor']}"
        found.append(Refusal(option, "it is not proved on CUDA", "Leave it out: one card is served by one process"))
    return found


def request_refusal(fields: Iterable[str]) -> str | None:
    """The first request field that is not promised; None where all are. `fields`: those not left at their default."""
    return next((field for field in sorted(fields) if field not in REQUEST_FIELDS), None)


def tools_refusal(kinds: Collection[str], choices: int) -> tuple[str, str] | None:
    """The field that is at fault and why, where a request's tools are not promised. `kinds`: the type of each tool."""
    if others := sorted({*kinds} - {"function"}):
        return "tools", f"tools of the type {others[0]!r} are not proved deterministic: ask with functions only"
    if kinds and choices > 1:
        return "n", "the choices' tool calls would share their ids: ask for each choice on its own, with its own seed"
    return None
