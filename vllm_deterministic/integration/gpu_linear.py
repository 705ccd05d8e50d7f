"""Linear layers and lm_head of the GPU engine: vLLM's unquantised methods call our operator."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from vllm_deterministic import compat
from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.kernels.certificates import Certificate
from vllm_deterministic.kernels.gemm import dispatch
from vllm_deterministic.kernels.gemm.tree import Problem

__all__ = ["arm", "certified", "certify_model", "problems"]

logger = logging.getLogger("vllm.deterministic")
_certified: dict[Problem, Certificate] = {}


def arm() -> None:
    """Installs the seams in this worker process, before the model is built. Idempotent. Raises SeamError."""
    for seam in ("linear", "lm_head"):
        compat.install(compat.GPU_SEAMS[seam], _ours)


def _ours(apply: Callable[..., Any]) -> Callable[..., Any]:
    return _apply


def _apply(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # A function of this module: torch.compile reads its source, and hashes the file into its cache key.
    return torch.ops.vllm_deterministic.linear(x, layer.weight, bias)


def problems(model: torch.nn.Module) -> tuple[set[Problem], set[Problem]]:
    """The shapes of the model's linear layers, and of what gives its logits. Raises UnsupportedError for others."""
    layers: set[Problem] = set()
    heads: set[Problem] = set()
    tied: set[Problem] = set()
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        if not isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
            raise UnsupportedError(f"--deterministic: {name} uses {type(method).__name__}, which is not proved")
        weight = module.weight
        if weight.dim() != 2:
            raise UnsupportedError(f"--deterministic: the weight of {name} has shape {tuple(weight.shape)}, not N x K")
        bias = getattr(module, "bias", None) is not None and not getattr(module, "skip_bias_add", False)
        problem = Problem(weight.shape[0], weight.shape[1], weight.dtype, bias)
        if isinstance(method, UnquantizedLinearMethod):
            layers.add(problem)
        else:  # a model without a head of its own reads its logits off the embedding
            (heads if isinstance(module, ParallelLMHead) else tied).add(problem)
    return layers, heads or tied


def certify_model(model: torch.nn.Module, max_num_batched_tokens: int, max_num_seqs: int, device: torch.device) -> None:
    """Certifies every shape of the model on this card. Raises CertificationError: then the server does not start."""
    layers, heads = problems(model)
    rows = {**dict.fromkeys(heads, max_num_seqs), **dict.fromkeys(layers, max_num_batched_tokens)}
    start = time.perf_counter()
    for problem, most in track(rows.items(), description="certifying linear layers"):
        found = _certified[problem] = dispatch.prepare(problem, most, device)
        said = (problem, len(found.schedules), len(found.dropped))
        logger.info("linear layer %s: %d schedules certified, %d dropped", *said)
    torch.cuda.empty_cache()  # what certification used must not count against the KV cache
    logger.info("%d linear layer shapes certified in %.1f s", len(rows), time.perf_counter() - start)


def certified() -> list[dict[str, Any]]:
    """What this worker certified: shapes, schedules, and what was dropped."""
    return [
        {"operator": "linear", **problem.shape, "schedules": sorted(found.schedules), "dropped": dict(found.dropped)}
        for problem, found in _certified.items()
    ]
