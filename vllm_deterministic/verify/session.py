"""One endpoint under examination: every request passes here, so bounds, retries and counts hold for all of them."""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import openai

from vllm_deterministic.errors import DeterministicError
from vllm_deterministic.verify.probes import Answer, Endpoint, Probe, ask, hang_up

__all__ = [
    "Asker",
    "BoundReached",
    "Bounds",
    "Broken",
    "Counts",
    "EndpointError",
    "Refused",
    "Session",
    "TransportError",
    "cause_of",
    "message_of",
    "tokens_of",
]

# Where a stream breaks off, the client hands through the error of the library below it: httpx, or what came after it.
_below = next(base for base in openai.DefaultAsyncHttpxClient.__mro__ if not base.__module__.startswith("openai"))
TransportError: type[Exception] = importlib.import_module(_below.__module__.partition(".")[0]).HTTPError

BUSY = (429, 503)
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
LOST_CONNECTIONS = 2


class EndpointError(DeterministicError, RuntimeError):
    """The endpoint cannot be examined: wrong URL, key or model. The message says what to change."""


class Refused(Exception):
    """The endpoint said no to this kind of request (HTTP 4xx, 501). Its family cannot tell."""


class Broken(Exception):
    """No answer: a lost connection, a server error, something that is no completion. Says nothing about equality."""


class BoundReached(Exception):
    """--max-requests, --max-seconds or the first difference under fail_fast: the run ends here, in order."""


@dataclass
class Bounds:
    """Limits of a whole run, shared by its sessions. None: no limit."""

    max_requests: int | None = None
    max_seconds: float | None = None
    retries: int = 8
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float | None:
        return None if self.max_seconds is None else self.max_seconds - (time.monotonic() - self.started)


@dataclass
class Counts:
    """What a run has sent and received, over all its sessions."""

    requests: int = 0
    answers: int = 0
    neighbours: int = 0
    tokens: int = 0
    compared: int = 0
    retries: int = 0
    errors: int = 0
    in_flight: int = 0
    most_in_flight: int = 0


class Asker(Protocol):
    """On whose behalf requests are sent."""

    requests: int


class Session:
    """A client of one endpoint, for `async with`. `moved` is called whenever a request has come back."""

    def __init__(
        self, endpoint: Endpoint, bounds: Bounds, counts: Counts, label: str, moved: Callable[[], None] = lambda: None
    ) -> None:
        self.endpoint, self.bounds, self.counts, self.label = endpoint, bounds, counts, label
        self.client = endpoint.client()
        self.asker: Asker | None = None
        self._moved = moved

    def counting(self, asker: Asker) -> Session:
        """The same session, whose requests count as those of `asker` too."""
        one = copy.copy(self)
        one.asker = asker
        return one

    def sent(self) -> None:
        """Counts a request."""
        self.counts.requests += 1
        if self.asker is not None:
            self.asker.requests += 1

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.close()

    async def ask(self, probe: Probe, *, abort_after: int | None = None) -> tuple[list[Answer], float]:
        """Every choice of the answer, and the seconds it took.

        abort_after: read this many chunks of a stream, hang up and return no answers.
        Raises BoundReached, Refused or Broken.
        """
        wait = FIRST_WAIT
        for attempt in range(self.bounds.retries + 1):
            self._check_bounds()
            self.sent()
            self.counts.in_flight += 1
            self.counts.most_in_flight = max(self.counts.most_in_flight, self.counts.in_flight)
            start = time.perf_counter()
            try:
                if abort_after is not None:
                    await hang_up(self.endpoint, probe, abort_after, self.client)
                    return [], time.perf_counter() - start
                answers = await ask(self.endpoint, probe, self.client)
            except openai.APIStatusError as error:
                if error.status_code in BUSY and attempt < self.bounds.retries:
                    self.counts.retries += 1
                    await asyncio.sleep(min(_retry_after(error) or wait, LONGEST_WAIT))
                    wait *= 2
                    continue
                self._raise(error)
            except openai.APIConnectionError as error:
                # A kept-alive connection that the server has closed meanwhile: asked again, as browsers do.
                if attempt < LOST_CONNECTIONS and not isinstance(error, openai.APITimeoutError):
                    self.counts.retries += 1
                    continue
                self.counts.errors += 1
                raise Broken(f"no answer from {self.endpoint.base_url}: {cause_of(error)}") from error
            except (openai.APIError, TransportError) as error:
                self.counts.errors += 1
                raise Broken(f"the answer broke off: {error}") from error
            except (AttributeError, TypeError, KeyError, ValueError) as error:
                # A server of something else: the client hands through whatever JSON or text it got.
                self.counts.errors += 1
                raise Broken(f"the answer is no OpenAI completion ({error})") from error
            finally:
                self.counts.in_flight -= 1
                self._moved()
            if not answers:
                raise Broken("the answer has no choices")
            self.counts.tokens += sum(tokens_of(answer) for answer in answers)
            return answers, time.perf_counter() - start
        raise AssertionError("the last attempt returns or raises")

    def _check_bounds(self) -> None:
        bounds = self.bounds
        if bounds.max_requests is not None and self.counts.requests >= bounds.max_requests:
            raise BoundReached(f"stopped by --max-requests {bounds.max_requests}")
        if bounds.seconds_left is not None and bounds.seconds_left <= 0:
            raise BoundReached(f"stopped by --max-seconds {bounds.max_seconds:g}")

    def _raise(self, error: openai.APIStatusError) -> None:
        said = f"HTTP {error.status_code}: {message_of(error)}"
        if error.status_code in (401, 403):
            raise EndpointError(
                f"{self.endpoint.base_url} refuses the API key ({said}). Put the key into an environment variable and "
                "name it with --api-key-env NAME"
            ) from error
        if (error.status_code < 500 and error.status_code not in (408, *BUSY)) or error.status_code == 501:
            raise Refused(said) from error
        self.counts.errors += 1
        raise Broken(said) from error


def tokens_of(answer: Answer) -> int:
    """Number of tokens, estimated at four characters each where the endpoint names none."""
    return len(answer.token_ids or answer.tokens) or -(-len(answer.text) // 4)


def message_of(error: openai.APIStatusError) -> str:
    """What the server said, in one line."""
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error", body)
        body = inner.get("message", inner) if isinstance(inner, dict) else inner
    text = body if isinstance(body, str) else json.dumps(body) if body is not None else error.response.text
    text = " ".join(text.split()) or error.response.reason_phrase
    return text if len(text) <= 300 else text[:299] + "…"


def cause_of(error: openai.APIConnectionError) -> str:
    """What broke the connection, in words even where the cause brings none."""
    cause = error.__cause__ or error
    return str(cause) or type(cause).__name__


def _retry_after(error: openai.APIStatusError) -> float | None:
    try:
        return max(0.0, float(error.response.headers.get("retry-after", "")))
    except ValueError:
        return None
