"""The trainer's side of a live server: are its bits ours, and how it gets the new weights."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openai
import torch
from safetensors.torch import save_file

from vllm_deterministic import compat
from vllm_deterministic.configs import numerics as trees_of
from vllm_deterministic.contract import Settings
from vllm_deterministic.errors import DeterministicError, UnsupportedError
from vllm_deterministic.integration import facts
from vllm_deterministic.serving.fingerprint import Numerics, differing_parts
from vllm_deterministic.serving.weights import digest_of_weights
from vllm_deterministic.train.patch import decoder_of
from vllm_deterministic.verify.probes import Endpoint

__all__ = ["LiveServer", "numerics"]

_WAYS_OUT = {
    "numerics.compile_mode": "serve with --enforce-eager: a compiled graph rounds at other places",
    "numerics.dtype": "deterministic_forward(model, dtype=the server's)",
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
        trees=trees_of(version)["cpu"],
        architecture=facts.cpu_architecture(),
        dtype=str(decoder.dtype).removeprefix("torch."),
        model_code=facts.model_code(getattr(module, name)),
        compile_mode="none",
        libraries={"vllm": compat.vllm_version(), "torch": torch.__version__},
    )


class LiveServer:
    """A deterministic server on this machine, started with `--enforce-eager` and, to be sent weights, with
    `--weight-transfer-config '{"backend": "safetensors"}'` and VLLM_SERVER_DEV_MODE=1.

    url: its root, for example http://127.0.0.1:8000. In that mode vLLM has its weight-update API, and other doors: do
    not open it to strangers.
    """

    def __init__(self, url: str, api_key: str = "EMPTY", timeout: float = 600.0) -> None:
        self._root, self._api_key, self._timeout = url.rstrip("/"), api_key, timeout

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        # trust_env: a proxy of the environment cannot reach this machine's loopback interface
        http = openai.DefaultHttpxClient(trust_env=False)
        with openai.OpenAI(
            base_url=self._root,
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
                raise DeterministicError(f"{self._root}{path}: {error}") from error

    def endpoint(self) -> Endpoint:
        """Where it answers."""
        models = self._ask("GET", "/v1/models")["data"]
        return Endpoint(f"{self._root}/v1", models[0]["id"], self._api_key, self._timeout)

    def description(self) -> dict[str, Any]:
        """GET /deterministic: the fingerprint and its parts. Raises DeterministicError where there is none."""
        found: dict[str, Any] = self._ask("GET", "/deterministic")
        return found

    def check(self, model: Any) -> str:
        """The server's fingerprint. Raises UnsupportedError, naming each part, where its bits need not be the model's.

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
            raise UnsupportedError(f"{self._root} does not compute what this trainer computes:{listed}")
        return str(description["fingerprint"])

    def send_weights(self, model: Any) -> str:
        """Puts the model's weights into the server, in place; returns its new fingerprint, which `check` has seen.

        Running requests end first, new ones wait; the prefix cache is emptied. Call inside `deterministic_forward`.
        """
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(
            prefix="vllm-deterministic-", dir=memory if memory.is_dir() else None
        ) as folder:
            file = Path(folder) / "model.safetensors"
            save_file(dict(_named(model, decoder_of(model).dtype)), file)
            self._ask("POST", "/start_weight_update")
            self._ask("POST", "/update_weights", {"update_info": {"path": str(file)}})
            self._ask("POST", "/finish_weight_update")
        return self.check(model)


def _named(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights as a checkpoint names them, each once, in the server's dtype."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().to(dtype).contiguous()


def _way_out(part: str) -> str:
    return f": {_WAYS_OUT[part]}" if part in _WAYS_OUT else ""
