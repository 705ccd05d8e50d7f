"""Prometheus metrics of the contract. Imported by servers with the flag only: without it nothing is counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import Counter, Gauge

from vllm_deterministic.serving.field import Asked, FieldError
from vllm_deterministic.serving.self_check import RESULTS

__all__ = ["answered", "certified", "receipts", "refusals", "refused", "self_checks"]

_requests = Counter(
    "vllm_deterministic_requests",
    "Requests answered under the promise, by what they asked: nothing, require, pinned or declined.",
    ["asked"],
)
refusals = Counter(
    "vllm_deterministic_refused_requests",
    "Requests refused, by reason (malformed, receipt, other_fingerprint, stopped, not_proved, date) and by field.",
    ["reason", "field"],
)
receipts = Counter("vllm_deterministic_receipts", "Receipts given.")
certified_shapes = Gauge(
    "vllm_deterministic_certified_shapes", "Weight shapes whose schedules are certified.", multiprocess_mode="max"
)
_schedules = Gauge(
    "vllm_deterministic_schedules",
    "Schedules (on CPU: row counts of the library) found on their tree (certified) and off it (dropped).",
    ["state"],
    multiprocess_mode="max",
)
_certification = Gauge(
    "vllm_deterministic_certification_seconds",
    "What certification took at this start, cached certificates included.",
    multiprocess_mode="max",
)
self_checks = Counter("vllm_deterministic_self_checks", "Self-checks of --deterministic-self-check.", ["result"])
for _result in RESULTS:
    self_checks.labels(_result)  # zeros are told too: an alert on a difference needs a sample to begin with


def answered(asked: Asked) -> None:
    kind = "require" if asked.required else "declined" if asked.declined else "nothing"
    kind = "pinned" if asked.fingerprint else kind
    _requests.labels(kind).inc()


def refused(refusal: FieldError) -> None:
    # A client names the keys: they must not become label values.
    known = refusal.param in ("deterministic", "deterministic.require", "deterministic.receipt", "body")
    refusals.labels(refusal.reason, refusal.param if known else "deterministic.*").inc()


def certified(shapes: Iterable[Mapping[str, Any]], seconds: float) -> str:
    """Sets the gauges from the worker's report. Returns what the start-up line says of it."""
    shapes = list(shapes)
    kept, dropped = (sum(_many(shape.get(name, ())) for shape in shapes) for name in ("schedules", "dropped"))
    certified_shapes.set(len(shapes))
    _schedules.labels("certified").set(kept)
    _schedules.labels("dropped").set(dropped)
    _certification.set(seconds)
    return f"{len(shapes)} shapes, {kept} schedules certified and {dropped} dropped in {seconds:.1f} s"


def _many(schedules: Any) -> int:
    """Of names, or of row counts as inclusive intervals."""
    return sum(1 if isinstance(one, str) else one[1] - one[0] + 1 for one in schedules)
