"""The probe families: each varies one thing that must not change an answer, and collects answers that must agree."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from vllm_deterministic.verify.context import Context
from vllm_deterministic.verify.probes import Probe, score
from vllm_deterministic.verify.session import Broken, Refused

__all__ = ["FAMILIES", "REQUIRED", "CannotTell", "Family"]


class CannotTell(Exception):
    """The endpoint lacks what this family needs. The message says what."""


@dataclass(frozen=True)
class Family:
    """One axis: what it varies, what it compares, and how it asks.

    run: asks and fills the context's cases. Raises CannotTell or Refused where the endpoint cannot serve it.
    """

    name: str
    title: str
    varies: str
    compares: str
    run: Callable[[Context], Awaitable[None]]


BITS = "text, tokens, logprobs and top logprobs, bit by bit"
SCORES = "tokens and logprobs"


async def _repeat(ctx: Context) -> None:
    for kind in ctx.kinds:
        case = ctx.case(kind, ctx.probe(kind, ctx.text(40)))
        for number in range(ctx.level.repeats):
            await ctx.ask(case, f"alone, time {number + 1}")


async def _batch(ctx: Context) -> None:
    cases = [ctx.case(kind, ctx.probe(kind, ctx.text(60))) for kind in ctx.kinds]
    for case in cases:
        await ctx.ask(case, "alone")
        await ctx.ask(case, "alone")
    for crowd in ctx.level.crowds:
        await ctx.together(
            [(case, f"among {crowd} neighbours", None) for case in cases], [ctx.neighbour() for _ in range(crowd)]
        )
    for case in cases:
        await ctx.ask(case, "alone again")


async def _burst(ctx: Context) -> None:
    for kind in ctx.kinds[:2]:
        case = ctx.case(kind, ctx.probe(kind, ctx.text(30)))
        await ctx.ask(case, "alone")
        for copies in (2, ctx.level.burst // 2, ctx.level.burst):
            await ctx.together([(case, f"{copies} copies at once", None)] * copies, spread=0.0)


async def _order(ctx: Context) -> None:
    cases = []
    for number in range(6):
        kind = ctx.kinds[number % len(ctx.kinds)]
        probe = ctx.probe(kind, ctx.text(10 + 15 * number), max_tokens=ctx.level.tokens // 2 + 3 * number)
        cases.append(ctx.case(f"{kind} {number + 1}", probe))
    for number in range(ctx.level.orders):
        # together() shuffles; the spread changes who meets whom in a step.
        await ctx.together([(case, f"order {number + 1}", None) for case in cases], spread=0.3 * number)


def _salted(probe: Probe, salt: str) -> Probe:
    return dataclasses.replace(probe, extra_body={**probe.extra_body, "cache_salt": salt})


def _salt() -> str:
    return uuid.uuid4().hex


# Caches keep whole pages of 16 to 128 tokens. With one token more than whole pages, a full hit computes a single row,
# as a decode does, where engines without care take another path than for many rows.
LARGEST_PAGE = 128


async def _prefix(ctx: Context) -> None:
    tokens = ctx.level.tokens // 2
    for kind in ctx.kinds[:2]:
        beginning, rest = ctx.text(ctx.level.long_words // 2), ctx.text(ctx.level.long_words // 2)
        probe = ctx.probe(kind, f"{beginning} {rest}", max_tokens=tokens)
        if not ctx.can.salts or ctx.can.use_chat:
            await _prefix_of_text(ctx, kind, probe, rest)
            continue
        (answer, *_), _ = await ctx.session.ask(_salted(dataclasses.replace(probe, max_tokens=1), _salt()))
        ids = list(answer.prompt_token_ids)
        ids = ids[: (len(ids) - 1) // LARGEST_PAGE * LARGEST_PAGE + 1] if len(ids) > LARGEST_PAGE else ids
        probe = dataclasses.replace(probe, prompt=ids)
        case = ctx.case(kind, probe)
        salt = _salt()
        for condition in ("cold", "hit", "hit again"):
            await ctx.ask(case, condition, _salted(probe, salt))
        await ctx.ask(case, "cold once more", _salted(probe, _salt()))
        # The cache then holds the first half, or a prompt that differs in one token: from there on its pages are wrong.
        half = [*ids[: len(ids) // 2], *ids[: len(ids) // 4]]
        for condition, before in [
            ("half of it cached", half),
            *(("after a prompt that differs in one token", twin) for twin in _twins(ctx, ids)),
        ]:
            salt = _salt()
            await ctx.session.ask(_salted(dataclasses.replace(probe, prompt=before, max_tokens=1), salt))
            await ctx.ask(case, condition, _salted(probe, salt))

    if longest := await _longest(ctx):
        case = ctx.case("longest prompt", ctx.probe("greedy", longest, max_tokens=tokens))
        salt = _salt()
        for condition in ("cold", "hit"):
            await ctx.ask(case, condition, _salted(case.probe, salt))
        await ctx.ask(case, "cold once more", _salted(case.probe, _salt()))


async def _longest(ctx: Context) -> list[int]:
    """A prompt of the level's longest length, as far as the context allows; empty where no token ids are known."""
    if not ctx.can.salts or ctx.can.use_chat or ctx.can.max_model_len is None:
        return []
    room = min(ctx.level.longest, ctx.can.max_model_len - 2 * ctx.level.tokens)
    whole = (room - 1) // LARGEST_PAGE * LARGEST_PAGE + 1
    if whole <= LARGEST_PAGE:
        return []
    (answer, *_), _ = await ctx.session.ask(ctx.probe("greedy", ctx.text(60), max_tokens=1))
    known = list(answer.prompt_token_ids)
    return [*known, *ctx.rng.choices(known, k=whole)][:whole]


