"""ASGI middleware of the HTTP server: puts the seeds that the server drew for a request into the answer's header."""

from __future__ import annotations

from typing import Any

from vllm_deterministic.integration.requests import SEED_HEADER, seeds_given

__all__ = ["SeedHeader"]


class SeedHeader:
    """Adds `x-vllm-deterministic-seed: 123` (comma-separated for a list of prompts) to answers with drawn seeds."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seeds: list[int] = []
        token = seeds_given.set(seeds)

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start" and seeds:
                header = (SEED_HEADER.encode(), ",".join(map(str, seeds)).encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            seeds_given.reset(token)
