"""The middleware around a small app: demands, refusals, receipts whole and streamed, bounds, and fuzz."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import math
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_deterministic.serving import field, promise
from vllm_deterministic.serving.fingerprint import Fingerprint, Numerics
from vllm_deterministic.serving.replay import find_receipt

FINGERPRINT = Fingerprint(Numerics("v1", {}, {}, "bfloat16", {}, "none", {}), "w", "t", "c")
OTHER = "vd1-" + "0" * 32

STREAM = [b'data: {"id":"x","model":"m","choices":[{}]}\n\n', b'data: {"id":"x","choices":[]}\n\n', b"data: [DONE]\n\n"]


class Engine:
    """An app that does what vLLM's does, as far as the middleware sees: it answers, and the recorder is told."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = message.get("body", b"")
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        self.bodies.append(body)
        if (recorder := promise.recording.get()) is not None:
            recorder.begin(1)
            recorder.ran([1], {"seed": 3})
            recorder.add(0, [5], [-0.5], "stop")
        stream = b'"stream": true' in body
        kind = b"text/event-stream" if stream else b"application/json"
        headers = [(b"content-type", kind), *([] if stream else [(b"content-length", b"9")])]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in STREAM if stream else [b'{"id":', b'"x"}']:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _ask(*args: Any, **kwargs: Any) -> Any:
    return asyncio.run(_asked(*args, **kwargs))


async def _asked(
    body: bytes, path: str = "/v1/completions", method: str = "POST", key: str = "", keys: Any = None
) -> Any:
    """Status and body of the answer, and what the engine was given."""
    from vllm_deterministic.integration.contract_middleware import Contract

    engine, sent = Engine(), []
    app = types.SimpleNamespace(state=types.SimpleNamespace(args=types.SimpleNamespace(api_key=keys)))
    headers = [(b"content-type", b"application/json")] + ([(b"authorization", f"Bearer {key}".encode())] if key else [])
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "app": app}
    half = len(body) // 2
    pieces = [
        {"type": "http.request", "body": body[:half], "more_body": True},
        {"type": "http.request", "body": body[half:], "more_body": False},
    ]

    async def receive() -> Any:
        return pieces.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await Contract(engine)(scope, receive, send)
    answer = b"".join(message.get("body", b"") for message in sent)
    length = dict(sent[0]["headers"]).get(b"content-length")
    if length not in (None, b"9"):  # else a stream, or the engine's own answer, untouched
        assert int(length) == len(answer)
    return sent[0]["status"], answer, engine.bodies


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> promise.Promise:
    pytest.importorskip("vllm", reason="vLLM's own authentication")
    made = promise.Promise.of(FINGERPRINT, {"versions": {}}, None)
    monkeypatch.setattr(promise, "_promise", made)
    return made


@pytest.fixture
def none_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="vLLM's own authentication")
    monkeypatch.setattr(promise, "_promise", None)


def test_without_the_flag_only_a_demand_is_refused(none_kept: None) -> None:
    for path, method in (("/deterministic", "GET"), ("/v1/models", "GET"), ("/v1/completions", "POST")):
        for body in (b"{}", b"no json", b'{"stream": true}', b'{"deterministic": false}'):
            status, answer, given = _ask(body, path, method)
            assert (status, given) == (200, [body])
            assert answer == (b"".join(STREAM) if b"stream" in body else b'{"id":"x"}')
    status, answer, given = _ask(b'{"deterministic": "require"}')
    assert (status, given) == (400, [])
    assert json.loads(answer)["error"]["param"] == "deterministic"


def test_with_the_flag(kept: promise.Promise) -> None:
    status, answer, given = _ask(b'{"deterministic": {"require": "%s"}}' % OTHER.encode())
    assert (status, given) == (409, [])
    assert OTHER in json.loads(answer)["error"]["message"]
    assert _ask(json.dumps({"deterministic": {"require": kept.fingerprint}}).encode())[0] == 200
    assert json.loads(_ask(b"", "/deterministic", "GET")[1])["fingerprint"] == kept.fingerprint
    assert json.loads(_ask(b"", "/v1/models", "GET")[1])["deterministic"]["fingerprint"] == kept.fingerprint
    assert _ask(b"{}")[1] == b'{"id":"x"}'


