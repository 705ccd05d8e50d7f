"""Keeps requests and weight updates apart: each request is answered by the weights it was promised, and no others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

__all__ = ["Gate", "gate"]


class Gate:
    """Requests pass while it is open. To close it is to wait until the last one inside has left."""

    def __init__(self) -> None:
        self._inside = 0
        self._open = True
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Inside, the weights stay as they are; waits for as long as the gate is closed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._open)
            self._inside += 1
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    async def close(self) -> None:
        """Lets nobody in any more, and waits until nobody is inside."""
        async with self._changed:
            self._open = False
            self._changed.notify_all()
            await self._changed.wait_for(lambda: not self._inside)

    async def closing(self) -> None:
        """Returns once somebody has begun to close it."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._open)

    async def open(self) -> None:
        """Lets those who wait in."""
        async with self._changed:
            self._open = True
            self._changed.notify_all()


gate = Gate()