async def _prefix_of_text(ctx: Context, kind: str, probe: Probe, rest: str) -> None:
    """Without salts a prompt is cold once only: another one is first met with half of it cached."""
    case = ctx.case(f"{kind}, whole", probe)
    for condition in ("cold", "hit", "hit again"):
        await ctx.ask(case, condition)
    beginning = ctx.text(ctx.level.long_words // 2)
    await ctx.session.ask(dataclasses.replace(probe, prompt=f"{beginning} What comes next?", max_tokens=1))
    case = ctx.case(f"{kind}, partly", dataclasses.replace(probe, prompt=f"{beginning} {rest}"))
    await ctx.ask(case, "half of it cached")
    await ctx.ask(case, "hit")


def _twins(ctx: Context, prompt: Sequence[int]) -> list[list[int]]:
    """Copies of a tokenised prompt with one token changed, near its beginning, middle and end."""
    found = []
    for low, high in ((0.1, 0.3), (0.4, 0.6), (0.7, 0.9)) if len(set(prompt)) > 1 else ():
        at = ctx.rng.randint(int(low * len(prompt)), int(high * len(prompt)))
        # Another token of the same prompt: it exists in every vocabulary.
        other = ctx.rng.choice([token for token in prompt if token != prompt[at]])
        found.append([*prompt[:at], other, *prompt[at + 1 :]])
    return found


async def _chunks(ctx: Context) -> None:
    probe = ctx.probe(ctx.kinds[-1], ctx.text(ctx.level.long_words), max_tokens=ctx.level.tokens // 2)
    case = ctx.case("long prompt", probe)

    def cold() -> Probe | None:
        return _salted(probe, _salt()) if ctx.can.salts else None

    await ctx.ask(case, "alone")
    for crowd in (2, min(8, ctx.level.crowds[-1])):
        # Long neighbours share the step's token budget, short ones decode beside the prefill.
        long = [
            ctx.neighbour(prompt=ctx.text(ctx.level.long_words * 2 // 3), max_tokens=4, logprobs=None)
            for _ in range(crowd // 2)
        ]
        short = [ctx.neighbour(max_tokens=ctx.level.tokens, logprobs=None) for _ in range(crowd - crowd // 2)]
        await ctx.together([(case, f"among {crowd}, half of them long", cold())], long + short, spread=0.5)
    await ctx.ask(case, "alone again", cold())


async def _stream(ctx: Context) -> None:
    for kind in ctx.kinds[:2]:
        probe = ctx.probe(kind, ctx.text(40))
        case = ctx.case(kind, probe)
        streamed = dataclasses.replace(probe, stream=True)
        await ctx.ask(case, "whole")
        await ctx.ask(case, "streamed", streamed)
        await ctx.ask(case, "whole")
        await ctx.together([(case, "streamed among neighbours", streamed)], [ctx.neighbour() for _ in range(3)])


async def _chat(ctx: Context) -> None:
    if not ctx.can.chat.offered:
        raise CannotTell(f"no chat endpoint: {ctx.can.chat.refusal}")
    cases = [ctx.case(kind, ctx.probe(kind, ctx.text(40), chat=True)) for kind in ctx.kinds[:2]]
    for case in cases:
        await ctx.ask(case, "alone")
    for crowd in ctx.level.crowds[1::2]:
        await ctx.together(
            [(case, f"among {crowd} neighbours", None) for case in cases], [ctx.neighbour() for _ in range(crowd)]
        )


async def _endpoints(ctx: Context) -> None:
    if not (ctx.can.chat.offered and ctx.can.completions.offered):
        raise CannotTell("the endpoint has one of the two APIs only")
    for kind in ctx.kinds[:2]:
        probe = ctx.probe(kind, ctx.text(40), chat=True)
        # The two list top logprobs, and name tokens, in different shapes.
        case = ctx.case(kind, probe, ignoring=("top_logprobs", "tokens"))
        (spoken, *_) = await ctx.ask(case, "chat")
        if not spoken.prompt_token_ids:
            ctx.cases.remove(case)
            raise CannotTell("the endpoint does not tell the token ids that its chat template makes of a message")
        prompt = list(spoken.prompt_token_ids)
        written = dataclasses.replace(probe, chat=False, prompt=prompt, messages=None)
        await ctx.ask(case, "completion of the same tokens", written)


async def _logprobs(ctx: Context) -> None:
    if ctx.can.api.logprobs is None:
        raise CannotTell("the endpoint sends no logprobs")
    cases = [ctx.case(kind, ctx.probe(kind, ctx.text(40))) for kind in ctx.kinds[:2]]
    for case in cases:
        await ctx.ask(case, "alone")
    for most in (1, 5, None, 5, 2):
        others = [ctx.neighbour(logprobs=most, temperature=0.0, top_p=None) for _ in range(4)]
        said = "no" if most is None else f"{most} top"
        await ctx.together([(case, f"beside requests for {said} logprobs", None) for case in cases], others)


async def _scored(ctx: Context) -> None:
    asked: list[tuple[str, str, str | Sequence[int]]] = [(kind, kind, ctx.text(40)) for kind in ctx.kinds[:2]]
    # In its long context a decoding step may cut the keys into other tiles than a prefill.
    asked += [("longest prompt", "greedy", longest)] if (longest := await _longest(ctx)) else []
    for name, kind, prompt in asked:
        case = ctx.case(name, ctx.probe(kind, prompt, logprobs=0), ignoring=("top_logprobs",))
        (answer, *_) = await ctx.ask(case, "as generated")
        if not (answer.prompt_token_ids and answer.token_ids and answer.logprobs):
            ctx.cases.remove(case)
            raise CannotTell("the endpoint sends no token ids, or no logprobs")
        ctx.session.sent()
        try:
            read = await score(ctx.session.endpoint, answer.prompt_token_ids, answer.token_ids)
        except Exception as error:  # whatever the form of the no
            ctx.cases.remove(case)
            raise CannotTell(f"the endpoint offers no prompt logprobs ({error})") from error
        ctx.record(case, "scored as part of a prompt", dataclasses.replace(answer, logprobs=read, top_logprobs=()))


async def _choices(ctx: Context) -> None:
    if not ctx.can.seeds:
        raise CannotTell(ctx.can.seeds_reason)
    probe = ctx.probe("seeded", ctx.text(40), n=3, max_tokens=ctx.level.tokens // 2)
    cases = [ctx.case(f"choice {index + 1} of 3", probe) for index in range(3)]
    cases[0].siblings = cases[1:]
    got = await ctx.ask(cases[0], "alone")
    if len(got) != 3:
        for case in cases:
            ctx.cases.remove(case)
        raise CannotTell(f"asked for three choices, the endpoint sent {len(got)}")
    await ctx.ask(cases[0], "alone")
    for crowd in (3, 7):
        others = [ctx.neighbour() for _ in range(crowd)]
        await ctx.together([(cases[0], f"among {crowd} neighbours", None)], others)


async def _aborts(ctx: Context) -> None:
    cases = [ctx.case(kind, ctx.probe(kind, ctx.text(40))) for kind in ctx.kinds[:2]]
    for case in cases:
        await ctx.ask(case, "alone")
    for crowd in (2, min(6, ctx.level.crowds[-1])):
        others = [ctx.neighbour(max_tokens=200, stream=True) for _ in range(crowd)]
        await ctx.together(
            [(case, f"beside {crowd} that hang up", None) for case in cases], others, abort_after=ctx.rng.randint(2, 6)
        )
        for case in cases:
            await ctx.ask(case, f"after {crowd} hung up")


async def _pause(ctx: Context) -> None:
    cases = [ctx.case(kind, ctx.probe(kind, ctx.text(40))) for kind in ctx.kinds[:2]]
    for case in cases:
        await ctx.ask(case, "before")
    await asyncio.sleep(ctx.level.pause)
    for case in cases:
        await ctx.ask(case, f"after {ctx.level.pause:g} quiet seconds")


async def _against(ctx: Context) -> None:
    other = ctx.other
    if other is None:
        raise CannotTell("no second endpoint was named (--against)")
    for kind in ctx.kinds:
        case = ctx.case(kind, ctx.probe(kind, ctx.text(50)))
        await ctx.ask(case, "first endpoint")
        await ctx.ask(case, "second endpoint", via=other)
        for session, which in ((ctx.session, "first"), (other, "second")):
            crowd = [ctx.neighbour() for _ in range(ctx.level.crowds[1])]
            await ctx.together([(case, f"{which} endpoint, among {len(crowd)}", None)], crowd, via=session)


# The cheap ones first, but for the one that finds most.
FAMILIES = (
    Family("repeat", "Alone, again and again", "nothing", BITS, _repeat),
    Family("batch", "Among neighbours", "how many others are served, and what they ask", BITS, _batch),
    Family("stream", "Streamed or whole", "how the answer is delivered", BITS, _stream),
    Family("endpoints", "Chat or completion", "which API the same tokens come through", SCORES, _endpoints),
    Family("scored", "Read or written", "whether tokens are generated or scored as prompt", SCORES, _scored),
    Family("choices", "n > 1", "who is served beside a request for three choices", "each choice, bit by bit", _choices),
    Family("logprobs", "Top logprobs", "how many logprobs the neighbours ask for", BITS, _logprobs),
    Family("chat", "Chat among neighbours", "how many others are served beside a chat", BITS, _chat),
    Family("pause", "After a pause", "how long the server was idle", BITS, _pause),
    Family("aborts", "Neighbours that hang up", "requests beside and before it that are aborted", BITS, _aborts),
    Family("burst", "Copies at once", "how many copies of the request arrive together", BITS, _burst),
    Family("order", "Shuffled arrival", "the order in which the same requests arrive", BITS, _order),
    Family("prefix", "Prefix cache", "how much of a long prompt is cached", BITS, _prefix),
    Family("chunks", "Long prompt in company", "how a long prompt's prefill is cut and mixed", BITS, _chunks),
    Family("against", "Two endpoints", "which of two endpoints answers", BITS, _against),
)
# Without these a run has told nothing about the defect that servers have. The others depend on what is offered.
REQUIRED = ("repeat", "batch", "burst", "order", "prefix")


def refusal(error: Exception) -> str:
    """Why a family could not tell, as its report says it."""
    prefix = {Refused: "the endpoint refuses the request: ", Broken: "no answer: "}.get(type(error), "")
    return prefix + str(error)
