"""Asks any OpenAI endpoint whether it is deterministic. `probes` is the one engine every test and tool calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_deterministic.verify.report import Report
    from vllm_deterministic.verify.runner import verify, verify_async

__all__ = ["Report", "verify", "verify_async"]


def __getattr__(name: str) -> Any:
    # The HTTP client takes a second to import; pytest imports this package through its plugin at every start.
    if name in ("verify", "verify_async"):
        from vllm_deterministic.verify import runner

        return getattr(runner, name)
    if name == "Report":
        from vllm_deterministic.verify.report import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
