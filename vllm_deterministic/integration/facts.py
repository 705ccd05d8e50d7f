"""What a server's fingerprint is made of: read off the resolved configuration, the tokenizer and the worker."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_deterministic import compat
from vllm_deterministic.configs import numerics as trees_of
from vllm_deterministic.contract import Settings
from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.integration import weights
from vllm_deterministic.serving.fingerprint import Fingerprint, Numerics, digest_of, engine_parts

__all__ = [
    "architecture", "cpu_architecture", "fingerprint", "gpu_architecture", "libraries", "model_code",
    "tokenizer_digest", "worker_report",
]  # fmt: skip

# What chooses a CPU kernel: instructions, and the cache size, by which vLLM's attention cuts its key blocks.
_INSTRUCTIONS = ("avx", "amx", "fma", "f16c")
_ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE")
# Options of the HTTP server that change an answer. Absent in offline use.
_FRONT_END = (
    "chat_template_content_format default_chat_template_kwargs response_role tool_call_parser enable_auto_tool_choice "
    "exclude_tools_when_tool_choice_none tool_strict_level return_tokens_as_token_ids".split()
)
# A configuration file's own story, not the model.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "architectures")


def architecture(device: torch.device) -> dict[str, Any]:
    """What of this machine the bits depend on."""
    return cpu_architecture() if device.type == "cpu" else gpu_architecture(device)


def cpu_architecture() -> dict[str, Any]:
    """Instruction set of this CPU as the libraries may use it."""
    have = torch.cpu.get_capabilities()
    return {
        "machine": have["architecture"],
        "instructions": sorted(name for name, on in have.items() if on is True and name.startswith(_INSTRUCTIONS)),
        "torch": torch.backends.cpu.get_cpu_capability(),
        "l2_cache_bytes": have["l2_cache_size"],
        **{name.lower(): os.environ[name] for name in _ISA_VARIABLES if name in os.environ},
    }


def gpu_architecture(device: torch.device) -> dict[str, Any]:
    """Family of this card: kernels are compiled for it, and what they sum in one instruction is its own."""
    major, minor = torch.cuda.get_device_capability(device)
    return {"machine": "cuda", "capability": f"{major}.{minor}"}


def model_code(model: type[Any]) -> dict[str, str]:
    """Name of a model's class and sha256 of the file that defines it, remote code included."""
    source = Path(inspect.getfile(model)).read_bytes()
    return {"class": model.__name__, "source": hashlib.sha256(source).hexdigest()}


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of everything by which text becomes token ids. Raises UnsupportedError for one that cannot say."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"--deterministic: the tokenizer {type(tokenizer).__name__} is no fast tokenizer, so the fingerprint "
            "cannot name it: convert it (tokenizer.json)"
        )
    definition = json.loads(backend.to_str())
    for of_one_call in ("truncation", "padding"):
        definition.pop(of_one_call, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    flags = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")}
    return digest_of([definition, special, flags])


def libraries(device: str) -> dict[str, str]:
    """The versions of what computes on "cpu" or "cuda"."""
    found = {"vllm": compat.vllm_version(), "torch": str(torch.__version__)}
    if device != "cpu":
        import triton

        found["triton"] = triton.__version__
    return found


def worker_report(
    config: Any,
    model: torch.nn.Module,
    device: torch.device,
    certified: Sequence[Any],
    seconds: float,
    trees: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What only an engine's worker knows of the fingerprint and of GET /deterministic.

    parts: of the fingerprint that a server before this engine alone would have, those that an engine decides.
    seconds: what certification took. trees: digests of those that are this engine's own, besides the version's.
    """
    found = {
        "weights": weights.digest(config.load_config.load_format),
        "model_code": model_code(type(model)),
        "architecture": architecture(device),
        "trees": dict(trees or {}),
    }
    parts = engine_parts(fingerprint(config, None, None, found).parts)
    return {**found, "parts": parts, "certified": [*certified], "certification_seconds": seconds}


def fingerprint(config: Any, args: Any, tokenizer: Any, worker: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of a VllmConfig, the HTTP server's arguments and the worker's report."""
    from vllm.renderers.chat_utils import load_chat_template

    model = config.model_config
    device = config.device_config.device_type
    settings = Settings.of(config.additional_config) or Settings()
    template = load_chat_template(getattr(args, "chat_template", None)) or getattr(tokenizer, "chat_template", None)
    described = {name: value for name, value in model.hf_config.to_dict().items() if name not in _NOT_THE_MODEL}
    structured = config.structured_outputs_config
    compilation = config.compilation_config
    numerics = Numerics(
        version=settings.numerics,
        trees={**trees_of(settings.numerics)[device], **worker.get("trees", {})},
        architecture=worker["architecture"],
        dtype=str(model.dtype).removeprefix("torch."),
        model_code=worker["model_code"],
        compile_mode=compilation.mode.name.lower(),
        libraries=libraries(device),
    )
    return Fingerprint(
        numerics=numerics,
        weights=worker["weights"],
        tokenizer=tokenizer_digest(tokenizer),
        chat_template=digest_of(template),
        settings={
            "model_config": digest_of(json.loads(json.dumps(described, default=str))),
            "rope": getattr(model.hf_text_config, "rope_parameters", None),
            "max_model_len": model.max_model_len,
            "seed": model.seed,
            "unseeded": settings.unseeded,
            "date": settings.date,
            "generation_config": model.get_diff_sampling_param(),
            "logprobs_mode": str(model.logprobs_mode),
            "structured_outputs": {
                name: getattr(structured, name)
                for name in (
                    "backend", "disable_any_whitespace", "disable_additional_properties", "reasoning_parser",
                    "enable_in_reasoning",
                )
            },
            "front_end": {name: getattr(args, name, None) for name in _FRONT_END},
        },
    )  # fmt: skip
