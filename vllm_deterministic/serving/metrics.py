"""Prometheus metrics of the contract. Imported by servers with the flag only: without it nothing is counted."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from vllm_deterministic.serving.field import Asked, FieldError

__all__ = ["answered", "certified_shapes", "receipts", "refusals", "refused"]

_requests = Counter(
    "vllm_deterministic_requests",
    "Requests answered under the promise, by what they asked: nothing, require, pinned or declined.",
    ["asked"],
)
refusals = Counter(
    "vllm_deterministic_refused_requests", "Requests refused, by status and by the field at fault.", ["status", "field"]
)
receipts = Counter("vllm_deterministic_receipts", "Receipts given.")
certified_shapes = Gauge(
    "vllm_deterministic_certified_shapes", "Weight shapes whose schedules are certified.", multiprocess_mode="max"
)


def answered(asked: Asked) -> None:
    kind = "require" if asked.required else "declined" if asked.declined else "nothing"
    kind = "pinned" if asked.fingerprint else kind
    _requests.labels(kind).inc()


def refused(refusal: FieldError) -> None:
    # A client names the keys: they must not become label values.
    known = refusal.param in ("deterministic", "deterministic.require", "deterministic.receipt", "body")
    refusals.labels(str(refusal.status), refusal.param if known else "deterministic.*").inc()
