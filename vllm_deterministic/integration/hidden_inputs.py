"""What a prompt is made of besides the request: the day, which many chat templates ask for."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_deterministic import compat
from vllm_deterministic.integration.refusals import refusal

__all__ = ["arm"]

_date: datetime.datetime | None = None


def arm(date: str | None) -> None:
    """Pins the day that chat templates see in this process, or refuses to tell one. Idempotent. Raises SeamError."""
    global _date
    _date = datetime.datetime.fromisoformat(date) if date is not None else None
    compat.install(compat.WIRE_SEAMS["chat_template"], _without_clock)
    compat.install(compat.WIRE_SEAMS["apply_chat_template"], _naming_the_parameter)


def _without_clock(compile_template: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compile_template)
    def wrapped(chat_template: str) -> Any:
        template = compile_template(chat_template)
        template.globals["strftime_now"] = _strftime
        return template

    return wrapped


def _naming_the_parameter(apply_chat_template: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever a template raises, vLLM makes a refusal of its own of it, which says no parameter."""

    @functools.wraps(apply_chat_template)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return apply_chat_template(*args, **kwargs)
        except VLLMValidationError as refused:
            if isinstance(refused.__cause__, VLLMValidationError):
                raise refused.__cause__ from None
            raise

    return wrapped


def _strftime(form: str) -> str:
    if _date is None:
        raise refusal(
            "the chat template puts today's date into the prompt, so tomorrow's answer would be another: start the "
            "server with --deterministic-date YYYY-MM-DD",
            parameter="messages",
            reason="date",
        )
    return _date.strftime(form)
