"""Runs the probe families against an endpoint and makes the report, whole or as far as it came."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from vllm_deterministic import __version__
from vllm_deterministic.errors import ConfigurationError
from vllm_deterministic.serving.fingerprint import differing_parts
from vllm_deterministic.verify.analysis import Case, case_result, latencies, power
from vllm_deterministic.verify.context import LEVELS, Context, Level
from vllm_deterministic.verify.discover import Capabilities, discover, find_model
from vllm_deterministic.verify.families import FAMILIES, REQUIRED, CannotTell, Family, refusal
from vllm_deterministic.verify.power import ASSUMPTION
from vllm_deterministic.verify.report import FamilyResult, Report, Verdict, overall
from vllm_deterministic.verify.session import BoundReached, Bounds, Broken, Counts, EndpointError, Refused, Session

__all__ = ["Plan", "Run", "verify", "verify_async"]


@dataclass(frozen=True)
class Plan:
    """What is asked of whom, and how much. Raises ConfigurationError for what does not exist.

    url, against: base URLs of OpenAI endpoints. model: needed where an endpoint serves several.
    families: names of those to run; all by default. require: names of those without which the verdict cannot be
    "same"; ("all",) for all that run. tokens: compared tokens after which `deep` ends. parallel: rounds of `deep` asked
    at once, once the first has been asked by itself; what is called alone in them has the other rounds' company.
    seed: of the prompts, the neighbours and the order; a fresh one by default. fail_fast: end at the first difference.
    """

    url: str
    model: str | None = None
    api_key: str = "EMPTY"
    level: str = "standard"
    against: str | None = None
    against_model: str | None = None
    against_api_key: str | None = None
    families: Sequence[str] | None = None
    require: Sequence[str] | None = None
    max_requests: int | None = None
    max_seconds: float | None = None
    tokens: int | None = None
    parallel: int = 1
    timeout: float = 600.0
    retries: int = 8
    seed: int | None = None
    fail_fast: bool = False

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ConfigurationError(f"level {self.level!r} does not exist: {', '.join(LEVELS)}")
        names = [family.name for family in FAMILIES]
        for name in (*(self.families or ()), *(() if self.require == ("all",) else self.require or ())):
            if name not in names:
                raise ConfigurationError(f"probe family {name!r} does not exist: {', '.join(names)}")
        for option in ("max_requests", "max_seconds", "tokens", "parallel"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise ConfigurationError(f"--{option.replace('_', '-')} {value:g} leaves nothing to ask: more than 0")
        if self.parallel > 1 and not LEVELS[self.level].until_tokens:
            raise ConfigurationError(f"--parallel {self.parallel}: only --level deep has more than one round")
        if self.families and "against" in self.families and self.against is None:
            raise ConfigurationError("the family 'against' needs a second endpoint: --against URL2")

    @property
    def chosen(self) -> list[Family]:
        """The families to run; `against` where there is a second endpoint."""
        chosen = [family for family in FAMILIES if self.families is None or family.name in self.families]
        return [family for family in chosen if family.name != "against" or self.against is not None]

    @property
    def required(self) -> list[str]:
        chosen = [family.name for family in self.chosen]
        if self.require is not None:
            return chosen if tuple(self.require) == ("all",) else list(self.require)
        wanted = set(REQUIRED) | {"against"}
        return [name for name in chosen if name in wanted] or chosen


@dataclass
class Progress:
    """One family's state while and after it runs."""

    family: Family
    running: int = 0  # rounds that ask it now
    ended: int = 0
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    complete: bool = False
    seconds: float = 0.0
    requests: int = 0

    @property
    def state(self) -> str:
        """waiting, running or done."""
        return "running" if self.running else "done" if self.ended else "waiting"

    def result(self) -> FamilyResult:
        cases = [case_result(case) for case in self.cases if case.observations]
        told = [case for case in cases if case.verdict != "could not tell"]
        verdict: Verdict = "could not tell"
        if any(case.verdict == "differs" for case in cases):
            verdict = "differs"
        elif told and self.complete and not self.reasons:
            verdict = "same"
        reasons = self.reasons or ([] if self.complete else ["not run" if not cases else "cut short"])
        family = self.family
        return FamilyResult(
            name=family.name,
            title=family.title,
            varies=family.varies,
            compares=family.compares,
            verdict=verdict,
            reason="; ".join(dict.fromkeys([*reasons, *self.notes])),
            complete=self.complete,
            seconds=round(self.seconds, 3),
            requests=self.requests,
            cases=cases,
            power=power(cases),
        )


