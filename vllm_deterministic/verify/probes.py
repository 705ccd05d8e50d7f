"""Probes: one request asked again and again while others are served, and what its answers have in common.

Talks to any OpenAI endpoint through the `openai` client. Equality means equality: JSON carries every float as the
shortest text that reads back to the same bits, so logprobs are compared bit for bit, never with a tolerance.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import openai

__all__ = [
    "Answer",
    "Comparison",
    "Endpoint",
    "Probe",
    "ask",
    "by_choice",
    "compare",
    "digest",
    "hang_up",
    "neighbour",
    "run_load",
    "score",
]

SEED_HEADER = "x-vllm-deterministic-seed"
_USUAL = openai.DEFAULT_CONNECTION_LIMITS
# Client and vLLM both give up a connection that was idle for five seconds: a request on its way at that moment would
# fail. Here the client is the first to.
_LIMITS = type(_USUAL)(
    max_connections=_USUAL.max_connections,
    max_keepalive_connections=_USUAL.max_keepalive_connections,
    keepalive_expiry=1.0,
)


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI endpoint. token_ids: ask for token ids, which vLLM offers and other servers may refuse."""

    base_url: str
    model: str
    api_key: str = "EMPTY"
    timeout: float = 600.0
    token_ids: bool = True

    def client(self) -> openai.AsyncOpenAI:
        """A client that never retries: a request that failed once is a result, not an accident."""
        # A proxy named by the environment cannot reach the loopback interface of this machine.
        here = urlsplit(self.base_url).hostname in ("127.0.0.1", "localhost", "::1")
        return openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.api_key,
            timeout=self.timeout,
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not here, limits=_LIMITS),
        )


@dataclass(frozen=True)
class Probe:
    """One request. `prompt` is text or token ids; with `messages` (or chat=True) it goes to the chat endpoint.

    logprobs: number of top logprobs; 0 asks for those of the chosen tokens alone, None for none.
    Hand `extra_body` what the OpenAI API does not know (top_k, min_p, ignore_eos, prompt_logprobs …).
    """

    name: str
    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    seed: int | None = None
    top_p: float | None = None
    n: int = 1
    logprobs: int | None = 1
    stream: bool = False
    chat: bool = False
    stop: Sequence[str] | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def request(self, endpoint: Endpoint) -> dict[str, Any]:
        """The keyword arguments of the client's `create`."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError(f"probe {self.name!r} needs a prompt or messages, and not both")
        body: dict[str, Any] = {"model": endpoint.model, "temperature": self.temperature, "n": self.n}
        body |= {key: value for key in ("seed", "top_p") if (value := getattr(self, key)) is not None}
        if self.stop is not None:
            body["stop"] = list(self.stop)
        if self.stream:
            body["stream"] = True
        body["max_tokens"] = self.max_tokens
        if self.is_chat:
            if self.messages is None and not isinstance(self.prompt, str):
                raise ValueError(f"probe {self.name!r}: the chat endpoint takes no token ids")
            body["messages"] = list(self.messages or [{"role": "user", "content": self.prompt}])
            if self.logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": self.logprobs}
        else:
            body["prompt"] = self.prompt if isinstance(self.prompt, str) else list(self.prompt or ())
            if self.logprobs is not None:
                body["logprobs"] = self.logprobs
        extensions = {"return_token_ids": True} if endpoint.token_ids else {}
        if extra := {**extensions, **self.extra_body}:
            body["extra_body"] = extra
        return body

    @property
    def is_chat(self) -> bool:
        return self.chat or self.messages is not None


@dataclass(frozen=True)
class Answer:
    """One choice of one response. Fields that the endpoint did not send are empty.

    tokens: their text as the logprobs name it. top_logprobs: per token its (token, logprob) pairs, by token.
    seeds: those that a deterministic server drew for the request, from its response header.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[str, float], ...], ...] = ()
    finish_reason: str | None = None
    index: int = 0
    prompt_token_ids: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def steps(self) -> tuple[Any, ...]:
        """The answer as a sequence: token ids where known, else token texts, else characters."""
        return self.token_ids or self.tokens or tuple(self.text)

    @property
    def logprob_bits(self) -> tuple[str, ...]:
        return tuple(value.hex() for value in self.logprobs)


@dataclass(frozen=True)
class Comparison:
    """What the answers of one probe have in common.

    first_text_divergence, first_logprob_divergence: the earliest position (counted in tokens from 0) where any answer
    differs from the first one; None where all agree.
    """

    runs: int
    distinct_texts: int
    distinct_tokens: int
    distinct_logprobs: int
    distinct_digests: int
    first_text_divergence: int | None
    first_logprob_divergence: int | None

    @property
    def identical(self) -> bool:
        """Whether every answer has the same bits: text, tokens, logprobs, top logprobs, reason of its end."""
        return self.distinct_digests == 1


