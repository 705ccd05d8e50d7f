"""The live table of a run on a terminal; line by line where the output is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vllm_deterministic.verify.analysis import case_result
from vllm_deterministic.verify.report import Report
from vllm_deterministic.verify.runner import Progress, Run

__all__ = ["Display", "show_summary"]

STYLES = {"same": "green", "differs": "red", "could not tell": "yellow"}
SIGNS = {"same": "✓ same", "differs": "✗ differs", "could not tell": "? could not tell"}


class Display:
    """Context manager; hand `moved` and `finished` to the Run."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._shown = console.is_terminal and not quiet
        self._quiet = quiet
        self._last = 0.0
        self._printed: set[tuple[int, str]] = set()
        self._finished: dict[str, tuple[str, int, int]] = {}

    def __enter__(self) -> Display:
        if self._shown:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shown:
            self._live.stop()

    def moved(self, run: Run) -> None:
        if self._shown and time.monotonic() - self._last > 0.12:
            self._last = time.monotonic()
            self._live.update(self._table(run))

    def finished(self, run: Run) -> None:
        """After a family: one line where there is no live table."""
        for progress in run.progress:
            key = (run.round, progress.family.name)
            if progress.state == "done" and key not in self._printed:
                self._printed.add(key)
                result = progress.result()
                answers = sum(case.runs for case in result.cases)
                distinct = max((case.distinct_answers for case in result.cases), default=0)
                self._finished[progress.family.name] = (result.verdict, answers, distinct)
                if not self._shown and not self._quiet:
                    note = f": {result.reason}" if result.reason else ""
                    self._console.print(
                        f"{SIGNS[result.verdict]:18} {result.title:28} {answers:5} answers, at most {distinct} distinct"
                        f" a request{note}",
                        style=STYLES[result.verdict],
                        highlight=False,
                        soft_wrap=True,
                    )

    def _table(self, run: Run) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("probe family", "", "answers", "distinct"):
            table.add_column(heading, justify="right" if heading in ("answers", "distinct") else "left")
        for progress in run.progress:
            table.add_row(*self._row(progress, run.round))
        counts = run.counts
        elapsed = time.monotonic() - run._clock
        target = run.plan.tokens or run.level.until_tokens
        done = sum(progress.state == "done" for progress in run.progress) / max(1, len(run.progress))
        if run.level.until_tokens:
            done = min(1.0, counts.compared / target)
        tail = f" {counts.requests} requests, {counts.in_flight} in flight, {counts.tokens} tokens, {elapsed:.0f} s"
        if run.level.until_tokens:
            tail += f", round {run.round + 1}, {counts.compared:,} of {target:,} tokens compared"
        if counts.retries:
            tail += f", {counts.retries} retries"
        return Group(table, Text(), ProgressBar(total=1.0, completed=done, width=40), Text(tail, style="dim"))

    def _row(self, progress: Progress, number: int) -> tuple[str | Text, ...]:
        title = progress.family.title
        if progress.state == "running":
            answers = sum(len(case.observations) for case in progress.cases)
            cases = [case for case in progress.cases if case.observations]
            distinct = max((case_result(case).distinct_answers for case in cases[-6:]), default=0)
            return Text(title, style="bold"), Text("… asking", style="cyan"), str(answers), str(distinct)
        if progress.family.name in self._finished:
            verdict, answers, distinct = self._finished[progress.family.name]
            return title, Text(SIGNS[verdict], style=STYLES[verdict]), str(answers), str(distinct)
        return Text(title, style="dim"), "", "", ""


def show_summary(console: Console, report: Report) -> None:
    """The verdict, the families, and what the run could have missed."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("probe family", "verdict", "answers", "texts", "distinct", "from token"):
        left = heading in ("probe family", "verdict")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for family in report.families:
        worst = max(family.cases, key=lambda case: (case.distinct_answers, case.distinct_texts), default=None)
        parted = worst.first_divergence if worst else None
        table.add_row(
            family.title,
            Text(SIGNS[family.verdict], style=STYLES[family.verdict]),
            str(sum(case.runs for case in family.cases)),
            str(worst.distinct_texts) if worst else "",
            str(worst.distinct_answers) if worst else "",
            str(parted.position) if parted else "",
        )
    console.print(table)
    console.print()
    console.print(Text(f"{SIGNS[report.verdict]}: ", style=f"bold {STYLES[report.verdict]}") + Text(report.headline))
    for family in report.families:
        if family.reason:
            console.print(Text(f"  {family.title}: {family.reason}", style="yellow"), soft_wrap=True)
    for note in report.notes:
        console.print(Text(f"  {note}", style="dim"), soft_wrap=True)
    power = report.power
    found, missed = 100 * power.detectable_rate, 100 * power.miss_probability_at_1_percent
    said = (
        f"a defect in {found:.2g} % of the answers is found with 95 %; one in 1 % of them is missed with {missed:.2g} %"
    )
    counted = f"{power.comparisons} comparisons, {power.tokens} tokens"
    console.print(Text(f"  {counted}: {said}.", style="dim"), soft_wrap=True)
