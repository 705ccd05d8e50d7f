"""The digest of a model's weights, as the checkpoint names and stores them.

It is taken from the stream of (name, tensor) that the loader hands to the model, before anything is fused, sharded or
packed: so it is the same for every number of ranks and every split into files, it costs no second reading, and whoever
holds the checkpoint can compute it. It does not depend on the order in which the tensors arrive.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_deterministic.serving.fingerprint import digest_of

__all__ = ["WeightsDigest", "digest_of_weights"]

# Hashed in parallel and joined in ascending order; part of the digest's definition.
_CHUNK_BYTES = 16 * 2**20


class WeightsDigest:
    """Hashes weights while they pass through `watch`."""

    def __init__(self) -> None:
        self._tensors: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def watch(self, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The same pairs. A tensor is hashed before it is handed on: the model may change it in place."""
        for name, tensor in weights:
            self._tensors[name] = self._digest(tensor)
            yield name, tensor

    def _digest(self, tensor: Any) -> str:
        import torch

        data = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        chunks = [data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES)]
        parts = self._pool.map(lambda chunk: hashlib.sha256(chunk).hexdigest(), chunks)
        return digest_of([str(tensor.dtype), list(tensor.shape), list(parts)])

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors seen so far."""
        return frozenset(self._tensors)

    def hexdigest(self) -> str:
        """sha256 over all tensors seen, by name."""
        return digest_of(self._tensors)


def digest_of_weights(weights: Iterable[tuple[str, Any]]) -> str:
    """The digest of (name, tensor) pairs in any order."""
    watched = WeightsDigest()
    for _ in watched.watch(weights):
        pass
    return watched.hexdigest()
