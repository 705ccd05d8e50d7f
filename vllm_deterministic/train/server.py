"""A live server as the trainer's sampler."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai

from vllm_deterministic.errors import DeterministicError
from vllm_deterministic.train.sampler import Sampler
from vllm_deterministic.verify.probes import Answer, Endpoint, Probe, ask

__all__ = ["LiveServer"]


class LiveServer(Sampler):
    """A deterministic server on this machine, started with `--enforce-eager` and, to be sent weights, with
    `--weight-transfer-config '{"backend": "safetensors"}'` and VLLM_SERVER_DEV_MODE=1.

    url: its root, for example http://127.0.0.1:8000. In that mode vLLM has its weight-update API, and other doors: do
    not open it to strangers.
    """

    def __init__(self, url: str, api_key: str = "EMPTY", timeout: float = 600.0) -> None:
        self.name, self._api_key, self._timeout = url.rstrip("/"), api_key, timeout

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        # trust_env: a proxy of the environment cannot reach this machine's loopback interface
        http = openai.DefaultHttpxClient(trust_env=False)
        with openai.OpenAI(
            base_url=self.name,
            api_key=self._api_key,
            timeout=self._timeout,
            max_retries=0,
            http_client=http,
        ) as client:
            try:
                if method == "GET":
                    return client.get(path, cast_to=object)
                return client.post(path, cast_to=object, body=body or {})
            except openai.APIError as error:
                raise DeterministicError(f"{self.name}{path}: {error}") from error

    def endpoint(self) -> Endpoint:
        """Where it answers."""
        models = self._ask("GET", "/v1/models")["data"]
        return Endpoint(f"{self.name}/v1", models[0]["id"], self._api_key, self._timeout)

    def description(self) -> dict[str, Any]:
        """GET /deterministic."""
        found: dict[str, Any] = self._ask("GET", "/deterministic")
        return found

    def sample(self, probes: Sequence[Probe]) -> list[Answer]:
        endpoint = self.endpoint()

        async def all_at_once() -> list[Answer]:
            return [answer for (answer,) in await asyncio.gather(*(ask(endpoint, probe) for probe in probes))]

        return asyncio.run(all_at_once())

    def _update(self, file: Path) -> None:
        self._ask("POST", "/start_weight_update")
        self._ask("POST", "/update_weights", {"update_info": {"path": str(file)}})
        self._ask("POST", "/finish_weight_update")
