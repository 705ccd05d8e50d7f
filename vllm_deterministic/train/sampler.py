"""What every sampler of a trainer must do: say what it computes, take new weights, and answer."""

from __future__ import annotations

import abc
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_deterministic.configs import numerics as trees_of
from vllm_deterministic.contract import Settings
from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.integration import facts
from vllm_deterministic.serving.fingerprint import Numerics, differing_parts
from vllm_deterministic.serving.weights import digest_of_weights
from vllm_deterministic.train.patch import decoder_of
from vllm_deterministic.verify.probes import Answer, Probe

__all__ = ["Sampler", "numerics"]

_WAYS_OUT = {
    "numerics.compile_mode": "serve with --enforce-eager: a compiled graph rounds at other places",
    "numerics.dtype": "deterministic_forward(model, dtype=the server's)",
    "numerics.trees": "the trainer knows head sizes 64, 128 and 256: serve such a model, without --kv-cache-dtype",
    "weights": "send_weights(model) first",
}


def numerics(model: Any) -> Numerics:
    """The arithmetic of a model inside `deterministic_forward`, as a server's fingerprint names it."""
    decoder = decoder_of(model)
    name = type(model).__name__
    module = importlib.import_module(f"vllm.model_executor.models.{model.config.model_type}")
    version = Settings().numerics
    return Numerics(
        version=version,
        trees=trees_of(version)[decoder.place.type],
        architecture=facts.architecture(decoder.place),
        dtype=str(decoder.dtype).removeprefix("torch."),
        model_code=facts.model_code(getattr(module, name)),
        compile_mode="none",
        libraries=facts.libraries(decoder.place.type),
    )


class Sampler(abc.ABC):
    """A deterministic engine whose log-probabilities are the trainer's. name: what errors call it."""

    name: str

    @abc.abstractmethod
    def description(self) -> dict[str, Any]:
        """The fingerprint and its parts. Raises DeterministicError where there is none."""

    @abc.abstractmethod
    def sample(self, probes: Sequence[Probe]) -> list[Answer]:
        """One answer to each, all asked at once."""

    @abc.abstractmethod
    def _update(self, file: Path) -> None:
        """Puts the safetensors file's weights into the engine and empties the prefix cache."""

    def check(self, model: Any) -> str:
        """The sampler's fingerprint. Raises UnsupportedError, naming each part, where its bits need not be the model's.

        Call inside `deterministic_forward(model)`. The weights are compared as well.
        """
        description = self.description()
        decoder = decoder_of(model)
        mine = {
            **{f"numerics.{name}": value for name, value in asdict(numerics(model)).items()},
            "weights": digest_of_weights(_named(model, decoder.dtype)),
            "settings.rope": model.config.rope_parameters,
        }
        theirs = {name: description["parts"].get(name) for name in mine}
        if wrong := differing_parts(mine, theirs):
            listed = "".join(f"\n  - {name}{_way_out(name)}" for name in wrong)
            raise UnsupportedError(f"{self.name} does not compute what this trainer computes:{listed}")
        return str(description["fingerprint"])

    def send_weights(self, model: Any) -> str:
        """Puts the model's weights into the sampler, in place; returns its new fingerprint, which `check` has seen.

        Running requests end first, new ones wait; the prefix cache is emptied. Call inside `deterministic_forward`.
        """
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(
            prefix="vllm-deterministic-", dir=memory if memory.is_dir() else None
        ) as folder:
            file = Path(folder) / "model.safetensors"
            save_file(dict(_named(model, decoder_of(model).dtype)), file)
            self._update(file)
        return self.check(model)


def _named(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights as a checkpoint names them, each once, in the server's dtype."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().to(dtype).contiguous()


def _way_out(part: str) -> str:
    return f": {_WAYS_OUT[part]}" if part in _WAYS_OUT else ""