class Run:
    """A run in progress; `report()` may be asked at any time after `discover`.

    moved: called whenever something has come back, for a display. finished: called after each family.
    """

    def __init__(
        self,
        plan: Plan,
        moved: Callable[[Run], None] = lambda run: None,
        finished: Callable[[Run], None] = lambda run: None,
    ) -> None:
        self.plan = plan
        self.level: Level = LEVELS[plan.level]
        self.seed = random.SystemRandom().randrange(2**31) if plan.seed is None else plan.seed
        self.counts = Counts()
        self.progress = [Progress(family) for family in plan.chosen]
        self.begun = self.round = 0  # rounds begun and completed
        self.partial = True
        self.notes: list[str] = []
        self.can: Capabilities | None = None
        self.other_can: Capabilities | None = None
        self.session: Session | None = None
        self.other: Session | None = None
        self._moved, self._finished = moved, finished
        self._target = (plan.tokens or self.level.until_tokens) if self.level.until_tokens else 0
        self._bounds = Bounds(plan.max_requests, plan.max_seconds, plan.retries)
        self._started, self._clock = datetime.now(UTC), time.monotonic()

    async def run(self) -> Report:
        """Everything, until it is done, a bound is reached, or the task is cancelled; a report in each case.

        Raises EndpointError where there is nothing to examine.
        """
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self.plan.max_seconds):
                    await self._open(stack)
                    await self._rounds()
                self.partial = False
            except TimeoutError:
                self.notes.append(f"stopped by --max-seconds {self.plan.max_seconds:g}")
            except BoundReached as reached:
                self.notes.append(str(reached))
            except EndpointError as error:  # a key that was withdrawn meanwhile, for example
                if self.can is None:
                    raise
                self.notes.append(str(error))
            except asyncio.CancelledError:
                if self.can is None:
                    raise
                self.notes.append("interrupted")
        if self.can is None:
            raise EndpointError(f"{'; '.join(self.notes)}, before the endpoint was known: allow more")
        return self.report()

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        plan = self.plan
        self.session, can = await self._connect(stack, plan.url, plan.model, plan.api_key, "first")
        if plan.against is not None:
            model = plan.against_model or plan.model
            key = plan.against_api_key or plan.api_key
            self.other, self.other_can = await self._connect(stack, plan.against, model, key, "second")
            if self.other_can.use_chat != can.use_chat or self.other_can.api != can.api:
                self.notes.append("the two endpoints offer different features: only what both send is compared")
        self.can = can

    async def _connect(
        self, stack: contextlib.AsyncExitStack, url: str, model: str | None, key: str, label: str
    ) -> tuple[Session, Capabilities]:
        endpoint, server, length = await find_model(url, model, key, self.plan.timeout)
        session = Session(endpoint, self._bounds, self.counts, label, self._tell)
        await stack.enter_async_context(session)
        return session, await discover(session, server, length)

    async def _rounds(self) -> None:
        """A whole round by itself; where a target is set, as many at once as planned until it is reached."""

        async def further() -> None:
            # A round that compared nothing would be followed by another one like it.
            while self.counts.compared < self._target and await self._round():
                pass

        if not await self._round():
            return
        tasks = [asyncio.create_task(further()) for _ in range(self.plan.parallel)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _round(self) -> bool:
        """Every family once, or as many as the target takes; whether anything was compared meanwhile."""
        number, before = self.begun, self.counts.compared
        self.begun += 1
        # Rounds that are asked at once begin with different families.
        first = number % len(self.progress)
        for progress in (*self.progress[first:], *self.progress[:first]):
            if number and self.counts.compared >= self._target:
                return True
            await self._family(progress, number)
            self._finished(self)
        self.round += 1
        return self.counts.compared > before

    async def _family(self, progress: Progress, number: int) -> None:
        assert self.session is not None
        assert self.can is not None
        if progress.reasons:
            return  # an earlier round has shown that it cannot tell
        # A family's requests do not depend on which other families run.
        rng = random.Random(f"{self.seed}/{number}/{progress.family.name}")
        session, other = self.session.counting(progress), self.other.counting(progress) if self.other else None
        ctx = Context(session, self.can, self.level, rng, other, self.plan.fail_fast, lambda: self._moved(self))
        ctx.cases = progress.cases
        progress.running += 1
        start = time.monotonic()
        try:
            await progress.family.run(ctx)
            progress.complete = True
        except (CannotTell, Refused, Broken) as error:
            progress.reasons.append(refusal(error))
            if isinstance(error, Broken):
                await self._still_there(progress)
        finally:
            progress.running -= 1
            progress.ended += 1
            progress.seconds += time.monotonic() - start
            progress.notes += [note for note in ctx.notes if note not in progress.notes]
            self._tell()

    def _tell(self) -> None:
        self._moved(self)

    async def _still_there(self, progress: Progress) -> None:
        """Ends the run where the endpoint does not answer any more: the rest would be a list of the same error."""
        plan = self.plan
        try:
            await find_model(plan.url, plan.model, plan.api_key, min(30.0, plan.timeout))
        except EndpointError as gone:
            raise BoundReached(f"the endpoint went away during '{progress.family.title}' ({gone})") from gone

    def report(self) -> Report:
        assert self.session is not None
        assert self.can is not None
        families = [progress.result() for progress in self.progress]
        required = self.plan.required
        verdict = overall(families, required)
        cases = [case for family in families for case in family.cases]
        timed = [case for one in self.progress if one.family.name in ("batch", "against") for case in one.cases]
        facts = self.can.facts(self.session.endpoint)
        notes = [*self.notes]
        if self.begun > 1 and self.plan.parallel > 1:
            notes.append(
                f"After the first round, {self.plan.parallel} were asked at once: what is called alone in them had the "
                "others' company."
            )
        if not facts.logprobs:
            notes.append(
                "The endpoint sends no logprobs: texts alone were compared, which show a defect late or never."
            )
        if not self.can.seeds:
            notes.append(f"Only greedy requests were compared: {self.can.seeds_reason}.")
        if self.other_can is not None:
            notes += _fingerprints(self.can, self.other_can)
        if self.level.until_tokens and self.partial and self.round and verdict == "same":
            notes.append(f"{self.round} complete rounds, short of the target of tokens.")
        return Report(
            version=__version__,
            started=self._started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self._clock, 3),
            level=self.level.name,
            seed=self.seed,
            endpoint=facts,
            against=self.other_can.facts(self.other.endpoint) if self.other and self.other_can else None,
            verdict=verdict,
            headline=_headline(verdict, families, facts.logprobs, self.partial),
            notes=notes,
            partial=self.partial,
            required=required,
            requests=self.counts.requests,
            answers=self.counts.answers,
            neighbours=self.counts.neighbours,
            tokens=self.counts.tokens,
            retries=self.counts.retries,
            most_in_flight=self.counts.most_in_flight,
            power=power(cases),
            power_assumption=ASSUMPTION,
            latency=latencies(timed),
            families=families,
        )


