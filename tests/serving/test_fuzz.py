"""Fuzz over the wire: what a stranger puts into the new request field neither breaks the server nor moves a neighbour.

The middleware alone meets 10,000 cases in tests/unit/test_contract_middleware.py; here a few hundred meet the server.
docs/reports/fuzz.txt is made by `REPORT=docs/reports/fuzz.txt scripts/test --slow FILE` with each of the two files.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = [pytest.mark.serving, pytest.mark.slow]

only = pytest.mark.parametrize("config", ["det-bf16-eager-2048"])
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
NEIGHBOUR = {"max_tokens": 6, "temperature": 0.8, "seed": 3, "logprobs": 0, "deterministic": {"receipt": True}}
one_loop = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def asked(path: str, model: str) -> dict[str, Any]:
    """A small request to each of the three."""
    if path == "/v1/responses":
        return {"model": model, "input": "Hi", "max_output_tokens": 1}
    prompt = {"prompt": "Hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    return {"model": model, "max_tokens": 1, **prompt}


class Client:
    """Posts two bodies at once: a stranger's, and the neighbour's request, whose answer is returned bare of its id."""

    def __init__(self, server: Any) -> None:
        self._server = server

    async def _posted(self, http: httpx.AsyncClient, path: str, body: bytes) -> httpx.Response:
        return await http.post(self._server.url + path, content=body, headers={"content-type": "application/json"})

    def post(self, path: str, body: bytes, prompt: str = "The map shows") -> tuple[httpx.Response, Any]:
        neighbour = json.dumps({**NEIGHBOUR, "model": self._server.model, "prompt": prompt}).encode()

        async def together() -> Any:
            async with httpx.AsyncClient(trust_env=False, timeout=120) as http:
                return await asyncio.gather(
                    self._posted(http, path, body), self._posted(http, "/v1/completions", neighbour)
                )

        stranger, other = asyncio.run(together())
        answer = other.json()
        return stranger, {name: value for name, value in answer.items() if name not in ("id", "created")}


@only
def test_fuzzed_demands(servers, demands, is_allowed, told, config):
    server = servers.get(config)
    client, seen = Client(server), Counter()
    _, alone = client.post("/health", b"{}")
    assert alone["deterministic"]["receipt"]["choices"]

    @settings(one_loop, max_examples=400)
    @given(value=demands, path=st.sampled_from(PATHS), stream=st.booleans())
    def asking(value: Any, path: str, stream: bool) -> None:
        body = json.dumps({**asked(path, server.model), "deterministic": value, "stream": stream}).encode()
        answer, neighbour = client.post(path, body)
        seen[answer.status_code] += 1
        receipt = isinstance(value, dict) and value.get("receipt") is True
        if is_allowed(value) and not (receipt and path == "/v1/responses"):
            assert answer.status_code == 200
        else:
            assert answer.status_code in (400, 409)
            assert answer.json()["error"]["param"]
        assert neighbour == alone

    asking()
    told(f"{seen.total()} demands over HTTP beside a neighbour whose answer stayed the same: {dict(seen)}")
    # The control: what is compared is the whole answer.
    assert client.post("/health", b"{}", prompt="The map showed")[1] != alone


@only
def test_fuzzed_bodies(servers, told, config):
    """No request at all, or half a one: refused, and not with a 500."""
    server = servers.get(config)
    client, seen = Client(server), Counter()
    _, alone = client.post("/health", b"{}")

    @settings(one_loop, max_examples=200)
    @given(body=st.binary().map(lambda part: b'{"deterministic":' + part) | st.binary(), path=st.sampled_from(PATHS))
    def asking(body: bytes, path: str) -> None:
        answer, neighbour = client.post(path, body)
        seen[answer.status_code] += 1
        assert 400 <= answer.status_code < 500
        assert neighbour == alone

    asking()
    told(f"{seen.total()} bodies over HTTP beside a neighbour whose answer stayed the same: {dict(seen)}")
