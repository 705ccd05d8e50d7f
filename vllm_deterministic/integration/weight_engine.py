"""New weights for a running worker: vLLM's weight-transfer interface, fed from a safetensors file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_deterministic import compat
from vllm_deterministic.errors import ConfigurationError, UnsupportedError
from vllm_deterministic.integration import weights
from vllm_deterministic.policy import WEIGHT_TRANSFER
from vllm_deterministic.serving.weights import WeightsDigest

__all__ = ["SafetensorsEngine", "arm", "refused"]


@dataclass
class Nothing(WeightTransferInitInfo):
    """The engine needs no handshake."""


@dataclass
class File(WeightTransferUpdateInfo):
    """path: a safetensors file with every tensor of the checkpoint, under the checkpoint's names."""

    path: str


class SafetensorsEngine(WeightTransferEngine[Nothing, File]):
    """Reloads every layer through vLLM's own loaders, so each is packed and certified as at the start."""

    init_info_cls = Nothing
    update_info_cls = File
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: Nothing) -> None:
        del init_info

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._seen = WeightsDigest()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: File) -> None:
        from safetensors import safe_open

        with safe_open(update_info.path, "pt") as file:
            names = set(file.keys())
            if wrong := sorted(names ^ weights.names()):
                raise ConfigurationError(f"{update_info.path} must hold the checkpoint's tensors: see {wrong[:3]}")
            load: Any = self.model.load_weights
            load(self._seen.watch((name, file.get_tensor(name)) for name in sorted(names)))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if not self._seen.names:
            raise ConfigurationError("no weights have come since the update was started")
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self.model.modules():
            # A head that shares the embedding's weight was loaded none of its own: nobody has packed it anew.
            if isinstance(layer, VocabParallelEmbedding):
                layer.quant_method.process_weights_after_loading(layer)
        weights.replace(self._seen)

    def shutdown(self) -> None:
        pass


def arm() -> None:
    """Makes the engine known to vLLM in this worker process. Idempotent. Raises SeamError."""
    compat.probe(compat.CPU_SEAMS["weight_transfer"])
    if WEIGHT_TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(WEIGHT_TRANSFER, SafetensorsEngine)


def refused(worker: Any, *args: Any, **kwargs: Any) -> None:
    """A worker's way to other weights behind the front end's back: cached prefixes were computed with the old ones, and
    the fingerprint names them. Raises UnsupportedError."""
    raise UnsupportedError(
        "--deterministic: weights are changed by vLLM's weight-update API (--weight-transfer-config), not like this"
    )
