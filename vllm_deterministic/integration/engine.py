"""From vLLM's configuration to the policy's plain facts, and from the policy's verdict back into the configuration."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_deterministic import compat, policy
from vllm_deterministic.contract import Settings

__all__ = ["arm_front_end", "prepare", "resolved_facts", "stated_options"]

WORKERS = {
    "cpu": "vllm_deterministic.integration.cpu_worker.DeterministicCPUWorker",
    "cuda": "vllm_deterministic.integration.gpu_worker.DeterministicGPUWorker",
}
SCHEDULER = "vllm_deterministic.integration.scheduler.DeterministicScheduler"
SEAMS = {"cpu": compat.CPU_SEAMS, "cuda": compat.GPU_SEAMS}


logger = logging.getLogger("vllm.deterministic")

# Options that `prepare` sets.
_OURS: dict[str, set[Any]] = {"worker_cls": set(WORKERS.values()), "attention_backend": {AttentionBackendEnum.CUSTOM}}

# vLLM's own CUDA graphs end at 512 tokens. A step of more is launched kernel by kernel, and up to some 2000 tokens the
# card waits for the host; our operators can be captured at any size.
_GRAPH_TOKENS = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16), *range(640, 2049, 128))


def stated_options(engine_args: Any) -> dict[str, Any]:
    """The engine options whose value is not vLLM's default, normalised as vLLM normalises them."""
    stated = _stated(engine_args, type(engine_args)(model=engine_args.model))
    compilation = stated.pop("compilation_config", None)
    if compilation is not None:
        inside = _stated(compilation, type(compilation)())
        stated |= {f"compilation_config.{name}": value for name, value in inside.items()}
    return stated


def _stated(options: Any, default: Any) -> dict[str, Any]:
    stated = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value in _OURS.get(field.name, ()):
            continue  # from an earlier pass over the same arguments
        # The command line hands over None where nothing was said, whatever the field's own default is.
        if value is not None and value != getattr(default, field.name):
            stated[field.name] = str(value).removeprefix("torch.") if field.name == "dtype" else value
    return stated


def prepare(engine_args: Any) -> None:
    """Checks device, vLLM version and environment, and names our worker and attention backend.

    They are named, not patched: where this package is missing in a worker process, the name does not resolve and the
    engine does not start. Raises SeamError or UnsupportedError.
    """
    from vllm.platforms import current_platform

    device = current_platform.device_type
    if device not in policy.ARCHITECTURES:
        policy.refuse(policy.resolved_refusals({"device": device}))
    compat.require_version(device)
    policy.refuse(policy.environment_refusals(device, os.environ))
    for seam in (*SEAMS[device].values(), *compat.REQUEST_SEAMS.values(), *compat.WIRE_SEAMS.values()):
        compat.probe(seam)
    engine_args.worker_cls = WORKERS[device]
    if device in policy.PREVIEWS:
        logger.warning("--deterministic on %s is a preview: %s", device, policy.PREVIEWS[device])
    if device == "cuda":
        from vllm_deterministic.integration import attention

        attention.arm()
        engine_args.attention_backend = AttentionBackendEnum.CUSTOM
        engine_args.block_size = attention.PAGE
        if engine_args.distributed_executor_backend is None:
            engine_args.distributed_executor_backend = "uni"  # of data parallel ranks too: each has a card of its own
        _capture_more(engine_args)


def _capture_more(engine_args: Any) -> None:
    """CUDA graphs of larger steps, where the user left the sizes to vLLM."""
    inside = engine_args.compilation_config
    asked = (
        engine_args.enforce_eager, engine_args.cudagraph_capture_sizes, engine_args.max_cudagraph_capture_size,
        inside.cudagraph_mode, inside.cudagraph_capture_sizes, inside.max_cudagraph_capture_size,
    )  # fmt: skip
    if not any(asked):
        engine_args.cudagraph_capture_sizes = list(_GRAPH_TOKENS)


def resolved_facts(config: Any) -> dict[str, Any]:
    """The policy's facts of a VllmConfig."""
    model = config.model_config
    return {
        **_card_facts(config),
        "device": config.device_config.device_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "architecture": model.architecture,
        "runner": model.runner_type,
        "quantization": model.quantization,
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "is_moe": model.is_moe,
        "is_multimodal": model.is_multimodal_model,
        "weight_transfer": getattr(config.weight_transfer_config, "backend", None),
        "compiled": config.compilation_config.mode.name != "NONE",
        "api_servers": config.parallel_config._api_process_count,
    }


def _card_facts(config: Any) -> dict[str, Any]:
    if config.device_config.device_type != "cuda":
        return {}
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    assert capability is not None
    executor = str(config.parallel_config.distributed_executor_backend)
    return {"capability": (capability.major, capability.minor), "executor": executor}


def name_scheduler(config: Any) -> None:
    """On CPU the engine gets our scheduler. On a card vLLM's own, which prepares a step while the last one runs."""
    if config.device_config.device_type == "cpu":
        config.scheduler_config.scheduler_cls = SCHEDULER


def arm_front_end(config: Any, settings: Settings) -> None:
    """Arms the checks, seeds and receipts of requests in this process. Idempotent."""
    from vllm_deterministic.integration import hidden_inputs, requests, tool_calls, weight_update, wire

    wire.arm()
    weight_update.arm()
    hidden_inputs.arm(settings.date)
    tool_calls.arm()
    requests.arm(settings, server_seed=config.model_config.seed or 0)
