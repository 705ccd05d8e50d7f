"""The CPU worker of a deterministic engine: vLLM's own, with the operators replaced before the weights are packed."""

from __future__ import annotations

import os

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_deterministic.integration import linear, sampler

__all__ = ["DeterministicCPUWorker"]


class DeterministicCPUWorker(CPUWorker):
    """Arms the CPU seams in its own process. Raises SeamError or CertificationError: then the server does not start."""

    def init_device(self) -> None:
        # Attention: one pass over the keys in ascending blocks. Splitting a long row among idle cores depends on how
        # many rows the neighbours bring. Read when the metadata builder runs, so before the first step is enough.
        os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
        linear.arm()
        sampler.arm()
        super().init_device()  # builds the sampler, which binds its functions
