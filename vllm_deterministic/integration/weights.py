"""Hashes the weights on their way from the loader into the model, in the worker process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from vllm_deterministic import compat
from vllm_deterministic.errors import SeamError
from vllm_deterministic.serving.weights import WeightsDigest

__all__ = ["arm", "digest", "names", "replace"]

_seen: WeightsDigest | None = None


def arm() -> None:
    """Installs the seam in this worker process. Idempotent. Raises SeamError."""
    compat.install(compat.CPU_SEAMS["weights"], _hashed)


def _hashed(get_all_weights: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_all_weights)
    def wrapped(self: Any, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
        global _seen
        _seen = WeightsDigest()
        yield from _seen.watch(get_all_weights(self, model_config, model))

    return wrapped


def names() -> frozenset[str]:
    """Names of the checkpoint's tensors."""
    return _seen.names if _seen is not None else frozenset()


def replace(seen: WeightsDigest) -> None:
    """The model has been loaded anew, with these."""
    global _seen
    _seen = seen


def digest(load_format: str) -> str:
    """Digest of the loaded weights. Raises SeamError where they did not pass through the seam."""
    if load_format == "dummy":
        return "dummy"  # a function of shapes, dtype and torch's version, which the fingerprint names
    if _seen is None:
        raise SeamError(f"weights of load format {load_format!r} were loaded past the seam that hashes them")
    return _seen.hexdigest()
