"""vLLM's entry point: `register()` runs once in every process that vLLM starts.

It wraps two functions, both of which hand through unless determinism was asked for. Everything else is patched only
where a deterministic engine is being built: the front end in `create_engine_config`, the worker in its own class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_deterministic import compat, flag, policy
from vllm_deterministic.contract import Settings
from vllm_deterministic.errors import SeamError

__all__ = ["register"]


def register() -> None:
    """Adds the flag and the policy step. Idempotent; touches no device. Without the flag it must never raise."""
    try:
        compat.install(compat.ENTRY_SEAMS["cli"], _adding_the_flag)
        compat.install(compat.ENTRY_SEAMS["config"], _applying_the_policy)
    except SeamError as reason:
        # An unknown vLLM keeps working; it just has no flag, so nobody can take it for deterministic.
        import logging

        logging.getLogger("vllm.deterministic").warning("vllm_deterministic is inactive: %s", reason)


def _adding_the_flag(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(add_cli_args)
    def wrapped(parser: Any) -> Any:
        parser = add_cli_args(parser)
        flag.add_arguments(parser)
        return parser

    return wrapped


def _applying_the_policy(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create_engine_config)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = Settings.of(self.additional_config)
        if settings is None:
            return create_engine_config(self, *args, **kwargs)
        from vllm_deterministic.integration import engine

        policy.refuse(policy.engine_refusals(engine.stated_options(self)))
        engine.prepare(self)
        config = create_engine_config(self, *args, **kwargs)
        policy.refuse(policy.resolved_refusals(engine.resolved_facts(config)))
        engine.name_scheduler(config)
        engine.arm_front_end(config, settings)
        return config

    return wrapped