def test_a_stopped_promise(kept: promise.Promise, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for nothing is answered, without the fingerprint; who requires the promise gets 503."""
    demands = ("require", True, {"receipt": True}, {"require": kept.fingerprint})
    bodies = [json.dumps({"deterministic": demand}).encode() for demand in demands]
    assert [_ask(body)[0] for body in bodies] == [200] * 4  # the control: before it stopped
    monkeypatch.setattr(promise, "_promise", dataclasses.replace(kept, stopped="because"))
    for body in bodies:
        status, answer, given = _ask(body)
        assert (status, given) == (503, [])
        assert "because" in json.loads(answer)["error"]["message"]
    assert _ask(b'{"deterministic": {"require": "%s"}}' % OTHER.encode())[0] == 409
    for body in (b"{}", b'{"deterministic": false}'):
        assert _ask(body)[:2] == (200, b'{"id":"x"}')
    assert kept.fingerprint.encode() not in _ask(b'{"stream": true}')[1]
    assert json.loads(_ask(b"", "/deterministic", "GET")[1])["stopped"] == "because"


def test_receipts_whole_and_streamed(kept: promise.Promise) -> None:
    whole = find_receipt(_ask(b'{"deterministic": {"receipt": true}}')[1].decode())
    body = _ask(b'{"stream": true, "deterministic": {"receipt": true}}')[1]
    assert find_receipt(body.decode()).choices == whole.choices
    events = [event for event in body.split(b"\n\n") if event]
    assert events[-1] == b"data: [DONE]"
    assert json.loads(events[-2][6:])["model"] == "m"
    for event in events[:-1]:
        assert json.loads(event[6:])["system_fingerprint"] == kept.fingerprint
    assert promise.recording.get() is None


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"deterministic": {"receipt": True}}, "/v1/responses"),
        ({"deterministic": {"receipt": True}, "prompt": "x" * (1 << 20)}, "/v1/completions"),
        ({"deterministic": {"receipt": True}, "prompt": math.inf}, "/v1/completions"),
    ],
    ids=["elsewhere", "large", "infinite"],
)
def test_receipts_are_bounded(kept: promise.Promise, body: dict[str, Any], path: str) -> None:
    status, _, given = _ask(json.dumps(body).encode(), path)
    assert (status, given) == (400, [])


def test_the_api_key_is_respected(kept: promise.Promise) -> None:
    """Who would not pass vLLM's authentication is told nothing here, not even a fingerprint."""
    demand = b'{"deterministic": {"require": "%s"}}' % OTHER.encode()
    assert _ask(b"", "/deterministic", "GET", keys=["k"])[0] == 401
    assert _ask(b"", "/deterministic", "GET", "k", ["k"])[0] == 200
    assert _ask(demand, keys=["k"])[2] == [demand]  # handed on: vLLM's authentication stands behind
    assert _ask(demand, key="k", keys=["k"])[0] == 409


NEIGHBOUR = b'{"prompt": "y", "deterministic": {"receipt": true}}'


@pytest.mark.parametrize("cases", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_fields_are_answered_or_refused(
    kept: promise.Promise, demands: Any, is_allowed: Callable[[Any], bool], told: Callable[[str], None], cases: int
) -> None:
    """Through the middleware: never an exception, which would be a 500; a refusal is short JSON; a neighbour that is
    answered at the same time gets the bytes it gets alone."""
    seen: Counter[int] = Counter()

    @settings(max_examples=cases, deadline=None)
    @given(value=demands, stream=st.booleans())
    def asking(value: Any, stream: bool) -> None:
        body = json.dumps({"prompt": "x", "deterministic": value, **({"stream": True} if stream else {})}).encode()

        async def together() -> Any:
            return await asyncio.gather(_asked(body), _asked(NEIGHBOUR))

        (status, answer, given_on), neighbour = asyncio.run(together())
        seen[status] += 1
        if is_allowed(value):
            assert (status, given_on) == (200, [body])
        else:
            assert status in (400, 409)
            assert given_on == []
            assert len(answer) < 1000
            assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
        assert neighbour == _alone(kept.fingerprint)

    asking()
    told(f"{seen.total()} demands through the middleware beside a neighbour with the same bytes: {dict(seen)}")
    assert seen.total() >= cases


@functools.cache
def _alone(fingerprint: str) -> Any:
    """What the neighbour gets from a server that is left to it."""
    del fingerprint
    return _ask(NEIGHBOUR)


def test_a_neighbour_would_be_seen(kept: promise.Promise) -> None:
    """The control: what the fuzz compares is the whole answer, receipt included."""
    assert _ask(NEIGHBOUR) == _alone(kept.fingerprint)
    assert _ask(NEIGHBOUR.replace(b"y", b"z")) != _alone(kept.fingerprint)


@settings(max_examples=2_000, deadline=None)
@given(body=st.binary() | st.binary().map(lambda part: b'{"deterministic":' + part))
def test_fuzzed_bodies_are_answered_or_refused(body: bytes) -> None:
    try:
        field.read(body)
    except field.FieldError:
        return


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(field.FieldError):
        field.read(b'{"deterministic":' + b"[" * 100_000)
