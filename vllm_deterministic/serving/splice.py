"""Adds members to JSON answers and to the chunks of a stream, byte by byte: the rest stays as vLLM wrote it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["DONE", "as_chunk", "stamped", "with_members"]

DONE = b"data: [DONE]"
_CHUNK = b'data: {"id":'
# Inside a JSON string the quotes are escaped, so no text that a model writes contains this.
_FINGERPRINT = b'"system_fingerprint":'


def _members(members: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(members), separators=(",", ":"))[1:-1].encode()


def with_members(body: bytes, members: Mapping[str, Any]) -> bytes:
    """A JSON object with more members at its end. Anything but a JSON object is returned as it is."""
    whole = body.rstrip()
    if not (whole.startswith(b"{") and whole.endswith(b"}")):
        return body
    empty = not whole[1:-1].strip()
    return whole[:-1] + (b"" if empty else b",") + _members(members) + b"}"


def stamped(message: bytes, fingerprint: str) -> bytes:
    """One event of a stream, with the fingerprint where it is a chunk that does not say it."""
    if not message.startswith(_CHUNK) or _FINGERPRINT in message:
        return message
    return _stamp(fingerprint) + message[len(b"data: {") :]


@functools.lru_cache(maxsize=8)
def _stamp(fingerprint: str) -> bytes:
    return b"data: {" + _members({"system_fingerprint": fingerprint}) + b","


def as_chunk(first: bytes, members: Mapping[str, Any]) -> bytes:
    """A chunk without choices that belongs to the stream whose first chunk is given."""
    try:
        like = json.loads(first.partition(b"data: ")[2])
    except ValueError:
        like = {}
    kept = {name: like[name] for name in ("id", "object", "created", "model") if name in like}
    return b"data: {" + _members({**kept, "choices": [], **members}) + b"}\n\n"
