"""Receipts: what was asked, on what, and digests of every bit of the answer, chained token by token.

A receipt holds no answer. Whoever has the answer's token ids and logprobs can check them against it, and whoever has
a server can repeat the request (`vllm-deterministic replay`). The schema is docs/receipt.schema.json.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_deterministic.serving.fingerprint import canonical

__all__ = [
    "MAX_REQUEST_BYTES",
    "Chain",
    "ChoiceReceipt",
    "Divergence",
    "Prompt",
    "Receipt",
    "Request",
    "Signature",
    "canonical_body",
    "first_divergence",
    "prompt_digest",
]

# A receipt repeats the request: a larger one gets none.
MAX_REQUEST_BYTES = 1 << 20
_LINK_BYTES = 8
# What vLLM's JSON says for a logprob of -inf; JSON has no infinities.
_LOWEST_LOGPROB = -9999.0
_int64, _float32 = struct.Struct("<q").pack, struct.Struct("<f").pack


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompt(_Record):
    """The prompt as the model read it."""

    tokens: int = Field(ge=0)
    digest: str = Field(description="sha256 of the token ids, each as 8 bytes, little-endian")


class ChoiceReceipt(_Record):
    """One choice. Chains have a link per token: the first 16 hexadecimal digits of sha256(previous digest + token)."""

    index: int = Field(ge=0)
    tokens: int = Field(ge=0)
    finish_reason: str
    token_chain: list[str] = Field(description="links over the token ids, each as 8 bytes, little-endian")
    logprob_chain: list[str] = Field(
        description="links over the logprobs of the tokens, each as the 4 bytes of its float32, little-endian"
    )
    digest: str = Field(description="sha256 of both chains' last digests and the finish reason")


class Request(_Record):
    """The request that gives this answer: the client's body, its defaults filled in, with the seed that was used."""

    path: str = Field(pattern="^/v1/(chat/)?completions$")
    body: dict[str, Any]


class Signature(_Record):
    """Of the canonical JSON (sorted keys, no spaces, ASCII) of the receipt without this field."""

    algorithm: Literal["ed25519"] = "ed25519"
    public_key: str = Field(description="32 bytes, hexadecimal")
    value: str = Field(description="64 bytes, hexadecimal")


class Receipt(_Record):
    """What one answer is bound to."""

    version: Literal["1"] = "1"
    fingerprint: str = Field(description="of the server, vd1-…")
    parts: dict[str, Any] = Field(description="what the fingerprint is the hash of; numerics_id and weights among them")
    request: Request
    prompt: Prompt
    choices: list[ChoiceReceipt]
    signature: Signature | None = None

    def as_json(self) -> dict[str, Any]:
        """The receipt as it goes over the wire: everything, nulls in the request included; no signature where none."""
        return self.model_dump(exclude={"signature"} if self.signature is None else None)

    def signed_bytes(self) -> bytes:
        """What a signature is of."""
        return canonical(self.model_dump(exclude={"signature"}))


def prompt_digest(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}q", *token_ids)).hexdigest()


class Chain:
    """A choice's chains while it is generated. Both start from the prompt's digest: an answer belongs to its prompt."""

    def __init__(self, prompt: str, index: int) -> None:
        self._index = index
        first = hashlib.sha256(f"{prompt} {index}".encode()).digest()
        self._tokens, self._logprobs = [first], [first]

    def add(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Adds the next tokens. Raises ValueError for another number of logprobs than of tokens."""
        if len(token_ids) != len(logprobs):
            raise ValueError(f"{len(token_ids)} tokens and {len(logprobs)} logprobs")
        _lengthen(self._tokens, map(_int64, token_ids))
        _lengthen(self._logprobs, map(_float32, [max(logprob, _LOWEST_LOGPROB) for logprob in logprobs]))

    def finish(self, reason: str) -> ChoiceReceipt:
        whole = hashlib.sha256(self._tokens[-1] + self._logprobs[-1] + reason.encode())
        return ChoiceReceipt(
            index=self._index,
            tokens=len(self._tokens) - 1,
            finish_reason=reason,
            token_chain=_links(self._tokens),
            logprob_chain=_links(self._logprobs),
            digest=whole.hexdigest(),
        )


def _lengthen(digests: list[bytes], items: Iterable[bytes]) -> None:
    sha256, last = hashlib.sha256, digests[-1]
    for item in items:
        last = sha256(last + item).digest()
        digests.append(last)


def _links(digests: list[bytes]) -> list[str]:
    return [digest[:_LINK_BYTES].hex() for digest in digests[1:]]


class Divergence(_Record):
    """Where two choices part. what: "tokens", "logprobs", "length" or "finish_reason"."""

    index: int
    position: int
    what: str


def first_divergence(left: ChoiceReceipt, right: ChoiceReceipt) -> Divergence | None:
    """The first position, counted in tokens from 0, at which two choices differ; None where every bit is the same."""
    if left.digest == right.digest:
        return None
    shared = min(left.tokens, right.tokens)
    for position in range(shared):
        for what in ("token", "logprob"):
            chains: list[list[str]] = [getattr(choice, f"{what}_chain") for choice in (left, right)]
            if chains[0][position] != chains[1][position]:
                return Divergence(index=left.index, position=position, what=f"{what}s")
    what = "length" if left.tokens != right.tokens else "finish_reason"
    return Divergence(index=left.index, position=shared, what=what)


def canonical_body(body: Mapping[str, Any], used: Mapping[str, Any]) -> dict[str, Any]:
    """The client's body without what says only how the answer is delivered, with the sampling that was `used`."""
    kept = {name: value for name, value in body.items() if name not in _DELIVERY}
    return kept | {name: value for name, value in used.items() if value is not None}


_DELIVERY = frozenset(
    "deterministic stream stream_options stream_interval user request_id session_id priority cache_salt metadata store "
    "service_tier return_token_ids return_token_offsets return_prompt_text return_tokens_as_token_ids "
    "safety_identifier prompt_cache_key".split()
)
