"""Refusals that vLLM answers with HTTP 400: counted where they are made."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_deterministic.serving import metrics

__all__ = ["refusal"]


def refusal(message: str, parameter: str, reason: str, value: Any = None) -> VLLMValidationError:
    """The error to raise, already counted under `reason` and the field `parameter`."""
    metrics.refusals.labels(reason, parameter).inc()
    return VLLMValidationError(message, parameter=parameter, value=value)