def digest(answer: Answer) -> str:
    """sha256 of everything in an answer that the prompt, the weights and the seed decide; not its choice index."""
    content = [
        answer.text,
        answer.token_ids,
        answer.tokens,
        answer.logprob_bits,
        [[(token, value.hex()) for token, value in step] for step in answer.top_logprobs],
        answer.finish_reason,
    ]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def compare(answers: Sequence[Answer]) -> Comparison:
    """Compares answers to one request. Raises ValueError for none, or for different choices of n > 1 in one list."""
    if not answers:
        raise ValueError("no answers to compare")
    if len({answer.index for answer in answers}) > 1:
        raise ValueError("choices of n > 1 differ by right: compare them one index at a time (by_choice)")
    return Comparison(
        runs=len(answers),
        distinct_texts=len({answer.text for answer in answers}),
        distinct_tokens=len({answer.steps for answer in answers}),
        distinct_logprobs=len({answer.logprob_bits for answer in answers}),
        distinct_digests=len({digest(answer) for answer in answers}),
        first_text_divergence=_first_divergence([answer.steps for answer in answers]),
        first_logprob_divergence=_first_divergence([answer.logprob_bits for answer in answers]),
    )


def by_choice(answers: Sequence[Answer]) -> dict[int, list[Answer]]:
    """The answers of each choice index."""
    choices: dict[int, list[Answer]] = {}
    for answer in answers:
        choices.setdefault(answer.index, []).append(answer)
    return dict(sorted(choices.items()))


def _first_divergence(sequences: Sequence[Sequence[Any]]) -> int | None:
    first = sequences[0]
    found = []
    for other in sequences[1:]:
        if other == first:
            continue
        shared = min(len(first), len(other))
        found.append(next((at for at in range(shared) if first[at] != other[at]), shared))
    return min(found, default=None)


async def ask(endpoint: Endpoint, probe: Probe, client: openai.AsyncOpenAI | None = None) -> list[Answer]:
    """Sends the probe once; its choices in the order of their index. Raises openai.APIStatusError for a refusal."""
    if client is None:
        async with endpoint.client() as own:
            return await ask(endpoint, probe, own)
    service: Any = client.chat.completions if probe.is_chat else client.completions
    raw = await service.with_raw_response.create(**probe.request(endpoint))
    seeds = tuple(int(seed) for seed in raw.headers.get(SEED_HEADER, "").split(",") if seed)
    response = raw.parse()
    parts: dict[int, _Part] = {}
    prompt_ids: list[int] = []
    async for piece in _pieces(response, probe.stream):
        prompt_ids = prompt_ids or list(_extra(piece, "prompt_token_ids") or ())
        for choice in piece.choices:
            prompt_ids = prompt_ids or list(_extra(choice, "prompt_token_ids") or ())
            parts.setdefault(choice.index, _Part()).add(choice, probe)
    return [part.answer(index, tuple(prompt_ids), seeds) for index, part in sorted(parts.items())]


async def hang_up(endpoint: Endpoint, probe: Probe, after_chunks: int, client: openai.AsyncOpenAI) -> None:
    """Streams the probe's answer and closes the connection after some chunks, as a user who has seen enough does."""
    service: Any = client.chat.completions if probe.is_chat else client.completions
    async with await service.create(**replace(probe, stream=True).request(endpoint)) as stream:
        read = 0
        async for _ in stream:
            read += 1
            if read >= after_chunks:
                return


async def _pieces(response: Any, stream: bool) -> Any:
    if not stream:
        yield response
        return
    async for chunk in response:
        yield chunk


def _extra(thing: Any, name: str) -> Any:
    return getattr(thing, name, None)


