"""Around a weight update, in the HTTP server: no answer of two weights, no cached prefix, and a new fingerprint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_deterministic import compat
from vllm_deterministic.integration import wire
from vllm_deterministic.serving.gate import gate

__all__ = ["arm"]


def arm() -> None:
    """Installs the seams in this process. Idempotent. Raises SeamError."""
    compat.install(compat.WIRE_SEAMS["start_weight_update"], _draining)
    compat.install(compat.WIRE_SEAMS["finish_weight_update"], _promising_anew)


def _draining(start: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(start)
    async def wrapped(self: Any) -> None:
        # A paused engine answers nobody: those it has frozen would never leave the gate.
        if paused := await self.is_paused():
            await self.resume_generation()
        await gate.close()  # new requests wait, running ones end
        if paused:
            await self.pause_generation(mode="wait")
        await start(self)

    return wrapped


def _promising_anew(finish: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(finish)
    async def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        # Where one of these steps fails, the gate stays closed: half an update answers nobody.
        await finish(self, *args, **kwargs)
        await self.reset_prefix_cache()
        await wire.promise_anew()
        await gate.open()

    return wrapped
