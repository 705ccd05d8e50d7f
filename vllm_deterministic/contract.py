"""What was asked for: the settings of one deterministic engine, as they travel inside vLLM's configuration.

They sit in `additional_config["vllm_deterministic"]`, which vLLM hands to every process, spawned or forked, and
hashes into its compile-cache key.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vllm_deterministic.errors import ConfigurationError

__all__ = ["CONFIG_KEY", "NUMERICS_VERSIONS", "UNSEEDED_MODES", "Settings", "enable"]

CONFIG_KEY = "vllm_deterministic"
NUMERICS_VERSIONS = ("v1",)
UNSEEDED_MODES = ("derived", "random")


@dataclass(frozen=True)
class Settings:
    """Settings of one engine.

    numerics: name of the frozen reduction trees.
    unseeded: what a request at T > 0 without a seed gets. "derived": a seed computed from its own content and the
        server's --seed, so identical requests give identical answers. "random": a fresh seed, returned with the answer.
    date: the day (YYYY-MM-DD) that chat templates see; without it a template that asks for the day is refused.

    Raises ConfigurationError for a value that does not exist.
    """

    numerics: str = "v1"
    unseeded: str = "derived"
    date: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("numerics", self.numerics, NUMERICS_VERSIONS),
            ("unseeded", self.unseeded, UNSEEDED_MODES),
        ):
            if value not in known:
                raise ConfigurationError(
                    f"--deterministic-{name}: {value!r} does not exist; this version knows {', '.join(known)}"
                )
        if self.date is not None:
            try:
                day = datetime.date.fromisoformat(self.date).isoformat()
            except (TypeError, ValueError):
                day = None
            if day != self.date:
                raise ConfigurationError(f"--deterministic-date: {self.date!r} is no day; write it as YYYY-MM-DD")

    def merged_into(self, additional_config: Mapping[str, Any] | None) -> dict[str, Any]:
        """A new additional_config that holds these settings beside what the user put there."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return {**(additional_config or {}), CONFIG_KEY: said}

    @classmethod
    def of(cls, additional_config: object) -> Settings | None:
        """The settings inside an additional_config; None where determinism was not asked for."""
        if not isinstance(additional_config, Mapping) or CONFIG_KEY not in additional_config:
            return None
        raw = additional_config[CONFIG_KEY]
        if raw is None or raw is False:
            return None
        if raw is True:
            raw = {}
        if not isinstance(raw, Mapping):
            raise ConfigurationError(f"additional_config[{CONFIG_KEY!r}] must be a JSON object or true, not {raw!r}")
        if unknown := sorted(set(raw) - {field.name for field in fields(cls)}):
            raise ConfigurationError(f"additional_config[{CONFIG_KEY!r}] has unknown keys: {', '.join(unknown)}")
        return cls(**raw)


def enable(
    additional_config: Mapping[str, Any] | None = None,
    *,
    numerics: str = "v1",
    unseeded: str = "derived",
    date: str | None = None,
) -> dict[str, Any]:
    """The additional_config that makes an offline engine deterministic.

    `LLM(model, additional_config=vllm_deterministic.enable())` is what `--deterministic` is to `vllm serve`. Give
    it your own additional_config, if you have one, to keep it. Raises ConfigurationError for an unknown version or
    mode.
    """
    return Settings(numerics=numerics, unseeded=unseeded, date=date).merged_into(additional_config)
