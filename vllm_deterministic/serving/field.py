"""The request field `deterministic`: what a client may ask of the server besides the answer.

`"require"` or true: answer with the promise or not at all. `{"require": "vd1-…"}`: and only with this fingerprint.
`{"receipt": true}`: with a receipt. false: no promise is asked for. Every other key or value is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from vllm_deterministic.serving.fingerprint import FINGERPRINT

__all__ = ["FIELD", "NOTHING", "Asked", "FieldError", "check", "parse", "read"]

FIELD = "deterministic"
# A body that cannot name the field is not parsed: not even by escapes or in another encoding.
_MAY_NAME_IT = re.compile(rb"deterministic|\\u|\x00")
_KEYS = ("require", "receipt")


class FieldError(Exception):
    """A refusal: an HTTP status, the parameter that is at fault, and a message that says what to change.

    reason: what the metrics count it under.
    """

    def __init__(self, message: str, param: str = FIELD, status: int = 400, reason: str = "malformed") -> None:
        super().__init__(message)
        self.param, self.status, self.reason = param, status, reason


@dataclass(frozen=True)
class Asked:
    """What one request asks. fingerprint: the one it insists on. declined: it said `false`."""

    required: bool = False
    fingerprint: str | None = None
    receipt: bool = False
    declined: bool = False


NOTHING = Asked()


def read(body: bytes) -> tuple[Asked, dict[str, Any]]:
    """What the body asks, and the body itself where it had to be parsed ({} otherwise).

    Raises FieldError for an unknown key or value. A body that is no JSON object is left to vLLM.
    """
    if not _MAY_NAME_IT.search(body):
        return NOTHING, {}
    infinite: list[str] = []
    try:
        request = json.loads(body, parse_constant=infinite.append)
    except RecursionError as error:
        raise FieldError("the request is nested too deeply", param="body") from error
    except ValueError:
        return NOTHING, {}
    if not isinstance(request, dict) or FIELD not in request:
        return NOTHING, {}
    if infinite:
        raise FieldError(f"{infinite[0]} is no JSON", param="body")
    if request[FIELD] is None:
        return NOTHING, {}
    return parse(request[FIELD]), request


def parse(value: Any) -> Asked:
    """What the field's value asks. Raises FieldError for one that does not exist."""
    if value is False:
        return Asked(declined=True)
    if value is True or value == "require":
        return Asked(required=True)
    if not isinstance(value, dict):
        raise FieldError(f'{FIELD!r} takes "require", false, or an object with {" and ".join(_KEYS)}')
    for key in value:
        if key not in _KEYS:
            raise FieldError(
                f"{FIELD!r} has no key {_short(key)}; it has {' and '.join(_KEYS)}", f"{FIELD}.{_short(key)}"
            )
    require, receipt = value.get("require", False), value.get("receipt", False)
    if not isinstance(receipt, bool):
        raise FieldError(f"'{FIELD}.receipt' takes true or false", f"{FIELD}.receipt")
    if isinstance(require, str) and FINGERPRINT.fullmatch(require):
        return Asked(required=True, fingerprint=require, receipt=receipt)
    if not isinstance(require, bool):
        raise FieldError(
            f"'{FIELD}.require' takes true, false or a fingerprint (vd1- and 32 hexadecimal digits)",
            f"{FIELD}.require",
        )
    return Asked(required=require, receipt=receipt)


def check(asked: Asked, fingerprint: str | None, stopped: str | None = None) -> None:
    """Raises FieldError where the server cannot keep what is asked.

    fingerprint: None on a server without the flag. stopped: why the server has stopped to promise, where it has.
    """
    if fingerprint is None:
        if asked.required or asked.receipt:
            raise FieldError("this server promises no determinism: start it with --deterministic, or ask one that was")
    elif asked.fingerprint not in (None, fingerprint):
        raise FieldError(
            f"this server's fingerprint is {fingerprint}, the request requires {asked.fingerprint}: GET /deterministic "
            "says what it is made of",
            f"{FIELD}.require",
            409,
            "other_fingerprint",
        )
    elif stopped is not None and (asked.required or asked.receipt):
        raise FieldError(f"this server has stopped to promise determinism: {stopped}", FIELD, 503, "stopped")


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
