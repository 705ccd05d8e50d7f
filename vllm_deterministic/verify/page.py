"""report.html: one self-contained file. The template holds the words, this module the figures they need."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from vllm_deterministic.verify import charts
from vllm_deterministic.verify.report import CaseResult, Divergence, FamilyResult, Report

__all__ = ["render"]

# Squares shown per family; beyond that a picture of equal squares tells no more.
MOST_SQUARES = 480
MOST_BRANCHES = 48


@dataclass(frozen=True)
class Row:
    """The cases of one family that asked the same thing of different prompts, as one line of the page."""

    name: str
    cases: list[CaseResult]

    @property
    def runs(self) -> int:
        return sum(case.runs for case in self.cases)

    @property
    def distinct(self) -> int:
        return max(case.distinct_answers for case in self.cases)

    @property
    def distinct_texts(self) -> int:
        return max(case.distinct_texts for case in self.cases)

    @property
    def differs(self) -> bool:
        return any(case.verdict == "differs" for case in self.cases)

    @property
    def compared(self) -> str:
        return ", ".join(name.replace("_", " ") for name in self.cases[0].compared)

    @property
    def picture(self) -> Markup:
        groups = [group for case in self.cases for group in case.groups][:MOST_SQUARES]
        titles = [condition for case in self.cases for condition in case.conditions][:MOST_SQUARES]
        return Markup(charts.mosaic(groups, titles))


def _rows(family: FamilyResult) -> list[Row]:
    named: dict[str, list[CaseResult]] = {}
    for case in family.cases:
        named.setdefault(case.name, []).append(case)
    return [Row(name, cases) for name, cases in named.items()]


def _worst(report: Report) -> tuple[FamilyResult, CaseResult] | None:
    """The case that shows the defect best: many answers to one request, most of them in words."""
    found = [(family, case) for family in report.families for case in family.cases if case.verdict == "differs"]
    return max(found, key=lambda one: (one[1].distinct_tokens, one[1].distinct_answers), default=None)


def _readable(report: Report) -> tuple[FamilyResult, CaseResult] | None:
    """The case whose answers part in words first; else any that differs."""
    found = [
        (family, case, case.first_divergence)
        for family in report.families
        for case in family.cases
        if case.first_divergence is not None
    ]
    best = min(found, key=lambda one: (one[2].field != "text", one[2].position), default=None)
    return None if best is None else best[:2]


def _river(case: CaseResult) -> Markup:
    counts = [case.groups.count(number) for number in range(len(case.sequences))]
    largest = sorted(range(len(counts)), key=lambda number: (number != 0, -counts[number]))[:MOST_BRANCHES]
    return Markup(charts.river([case.sequences[one] for one in largest], [counts[one] for one in largest]))


def _diff(divergence: Divergence) -> tuple[Markup, Markup]:
    """The two texts with what they share, and what only one of them says, marked word by word."""
    left, right = (_words(text) for text in (divergence.reference_text, divergence.other_text))
    sides: tuple[list[Markup], list[Markup]] = ([], [])
    for what, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for side, words in ((0, left[a:b]), (1, right[c:d])):
            if words:
                text = "".join(words)
                sides[side].append(Markup("{}" if what == "equal" else "<mark>{}</mark>").format(text))
    return Markup("").join(sides[0]), Markup("").join(sides[1])


def _words(text: str) -> list[str]:
    found: list[str] = []
    for character in text:
        if found and not character.isspace() and not found[-1][-1].isspace():
            found[-1] += character
        else:
            found.append(character)
    return found


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %" if value >= 1e-4 else f"{100 * value:.1e} %"


def render(report: Report) -> str:
    """The page of a report, without any reference to the outside."""
    cases = [case for family in report.families for case in family.cases]
    differing = [(family, case) for family in report.families for case in family.cases if case.verdict == "differs"]
    parted = [position for case in cases for group, position in _parted(case)]
    longest = max((len(sequence) for case in cases for sequence in case.sequences), default=0)
    lines = [(f"{family.title}, {case.name}", case.drift) for family, case in differing if case.drift]
    lines.sort(key=lambda line: -max(line[1]))
    readable, worst = _readable(report), _worst(report)
    values: dict[str, Any] = {
        "report": report,
        "css": Markup(_resource("page.css")),
        "rows": {family.name: _rows(family) for family in report.families},
        "hero": Markup(_hero(report)),
        "worst": worst,
        "river": _river(worst[1]) if worst and worst[1].distinct_tokens > 1 else "",
        "histogram": Markup(charts.histogram(parted, longest, "token at which an answer leaves the first one"))
        if parted
        else "",
        "parted": len(parted),
        "drift": Markup(charts.drift(lines[:7], "token")) if lines else "",
        "drift_lines": [(name, charts.colour(1 + number % 7)) for number, (name, _) in enumerate(lines[:7])],
        "readable": readable,
        "diff": _diff(readable[1].first_divergence) if readable and readable[1].first_divergence else None,
        "slowest": max((one.median_seconds for one in report.latency), default=0.0),
        "percent": _percent,
    }
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_resource("page.html.j2")).render(values)


def _parted(case: CaseResult) -> list[tuple[int, int]]:
    """(group, position) of each answer whose tokens leave the first answer's."""
    found = []
    for group in case.groups:
        position = case.divergences[group - 1] if group else None
        if position is not None:
            found.append((group, position))
    return found


def _hero(report: Report) -> str:
    """Every answer of the run as a square: one colour, or not."""
    groups, titles = [], []
    for family in report.families:
        for case in family.cases:
            groups += case.groups
            titles += [f"{family.title}, {case.name}, {condition}" for condition in case.conditions]
    step = -(-len(groups) // 900) or 1
    if step > 1:
        # Differing answers are always shown; of the equal ones every step-th.
        kept = [at for at, group in enumerate(groups) if group or at % step == 0]
        groups, titles = [groups[at] for at in kept], [titles[at] for at in kept]
    return charts.mosaic(groups, titles, columns=56, size=14) if groups else ""


def _resource(name: str) -> str:
    return files("vllm_deterministic.verify").joinpath(name).read_text(encoding="utf-8")
