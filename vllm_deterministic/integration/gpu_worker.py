"""The GPU worker of a deterministic engine: vLLM's own, with the operators replaced before the model is built."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_deterministic.integration import audit, gpu_linear, gpu_norm, gpu_sampler

__all__ = ["DeterministicGPUWorker"]


class DeterministicGPUWorker(Worker):
    """Arms the GPU seams in its own process. Where a seam, a certificate or the audit fails, it does not start."""

    def init_device(self) -> None:
        gpu_linear.arm()
        gpu_norm.arm()
        gpu_sampler.arm(self.vllm_config)
        audit.arm()
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        scheduler = self.vllm_config.scheduler_config
        gpu_linear.certify_model(
            self.model_runner.get_model(),
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
            self.model_runner.device,
        )

    def determine_available_memory(self) -> int:
        # The first run of the model. A compiled one is audited as a graph, an eager one operator by operator.
        eager = self.vllm_config.model_config.enforce_eager
        with audit.NoBareProducts() if eager else nullcontext():
            return int(super().determine_available_memory())