def _fingerprints(first: Capabilities, second: Capabilities) -> list[str]:
    """What two servers that promise something say of themselves, side by side."""
    if first.parts is None or second.parts is None:
        return []
    if parts := differing_parts(first.parts, second.parts):
        return [f"The two endpoints name different {', '.join(parts)}: {first.fingerprint} and {second.fingerprint}."]
    return [f"Both endpoints have the fingerprint {first.fingerprint}."]


def _headline(verdict: Verdict, families: Sequence[FamilyResult], logprobs: bool, partial: bool) -> str:
    told = [family for family in families if family.verdict != "could not tell"]
    untold = len(families) - len(told)
    rest = f"; {untold} of {len(families)} families could not tell" if untold else ""
    if verdict == "same":
        what = "the same bits" if logprobs else "the same text"
        return f"Every request got {what} each time, in {len(told)} families of probes{rest}."
    if verdict == "differs":
        cases = [case for family in families for case in family.cases if case.verdict == "differs"]
        worst = max(cases, key=lambda case: (case.distinct_texts, case.distinct_answers))
        found = [family for family in told if family.verdict == "differs"]
        what = f"{worst.distinct_answers} different answers"
        if worst.distinct_texts < worst.distinct_answers:
            what += f" in {worst.distinct_texts} wordings"
        if worst.distinct_texts == 1:
            what = f"one text with {worst.distinct_answers} different sets of logprobs"
        return (
            f"One request, asked {worst.runs} times, got {what}. {len(found)} of {len(families)} families differ{rest}."
        )
    if partial:
        return "The run ended before enough had been asked."
    return f"Too little could be asked: {untold} of {len(families)} families could not tell."


async def verify_async(url: str, **options: object) -> Report:
    """`verify` for those who have an event loop already."""
    return await Run(Plan(url, **options)).run()  # type: ignore[arg-type]


def verify(url: str, **options: object) -> Report:
    """Asks the OpenAI endpoint at `url` whether it is deterministic, and returns the report.

    options: the fields of `Plan`: model, api_key, level ("quick", "standard", "deep"), against, families, require,
    max_requests, max_seconds, tokens, parallel, timeout, retries, seed, fail_fast.
    Raises EndpointError (wrong URL, key or model) or ConfigurationError. An interrupted run returns a partial report.
    """
    return asyncio.run(verify_async(url, **options))
