"""ASGI middleware of every HTTP server with this plugin: the request field `deterministic`, and what answers it.

On a server without the flag it refuses a request that requires determinism, and touches nothing else. It stands in
front of vLLM's authentication, and hands on unread what that will turn away.
"""

from __future__ import annotations

import json
from typing import Any

from vllm_deterministic.serving import field, promise, splice
from vllm_deterministic.serving.fingerprint import canonical
from vllm_deterministic.serving.gate import gate
from vllm_deterministic.serving.receipts import MAX_REQUEST_BYTES

__all__ = ["Contract"]

# vLLM's weight-update API, and what a trainer may call while an update is under way.
WEIGHT_PATHS = frozenset(
    f"/{name}"
    for name in (
        "init_weight_transfer_engine shutdown_weight_transfer_engine start_weight_update update_weights "
        "finish_weight_update update_weight_version pause resume abort_requests"
    ).split()
)
RECEIPT_PATHS = ("/v1/completions", "/v1/chat/completions")
PROMISED_PATHS = (*RECEIPT_PATHS, "/v1/responses")
_ERROR_TYPES = {400: "BadRequestError", 409: "ConflictError", 503: "ServiceUnavailableError"}


class Contract:
    """Reads `deterministic` out of JSON bodies; stamps chunks; adds receipts; serves GET /deterministic."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        kept = promise.kept()
        if scope["method"] == "GET" and kept is not None:
            await self._get(path, kept, scope, receive, send)
        elif scope["method"] == "POST" and kept is not None and path not in WEIGHT_PATHS:
            async with gate.passing():  # asked for what is promised once inside: an update may have come before
                await self._posted(path, scope, receive, send)
        elif scope["method"] == "POST":
            await self._posted(path, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _get(self, path: str, kept: promise.Promise, scope: Any, receive: Any, send: Any) -> None:
        if path == "/deterministic":
            if _authorised(scope):
                await _respond(send, 200, kept.description)
            else:
                await _respond(send, 401, {"error": "Unauthorized"})
        elif path == "/v1/models":
            about = {"fingerprint": kept.fingerprint, "stopped": kept.stopped, "explained_by": "/deterministic"}
            members = {"deterministic": about}
            await self.app(scope, receive, _Answering(send, lambda: members).whole)
        else:
            await self.app(scope, receive, send)

    async def _posted(self, path: str, scope: Any, receive: Any, send: Any) -> None:
        if _header(scope, b"content-type").startswith(b"multipart/"):
            await self.app(scope, receive, send)
        else:
            await self._post(path, promise.kept(), scope, receive, send)

    async def _post(self, path: str, kept: promise.Promise | None, scope: Any, receive: Any, send: Any) -> None:
        if _turned_away(scope, path):
            await self.app(scope, receive, send)  # vLLM answers 401, and nobody reads the body
            return
        body, receive = await _read(receive)
        try:
            asked, request = field.read(body)
            field.check(asked, kept.fingerprint if kept else None, kept.stopped if kept else None)
            recorder = _recorder(kept, path, request) if kept and asked.receipt else None
        except field.FieldError as refusal:
            if kept is not None:
                _metrics().refused(refusal)
            kind = _ERROR_TYPES[refusal.status]
            error = {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.status}
            await _respond(send, refusal.status, {"error": error})
            return
        if kept is None or kept.stopped or path not in PROMISED_PATHS:
            await self.app(scope, receive, send)
            return
        send = _counting(send, asked)
        if path not in RECEIPT_PATHS:
            await self.app(scope, receive, send)
            return
        token = promise.recording.set(recorder)
        try:
            await self.app(scope, receive, _answering(send, kept, recorder))
        finally:
            promise.recording.reset(token)


def _recorder(kept: promise.Promise, path: str, request: dict[str, Any]) -> promise.Recorder:
    if path not in RECEIPT_PATHS:
        raise _no_receipt(f"receipts are given by {' and '.join(RECEIPT_PATHS)}")
    try:
        size = len(canonical(request))
    except ValueError as error:
        raise _no_receipt("a request with NaN or infinity gets no receipt") from error
    if size > MAX_REQUEST_BYTES:
        raise _no_receipt(f"a receipt repeats the request, which may have {MAX_REQUEST_BYTES} bytes and has {size}")
    return promise.Recorder(kept, path, request)


def _no_receipt(message: str) -> field.FieldError:
    return field.FieldError(message, "deterministic.receipt", reason="receipt")


def _counting(send: Any, asked: field.Asked) -> Any:
    """The same send, which counts an answer under the promise once it begins: a refusal by vLLM is none."""

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            _metrics().answered(asked)
        await send(message)

    return sending


class _Answering:
    """An ASGI send that changes the answer on its way out. members: what to add once the answer is complete."""

    def __init__(self, send: Any, members: Any, fingerprint: str = "") -> None:
        self._send, self._members, self._fingerprint = send, members, fingerprint
        self._start: Any = None
        self._body = b""

    async def whole(self, message: Any) -> None:
        """Holds a JSON answer back until it is complete, and adds the members."""
        if message["type"] == "http.response.start" and _is(message, b"application/json") and message["status"] == 200:
            self._start = message
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            members = self._members()
            body = splice.with_members(self._body, members) if members else self._body
            headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await self._send({**self._start, "headers": headers})
            await self._send({**message, "body": body})
        else:
            await self._send(message)

    async def stream(self, message: Any) -> None:
        """Stamps each chunk with the fingerprint, and sends the members as a chunk before the stream's end."""
        if message["type"] != "http.response.body" or not (body := message.get("body", b"")):
            await self._send(message)
            return
        self._body = self._body or body
        if body.startswith(splice.DONE) and (members := self._members()):
            chunk = splice.stamped(splice.as_chunk(self._body, members), self._fingerprint)
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({**message, "body": splice.stamped(body, self._fingerprint)})


