"""The GPU worker of a deterministic engine: vLLM's own, with the operators replaced before the model is built."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from vllm.v1.worker.gpu_worker import Worker

from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.integration import (
    attention,
    audit,
    facts,
    gpu_linear,
    gpu_norm,
    gpu_sampler,
    weight_engine,
    weights,
)

__all__ = ["DeterministicGPUWorker"]


class DeterministicGPUWorker(Worker):
    """Arms the GPU seams in its own process. Where a seam, a certificate or the audit fails, it does not start."""

    def init_device(self) -> None:
        gpu_linear.arm()
        gpu_norm.arm()
        gpu_sampler.arm(self.vllm_config)
        attention.arm()
        audit.arm()
        weights.arm()
        weight_engine.arm()
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        config, model, device = self.vllm_config, self.model_runner.get_model(), self.model_runner.device
        scheduler, dtype = config.scheduler_config, config.model_config.dtype
        assert isinstance(dtype, torch.dtype)  # resolved by now
        start = time.perf_counter()
        gpu_linear.certify_model(model, scheduler.max_num_batched_tokens, scheduler.max_num_seqs, device)
        attention.certify_model(model, dtype, config.model_config.max_model_len, device)
        self._certification_seconds = time.perf_counter() - start

    def determine_available_memory(self) -> int:
        # The first run of the model. A compiled one is audited as a graph, an eager one operator by operator.
        eager = self.vllm_config.model_config.enforce_eager
        with audit.NoBareProducts() if eager else nullcontext():
            return int(super().determine_available_memory())

    def compile_or_warm_up_model(self) -> Any:
        found = super().compile_or_warm_up_model()
        gpu_sampler.serve()
        return found

    def deterministic_report(self) -> dict[str, Any]:
        """See facts.worker_report."""
        model, device = self.model_runner.get_model(), self.model_runner.device
        certified = [*gpu_linear.certified(), *attention.certified()]
        seconds, trees = self._certification_seconds, attention.trees(model)
        return facts.worker_report(self.vllm_config, model, device, certified, seconds, trees)

    def sleep(self, level: int = 1) -> None:
        """Level 1 brings the promised weights back; the cache is empty then, and pages are cleared when they are handed
        out. Raises UnsupportedError for level 2, which forgets the weights."""
        if level > 1:
            raise UnsupportedError(
                f"--deterministic: sleep at level {level} forgets the weights that were promised: sleep at level 1. "
                "The scheduler waits now: wake it up (tags: scheduling)"
            )
        super().sleep(level)

    reload_weights = reset_weights = weight_engine.refused
