"""What this server process promises, and what one HTTP request has asked of it."""

from __future__ import annotations

import contextvars
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_deterministic.serving.fingerprint import Fingerprint
from vllm_deterministic.serving.receipts import (
    Chain,
    ChoiceReceipt,
    Prompt,
    Receipt,
    Request,
    canonical_body,
    prompt_digest,
)
from vllm_deterministic.serving.signing import Signer

__all__ = ["Promise", "Recorder", "keep", "kept", "recording"]


@dataclass(frozen=True)
class Promise:
    """The contract of a server.

    about: what GET /deterministic says besides the fingerprint and its parts. stopped: why it is not kept any more,
    where a self-check has stopped it.
    """

    fingerprint: str
    parts: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    signer: Signer | None = None
    stopped: str | None = None

    @classmethod
    def of(cls, fingerprint: Fingerprint, about: Mapping[str, Any], signer: Signer | None) -> Promise:
        return cls(str(fingerprint), fingerprint.parts, about, signer)

    @property
    def stamp(self) -> str | None:
        """What answers carry: the fingerprint, while the promise is kept."""
        return None if self.stopped else self.fingerprint

    @property
    def description(self) -> dict[str, Any]:
        """The body of GET /deterministic."""
        key = {"signing_key": self.signer.public_key} if self.signer else {}
        said = {"fingerprint": self.fingerprint, "stopped": self.stopped, "parts": dict(self.parts)}
        return {**said, **self.about, **key}


_promise: Promise | None = None


def keep(promise: Promise) -> None:
    """From now on this process answers by this promise."""
    global _promise
    _promise = promise


def kept() -> Promise | None:
    """The promise of this process; None without the flag, and while the server starts."""
    return _promise


class Recorder:
    """Takes down one request's answer as the engine gives it. alone: nobody else has asked for its logprobs."""

    alone = False

    def __init__(self, promise: Promise, path: str, body: Mapping[str, Any]) -> None:
        self._promise, self._path, self._body = promise, path, body
        self._used: Mapping[str, Any] = {}
        self._prompt: Prompt | None = None
        self._tokens: defaultdict[int, list[int]] = defaultdict(list)
        self._logprobs: defaultdict[int, list[float]] = defaultdict(list)
        self._reasons: dict[int, str] = {}
        self._expected = 0

    @property
    def begun(self) -> bool:
        return self._expected > 0

    def begin(self, choices: int) -> None:
        self._expected = choices

    def ran(self, prompt_token_ids: Sequence[int], used: Mapping[str, Any]) -> None:
        """The engine has taken the request. used: sampling parameters after defaults, by their name in the API."""
        self._prompt = Prompt(tokens=len(prompt_token_ids), digest=prompt_digest(prompt_token_ids))
        self._used = used

    def add(self, index: int, token_ids: Sequence[int], logprobs: Sequence[float], finish_reason: str | None) -> None:
        """The next tokens of a choice, and their logprobs, which may come later: with its end at the latest."""
        self._tokens[index].extend(token_ids)
        self._logprobs[index].extend(logprobs)
        if finish_reason is not None:
            self._reasons[index] = finish_reason

    def _choices(self, prompt: Prompt) -> Iterator[ChoiceReceipt]:
        for index, reason in sorted(self._reasons.items()):
            chain = Chain(prompt.digest, index)
            chain.add(self._tokens[index], self._logprobs[index])
            yield chain.finish(reason)

    def receipt(self) -> Receipt | None:
        """The receipt of a complete answer; None where a choice has not ended, or ended before its logprobs came."""
        if self._prompt is None or len(self._reasons) < self._expected:
            return None
        if any(len(self._tokens[index]) != len(self._logprobs[index]) for index in self._reasons):
            return None
        receipt = Receipt(
            fingerprint=self._promise.fingerprint,
            parts=dict(self._promise.parts),
            request=Request(path=self._path, body=canonical_body(self._body, self._used)),
            prompt=self._prompt,
            choices=list(self._choices(self._prompt)),
        )
        if (signer := self._promise.signer) is None:
            return receipt
        return receipt.model_copy(update={"signature": signer.sign(receipt.signed_bytes())})


# Set while one HTTP request that wants a receipt is handled.
recording: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recording", default=None)