def _answering(send: Any, kept: promise.Promise, recorder: promise.Recorder | None) -> Any:
    def members() -> dict[str, Any]:
        receipt = recorder.receipt() if recorder else None
        if receipt is None:
            return {}
        _metrics().receipts.inc()
        return {"deterministic": {"receipt": receipt.as_json()}}

    answering = _Answering(send, members, kept.fingerprint)
    chosen = send

    async def sending(message: Any) -> None:
        nonlocal chosen
        if message["type"] == "http.response.start":
            if _is(message, b"text/event-stream"):
                chosen = answering.stream
            elif recorder is not None:
                chosen = answering.whole
        await chosen(message)

    return sending


def _metrics() -> Any:
    from vllm_deterministic.serving import metrics  # on first use: a server without the flag has no such metrics

    return metrics


async def _read(receive: Any) -> tuple[bytes, Any]:
    """The whole body, and a `receive` that tells it again before it goes on with what comes after."""
    messages, parts = [], []
    more = True
    while more:
        message = await receive()
        messages.append(message)
        parts.append(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)

    async def again() -> Any:
        return messages.pop(0) if messages else await receive()

    return b"".join(parts), again


def _turned_away(scope: Any, path: str) -> bool:
    """Whether vLLM will refuse this caller. Of a vLLM that keeps this elsewhere nothing is known: it decides later."""
    try:
        from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

        return path.startswith(tuple(GUARDED_PREFIX)) and not _authorised(scope)
    except (ImportError, AttributeError):
        return False


def _authorised(scope: Any) -> bool:
    """Whether the request brings the key, by vLLM's own check, or the server has none."""
    from starlette.datastructures import Headers
    from vllm import envs
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    given = getattr(scope["app"].state.args, "api_key", None) or [envs.VLLM_API_KEY]
    tokens = [key for key in given if key]
    return not tokens or AuthenticationMiddleware(None, tokens).verify_token(Headers(scope=scope))  # type: ignore[arg-type]


def _header(scope: Any, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope.get("headers", ()) if key.lower() == name), b"")


def _is(start: Any, media_type: bytes) -> bool:
    return _header(start, b"content-type").startswith(media_type)


async def _respond(send: Any, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