@dataclass
class _Part:
    """One choice while it arrives, whole or in chunks."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[str, float], ...]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, choice: Any, probe: Probe) -> None:
        if probe.is_chat:
            said = choice.delta if probe.stream else choice.message
            self.text.append(said.content or "")
            for entry in (choice.logprobs.content or ()) if choice.logprobs else ():
                self.tokens.append(entry.token)
                self.logprobs.append(entry.logprob)
                self.tops.append(tuple(sorted((top.token, top.logprob) for top in entry.top_logprobs)))
        else:
            self.text.append(choice.text or "")
            if choice.logprobs is not None:
                self.tokens.extend(choice.logprobs.tokens or ())
                self.logprobs.extend(choice.logprobs.token_logprobs or ())
                self.tops.extend(tuple(sorted((top or {}).items())) for top in choice.logprobs.top_logprobs or ())
        self.token_ids.extend(_extra(choice, "token_ids") or ())
        self.finish_reason = choice.finish_reason or self.finish_reason

    def answer(self, index: int, prompt_token_ids: tuple[int, ...], seeds: tuple[int, ...]) -> Answer:
        return Answer(
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            top_logprobs=tuple(self.tops),
            finish_reason=self.finish_reason,
            index=index,
            prompt_token_ids=prompt_token_ids,
            seeds=seeds,
        )


_WORDS = (
    "river mountain seven careful engine yellow window ancient paper morning because engineer listens quiet table "
    "between market planet winter seldom copper garden music letter follows bright number under silver question"
).split()


def neighbour(rng: random.Random, longest_words: int = 200, longest_answer: int = 40) -> Probe:
    """A request that is there to be in the way: length, sampling and delivery vary.

    It brings no seed: vLLM's CPU runner without the plugin dies of a seeded request whose prefill is chunked.
    """
    words = rng.choice((1, 5, 20, 60, longest_words))
    sampled = rng.random() < 0.6
    extra: dict[str, Any] = {"ignore_eos": True}
    if sampled and rng.random() < 0.5:
        extra["top_k"] = rng.choice((1, 5, 50))
    if rng.random() < 0.3:
        extra["repetition_penalty"] = 1.1
    return Probe(
        name="neighbour",
        prompt=" ".join(rng.choices(_WORDS, k=rng.randint(1, words))),
        max_tokens=rng.randint(1, longest_answer),
        temperature=rng.choice((0.5, 0.8, 1.0, 1.5)) if sampled else 0.0,
        top_p=rng.choice((None, 0.5, 0.95)) if sampled else None,
        logprobs=rng.choice((None, 1, 5)),
        stream=rng.random() < 0.5,
        extra_body=extra,
    )


async def run_load(
    endpoint: Endpoint,
    probe: Probe,
    repeats: int = 16,
    concurrency: int = 4,
    neighbours: int = 48,
    *,
    seed: int = 0,
    longest_words: int = 200,
) -> list[Answer]:
    """Asks the probe `repeats` times, `concurrency` copies at once, each group among 1 to `neighbours` other requests.

    The numbers of neighbours, what they ask and when they arrive come from `seed`. Returns every choice of every
    repeat. neighbours=0: the copies are each other's only company. Raises the first error of any request.
    """
    rng = random.Random(seed)
    answers: list[Answer] = []
    async with endpoint.client() as client:
        done = 0
        while done < repeats:
            copies = min(concurrency, repeats - done)
            # The fullest group first, then the emptiest, then anything between.
            count = {0: neighbours, 1: min(1, neighbours)}.get(
                done // concurrency, rng.randint(min(1, neighbours), neighbours)
            )
            jobs: list[Probe] = [neighbour(rng, longest_words) for _ in range(count)] + [probe] * copies
            rng.shuffle(jobs)
            tasks = [asyncio.create_task(_later(rng.random() * 0.2, endpoint, job, client)) for job in jobs]
            try:
                results = await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                raise
            answers += [one for job, result in zip(jobs, results, strict=True) if job is probe for one in result]
            done += copies
    return answers


async def _later(delay: float, endpoint: Endpoint, probe: Probe, client: openai.AsyncOpenAI) -> list[Answer]:
    await asyncio.sleep(delay)
    return await ask(endpoint, probe, client)


async def score(endpoint: Endpoint, prompt_token_ids: Sequence[int], generated_ids: Sequence[int]) -> tuple[float, ...]:
    """The logprobs of `generated_ids` when they are read as part of the prompt (vLLM's `prompt_logprobs`).

    On a deterministic server they have the bits that they had when they were generated.
    """
    ids = [*prompt_token_ids, *generated_ids]
    async with endpoint.client() as client:
        response = await client.completions.create(
            model=endpoint.model, prompt=ids, max_tokens=1, temperature=0.0, extra_body={"prompt_logprobs": 0}
        )
    rows = _extra(response.choices[0], "prompt_logprobs")
    if rows is None or len(rows) != len(ids):
        raise ValueError("the endpoint offers no prompt_logprobs")
    start = len(prompt_token_ids)
    return tuple(float(rows[start + at][str(token)]["logprob"]) for at, token in enumerate(generated_ids))
