"""vLLM's offline engine as the trainer's sampler: in the trainer's own process, or beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.inputs import TokensPrompt

from vllm_deterministic.errors import ConfigurationError, DeterministicError
from vllm_deterministic.integration import facts
from vllm_deterministic.train.sampler import Sampler
from vllm_deterministic.verify.offline import answers, parameters
from vllm_deterministic.verify.probes import Answer, Probe

__all__ = ["LocalEngine"]


class LocalEngine(Sampler):
    """vLLM's `LLM`, made with `enforce_eager=True`, `additional_config=vllm_deterministic.enable()` and, to be sent
    weights, `weight_transfer_config={"backend": "safetensors"}`.

    With VLLM_ENABLE_V1_MULTIPROCESSING=0 in the environment it lives in this process, which trainers call colocated.
    """

    name = "the local engine"

    def __init__(self, llm: Any) -> None:
        self._llm, self._whole = llm, True

    def description(self) -> dict[str, Any]:
        """The fingerprint that a server with this configuration would have, and its parts."""
        engine = self._llm.llm_engine
        report = self._llm.collective_rpc("deterministic_report")[0]
        found = facts.fingerprint(engine.vllm_config, None, self._llm.get_tokenizer(), report)
        return {"fingerprint": str(found), "parts": found.parts}

    def sample(self, probes: Sequence[Probe]) -> list[Answer]:
        if not self._whole:
            raise DeterministicError("a weight update has failed half-way: send_weights again")
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=_ids(probe)) for probe in probes],
            [parameters(probe) for probe in probes],
            use_tqdm=False,
        )
        found = []
        for probe, output in zip(probes, outputs, strict=True):
            (answer,) = answers(output, probe)
            found.append(replace(answer, prompt_token_ids=tuple(output.prompt_token_ids)))
        return found

    def _update(self, file: Path) -> None:
        self._whole = False  # until every step has succeeded
        self._llm.collective_rpc("start_weight_update")
        self._llm.collective_rpc("update_weights", args=({"path": str(file)},))
        self._llm.collective_rpc("finish_weight_update")
        if not self._llm.reset_prefix_cache():
            raise DeterministicError("the prefix cache still holds pages of the old weights")
        self._whole = True


def _ids(probe: Probe) -> list[int]:
    if probe.prompt is None or isinstance(probe.prompt, str):
        raise ConfigurationError(f"probe {probe.name!r}: a local engine is asked in token ids")
    return list(probe.prompt)
