"""What a probe family works with: requests to an endpoint, neighbours for them, and the cases that collect answers."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_deterministic.verify import probes
from vllm_deterministic.verify.analysis import Case, Observation
from vllm_deterministic.verify.discover import Capabilities
from vllm_deterministic.verify.probes import Answer, Probe
from vllm_deterministic.verify.session import BoundReached, Broken, Refused, Session, tokens_of

__all__ = ["LEVELS", "Context", "Level"]


@dataclass(frozen=True)
class Level:
    """How much is asked in one round. Words are English words, about 1.3 tokens each."""

    name: str
    tokens: int  # length of an answer
    crowds: tuple[int, ...]  # numbers of neighbours
    repeats: int
    burst: int  # copies at once
    orders: int  # shuffled arrivals of the same requests
    long_words: int
    longest: int  # tokens of the longest prompt: more than attention kernels take in one tile of keys; 0 for none
    pause: float  # seconds
    until_tokens: int = 0  # rounds go on until this many tokens were compared


LEVELS = {
    "quick": Level("quick", 16, (1, 3, 8), 3, 6, 2, 150, 0, 1.0),
    "standard": Level("standard", 32, (1, 2, 5, 12, 24), 4, 16, 4, 400, 1537, 3.0),
    "deep": Level("deep", 96, (1, 2, 3, 5, 8, 13, 21, 32, 48), 8, 32, 6, 900, 3073, 10.0, 1_000_000),
}

_SENTENCES = (
    "A lighthouse keeper finds a map behind a loose brick.",
    "The map shows an island that no sailor has ever named.",
    "In one corner somebody has written the date of his own birth.",
    "He asks the baker, the priest and the captain of the mail boat what they know.",
    "Each of them tells another story, and each story is true in one detail only.",
    "The engineer counts seven copper pipes and writes the number on the wall.",
    "By winter the market square is quiet, and the clock runs four minutes late.",
    "Nobody in the village remembers who planted the pear tree beside the bridge.",
    "The letter arrives on a Tuesday, without a stamp, in a hand she almost knows.",
    "Between the two hills lies a field where radios hear nothing but rain.",
    "She repairs the lamp, listens to the sea, and waits for the second signal.",
    "Three of the four witnesses agree about the colour of the boat.",
    "An old sailor claims that the tide once stood still for an hour.",
    "In the archive every page of that year is missing, except the index.",
)


@dataclass
class Context:
    """State of one family's run in one round."""

    session: Session
    can: Capabilities
    level: Level
    rng: random.Random
    other: Session | None = None
    fail_fast: bool = False
    moved: Callable[[], None] = lambda: None
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self, words: int) -> str:
        """New text of about so many words. Its first word is new as well, so no server has its prefix cached."""
        found = [f"Entry {self.rng.randrange(10**9)}."]
        while sum(len(sentence.split()) for sentence in found) < words:
            found.append(self.rng.choice(_SENTENCES))
        return " ".join(found)

    def probe(self, kind: str, prompt: str | Sequence[int], **changes: Any) -> Probe:
        """A request: greedy, seeded (T = 0.8) or nucleus (T = 1, top-p 0.9), with whatever the endpoint allows."""
        chat = changes.get("chat", self.can.use_chat)
        api = self.can.chat if chat else self.can.completions
        sampling: dict[str, Any] = {}
        if kind != "greedy":
            seed = self.rng.randrange(1, 2**31 - 64)
            sampling = {"seed": seed, "temperature": 0.8 if kind == "seeded" else 1.0}
            sampling |= {"top_p": 0.9} if kind == "nucleus" else {}
        values: dict[str, Any] = {"max_tokens": self.level.tokens, "chat": chat, **sampling, **changes}
        values["extra_body"] = {**values.get("extra_body", {}), **({"ignore_eos": True} if api.extensions else {})}
        values.setdefault("logprobs", api.logprobs)
        if api.logprobs is None:
            values["logprobs"] = None
        return Probe(kind, prompt, **values)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of request worth asking here."""
        return ("greedy", "seeded", "nucleus") if self.can.seeds else ("greedy",)

    def case(self, name: str, probe: Probe, ignoring: Sequence[str] = ()) -> Case:
        one = Case(name, probe, frozenset(ignoring))
        self.cases.append(one)
        return one

    def neighbour(self, **changes: Any) -> Probe:
        """A request that is there to be in the way, of a form that the endpoint accepts."""
        one = dataclasses.replace(probes.neighbour(self.rng), chat=self.can.use_chat, **changes)
        if not self.can.api.extensions:
            one = dataclasses.replace(one, extra_body={})
        if self.can.api.logprobs is None:
            one = dataclasses.replace(one, logprobs=None)
        return one

    async def ask(
        self,
        case: Case,
        condition: str,
        probe: Probe | None = None,
        neighbours: int = 0,
        via: Session | None = None,
    ) -> list[Answer]:
        """Asks the case's request once, or `probe` where it is the same request in another form.

        Choice i of n > 1 goes to the case's sibling i: choices differ by right.
        """
        session = via or self.session
        answers, seconds = await session.ask(probe or case.probe)
        choices = [case, *case.siblings]
        for answer in answers[: len(choices)]:
            self.record(choices[answer.index], condition, answer, neighbours, seconds, session.label)
        return answers

    def record(
        self, case: Case, condition: str, answer: Answer, neighbours: int = 0, seconds: float = 0.0, label: str = ""
    ) -> None:
        case.observations.append(Observation(condition, answer, neighbours, seconds, label or self.session.label))
        self.session.counts.answers += 1
        self.session.counts.compared += tokens_of(answer)
        self.moved()
        if self.fail_fast and case.differs:
            raise BoundReached("stopped at the first difference")

    async def together(
        self,
        asked: Sequence[tuple[Case, str, Probe | None]],
        others: Sequence[Probe] = (),
        *,
        spread: float | None = None,
        abort_after: int | None = None,
        via: Session | None = None,
    ) -> None:
        """Asks all of `asked` among `others`, in a shuffled order, over `spread` seconds.

        spread: by default 0.2, and on a fast endpoint half of what an answer takes alone, so that requests do meet.
        What becomes of the others is not compared; abort_after: they hang up after so many chunks.
        Raises what the first of `asked` raises.
        """
        session = via or self.session
        known = asked[0][0].observations
        wait = spread if spread is not None else min(0.2, known[0].seconds / 2 if known else 0.2)
        in_all = len(others) + len(asked) - 1

        async def one(case: Case, condition: str, probe: Probe | None) -> None:
            await asyncio.sleep(self.rng.random() * wait)
            await self.ask(case, condition, probe, in_all, session)

        async def other(probe: Probe) -> None:
            await asyncio.sleep(self.rng.random() * wait)
            self.session.counts.neighbours += 1
            try:
                await session.ask(probe, abort_after=abort_after)
            except (Refused, Broken) as error:
                self.note(f"a neighbour got no answer: {error}")

        jobs = [other(probe) for probe in others] + [one(*job) for job in asked]
        self.rng.shuffle(jobs)
        results = await asyncio.gather(*(asyncio.create_task(job) for job in jobs), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        # A bound ends the run, a refusal the family: the bound first.
        for failure in sorted(failures, key=lambda error: not isinstance(error, BoundReached)):
            raise failure

    def note(self, what: str) -> None:
        if what not in self.notes and len(self.notes) < 5:
            self.notes.append(what)
