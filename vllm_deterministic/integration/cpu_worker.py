"""The CPU worker of a deterministic engine: vLLM's own, with the operators replaced before the weights are packed."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_deterministic.integration import cpu_activation, cpu_attention, facts, linear, sampler, weight_engine, weights

__all__ = ["DeterministicCPUWorker"]


class DeterministicCPUWorker(CPUWorker):
    """Arms the CPU seams in its own process. Raises SeamError or CertificationError: then the server does not start."""

    def init_device(self) -> None:
        cpu_activation.arm()
        cpu_attention.arm()
        linear.arm()
        sampler.arm()
        weights.arm()
        weight_engine.arm()
        super().init_device()  # builds the sampler, which binds its functions

    def compile_or_warm_up_model(self) -> Any:
        # vLLM's warm-up attends to nothing: without this the first request would be the certification.
        cpu_attention.certify_layers(self.model_runner.attn_groups)
        return super().compile_or_warm_up_model()

    def deterministic_report(self) -> dict[str, Any]:
        """See facts.worker_report."""
        model, device = self.model_runner.get_model(), self.model_runner.device
        certified = [*linear.certified(), *cpu_attention.certified()]
        seconds = linear.seconds() + cpu_attention.seconds()
        return facts.worker_report(self.vllm_config, model, device, certified, seconds)

    reload_weights = reset_weights = weight_engine.refused
