"""The classic experiment: one prompt, many times at temperature 0, and a picture of where the answers part."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from vllm_deterministic.errors import DeterministicError
from vllm_deterministic.verify import charts, output
from vllm_deterministic.verify.analysis import first_difference
from vllm_deterministic.verify.discover import discover, find_model
from vllm_deterministic.verify.probes import Answer, Probe
from vllm_deterministic.verify.session import BoundReached, Bounds, Broken, Counts, Refused, Session

__all__ = ["Answers", "Experiment", "run", "show", "write"]

MOST_BRANCHES = 64


class Answers(BaseModel):
    """One of the distinct answers. parts_at: the first token that differs from the most frequent answer."""

    count: int
    parts_at: int | None
    text: str
    tokens: list[str]


class Experiment(BaseModel):
    """Result of the experiment, most frequent answer first. This is demo.json."""

    url: str
    model: str
    started: str
    seconds: float
    prompt: str
    asked: int
    answered: int
    concurrency: int
    max_tokens: int
    distinct_logprobs: int | None
    answers: list[Answers]

    @property
    def distinct(self) -> int:
        return len(self.answers)

    @property
    def first_parting(self) -> int | None:
        return min((one.parts_at for one in self.answers if one.parts_at is not None), default=None)


@dataclass
class _Work:
    got: list[Answer]
    errors: list[str]


async def run(
    console: Console,
    url: str,
    model: str | None,
    api_key: str,
    timeout: float,
    *,
    prompt: str,
    n: int,
    concurrency: int,
    tokens: int,
) -> Experiment:
    """Asks. An interrupted run returns what came back. Raises DeterministicError where nothing did."""
    started = datetime.now(UTC)
    endpoint, server, length = await find_model(url, model, api_key, timeout)
    async with Session(endpoint, Bounds(), Counts(), "demo") as session:
        can = await discover(session, server, length)
        probe = Probe("demo", prompt, max_tokens=tokens, chat=can.use_chat, logprobs=can.api.logprobs and 0)
        work = _Work([], [])
        clock = asyncio.get_running_loop().time()
        try:
            await _ask_all(console, session, probe, n, concurrency, work)
        except asyncio.CancelledError:
            if not work.got:
                raise
        if not work.got:
            raise DeterministicError(f"no request was answered: {work.errors[0] if work.errors else 'interrupted'}")
        seconds = asyncio.get_running_loop().time() - clock
    counted = Counter((answer.text, answer.token_ids or answer.tokens) for answer in work.got)
    by_key = {(answer.text, answer.token_ids or answer.tokens): answer for answer in work.got}
    ordered = [(by_key[key], count) for key, count in counted.most_common()]
    first = ordered[0][0]
    return Experiment(
        url=session.endpoint.base_url,
        model=session.endpoint.model,
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        prompt=prompt,
        asked=n,
        answered=len(work.got),
        concurrency=concurrency,
        max_tokens=tokens,
        distinct_logprobs=len({answer.logprob_bits for answer in work.got}) if first.logprobs else None,
        answers=[
            Answers(
                count=count,
                parts_at=first_difference(first.steps, one.steps),
                text=one.text,
                tokens=[str(step) for step in _steps(one)],
            )
            for one, count in ordered
        ],
    )


def _steps(answer: Answer) -> tuple[object, ...]:
    return answer.tokens or answer.steps


async def _ask_all(console: Console, session: Session, probe: Probe, n: int, concurrency: int, work: _Work) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("asking", total=n)
        left = iter(range(n))

        async def worker() -> None:
            for _ in left:
                try:
                    answers, _ = await session.ask(probe)
                    work.got += answers[:1]
                except (Refused, Broken, BoundReached) as error:
                    work.errors.append(str(error))
                    if len(work.errors) > 20 and not work.got:
                        return
                distinct = len({answer.text for answer in work.got})
                progress.update(task, advance=1, description=f"{distinct} distinct answers")

        await asyncio.gather(*(worker() for _ in range(min(concurrency, n))))


def show(console: Console, result: Experiment) -> None:
    """A bar per distinct answer."""
    said = "one answer" if result.distinct == 1 else f"{result.distinct} different answers"
    console.print(Text(f"{result.answered} times the same prompt at temperature 0: {said}.", style="bold"))
    if result.distinct_logprobs:
        console.print(f"{result.distinct_logprobs} different sequences of logprobs.", highlight=False)
    most = result.answers[0].count
    for one in result.answers[:20]:
        tail = one.text[shared_characters(result, one) :]
        where = "" if one.parts_at is None else f"from token {one.parts_at}: "
        line = f"{one.count:5} {'█' * max(1, round(30 * one.count / most)):30} {where}{' '.join(tail.split())}"
        console.print(Text(line), overflow="ellipsis", no_wrap=True)
    if result.distinct > 20:
        console.print(f"      and {result.distinct - 20} more", style="dim")


def shared_characters(result: Experiment, one: Answers) -> int:
    """How much of an answer's text is that of the most frequent answer; 0 for that one itself."""
    first = result.answers[0]
    return 0 if one is first else first_difference(first.text, one.text) or 0


def write(result: Experiment, folder: Path) -> None:
    """Writes demo.html and demo.json. Raises OutputError."""
    output.write_file(folder / "demo.json", result.model_dump_json(indent=1) + "\n")
    output.write_file(folder / "demo.html", render(result))


def render(result: Experiment) -> str:
    """The picture as one self-contained page."""
    shown = result.answers[:MOST_BRANCHES]
    parted = [one.parts_at for one in result.answers for _ in range(one.count) if one.parts_at is not None]
    longest = max(len(one.tokens) for one in result.answers)
    folder = files("vllm_deterministic.verify")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(folder.joinpath("demo.html.j2").read_text(encoding="utf-8"))
    return template.render(
        result=result,
        css=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        river=Markup(charts.river([one.tokens for one in shown], [one.count for one in shown])),
        shown=len(shown),
        histogram=Markup(charts.histogram(parted, longest, "token at which an answer leaves the most frequent one"))
        if parted
        else "",
        shared=[shared_characters(result, one) for one in result.answers],
    )
