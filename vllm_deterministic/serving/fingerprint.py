"""Numerics id and fingerprint: what an answer's bits depend on besides the request, as one short name.

The numerics id names the arithmetic: trees, instruction set, dtype, model code, compile mode, libraries. The
fingerprint adds what is computed with it: weights, tokenizer, chat template and every setting that changes an answer.
Nothing that cannot change an answer is in either of them: batch sizes, memory, ports, threads, schedules.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_deterministic.errors import ConfigurationError

__all__ = [
    "FINGERPRINT",
    "Fingerprint",
    "Numerics",
    "agree",
    "canonical",
    "differing_parts",
    "digest_of",
    "engine_parts",
]

# 128 bits: two servers that differ do not share a name by chance.
_HEX_DIGITS = 32
# Parts that the HTTP server before the engines decides.
_OF_THE_FRONT_END = ("tokenizer", "chat_template", "settings.front_end")
FINGERPRINT = re.compile(rf"vd1-[0-9a-f]{{{_HEX_DIGITS}}}")


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, ASCII. Raises TypeError for what JSON does not know and
    ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


@dataclass(frozen=True)
class Numerics:
    """The arithmetic of one server.

    version: the numerics version. trees: its trees on this device. architecture: GPU family, or CPU instruction set.
    model_code: the model's class and the digest of its source. compile_mode: compiled and eager round at other places.
    libraries: name -> version of those that bring operators of their own; equal bits across versions are not proved.
    """

    version: str
    trees: Mapping[str, Any]
    architecture: Mapping[str, Any]
    dtype: str
    model_code: Mapping[str, str]
    compile_mode: str
    libraries: Mapping[str, str]

    @property
    def id(self) -> str:
        return f"{self.version}-{digest_of(asdict(self))[:_HEX_DIGITS]}"


@dataclass(frozen=True)
class Fingerprint:
    """Everything outside the request that an answer depends on.

    weights, tokenizer, chat_template: digests. settings: name -> value of each server setting that changes an answer.
    """

    numerics: Numerics
    weights: str
    tokenizer: str
    chat_template: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Any]:
        """Name -> value of everything that the fingerprint hashes, flat, for people and for `differing_parts`."""
        return {
            "numerics_id": self.numerics.id,
            **{f"numerics.{name}": value for name, value in asdict(self.numerics).items()},
            "weights": self.weights,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            **{f"settings.{name}": value for name, value in self.settings.items()},
        }

    def __str__(self) -> str:
        return f"vd1-{digest_of(self.parts)[:_HEX_DIGITS]}"


def differing_parts(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Names of the parts in which two fingerprints differ, sorted."""
    return sorted(name for name in {*left, *right} if left.get(name) != right.get(name))


def engine_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that an engine decides, as JSON knows them."""
    decided: dict[str, Any] = {name: value for name, value in parts.items() if name not in _OF_THE_FRONT_END}
    return dict(json.loads(canonical(decided)))


def agree(server: Mapping[str, Any], engines: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigurationError where one of the engines behind a server would give other bits than the server names.

    server: the parts of its fingerprint. engines: what `engine_parts` gives of each, in the order of their ranks.
    """
    promised = engine_parts(server)
    parted = {rank: found for rank, parts in enumerate(engines) if (found := differing_parts(promised, parts))}
    if parted:
        said = "; ".join(f"rank {rank} differs in {', '.join(found)}" for rank, found in parted.items())
        raise ConfigurationError(
            f"--deterministic: the data parallel ranks do not give the same bits: {said}. Start every rank with the "
            "same options and libraries on machines of one kind, or as servers of their own"
        )
