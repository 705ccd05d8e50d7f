"""From answers to results: what a case's answers have in common, and where they part."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_deterministic.verify.power import detectable_rate, miss_probability
from vllm_deterministic.verify.probes import Answer, Probe, compare, digest
from vllm_deterministic.verify.report import CaseResult, Divergence, Latency, Power

__all__ = ["Case", "Observation", "case_result", "comparable", "first_difference", "latencies", "power"]

# What an endpoint may leave out. Text and finish reason are always there.
OPTIONAL = ("token_ids", "tokens", "logprobs", "top_logprobs")


@dataclass(frozen=True)
class Observation:
    """One answer and how it was asked. neighbours: how many other requests were sent with it."""

    condition: str
    answer: Answer
    neighbours: int
    seconds: float
    endpoint: str


@dataclass(eq=False)
class Case:
    """Answers to one request that must all be equal.

    ignoring: fields that are not comparable here by design. siblings: the cases of choices 1, 2 … of n > 1.
    """

    name: str
    probe: Probe
    ignoring: frozenset[str] = frozenset()
    siblings: list[Case] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    known: CaseResult | None = None  # the result of the first known.runs observations

    @property
    def differs(self) -> bool:
        return len(self.observations) > 1 and not compare(comparable(self)).identical


def comparable(case: Case) -> list[Answer]:
    """The answers with the fields that all of them brought: what one way of asking leaves out, is not a difference."""
    answers = [observation.answer for observation in case.observations]
    missing = set(case.ignoring)
    for name in OPTIONAL:
        # An answer without a single token brings none of these by right.
        if any(not getattr(answer, name) for answer in answers if answer.text):
            missing.add(name)
    blank: dict[str, Any] = dict.fromkeys(missing, ())
    return [dataclasses.replace(answer, index=0, **blank) for answer in answers]


def first_difference(left: Sequence[object], right: Sequence[object]) -> int | None:
    """The first position at which two sequences differ, or at which the shorter one has ended; None for equal ones."""
    if left == right:
        return None
    shared = min(len(left), len(right))
    return next((at for at in range(shared) if left[at] != right[at]), shared)


def case_result(case: Case) -> CaseResult:
    """The result of a case with at least one answer. Kept: a long run asks for it after every family."""
    if case.known is None or case.known.runs != len(case.observations):
        case.known = _result(case)
    return case.known


def _result(case: Case) -> CaseResult:
    answers = comparable(case)
    summary = compare(answers)
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(digest(answer), len(numbers)) for answer in answers]
    examples = [answers[groups.index(number)] for number in range(len(numbers))]
    told = summary.runs > 1
    probe = case.probe
    prompt = probe.prompt if isinstance(probe.prompt, str) else str(list(probe.prompt or ())[:12])
    if probe.messages:
        prompt = str(probe.messages[-1].get("content", ""))
    parameters = {"temperature": probe.temperature, "max_tokens": probe.max_tokens, "seed": probe.seed}
    parameters |= {"top_p": probe.top_p, "n": probe.n if probe.n > 1 else None, "logprobs": probe.logprobs}
    return CaseResult(
        name=case.name,
        prompt=prompt[:160],
        parameters={name: str(value) for name, value in parameters.items() if value is not None},
        compared=["text", *_brought(answers)],
        verdict="could not tell" if not told else "same" if summary.identical else "differs",
        runs=summary.runs,
        tokens=sum(len(answer.steps) for answer in answers),
        distinct_texts=summary.distinct_texts,
        distinct_tokens=summary.distinct_tokens,
        distinct_logprobs=summary.distinct_logprobs,
        distinct_answers=summary.distinct_digests,
        conditions=[observation.condition for observation in case.observations],
        groups=groups,
        texts=[example.text for example in examples] if len(examples) > 1 else [],
        sequences=[[str(step) for step in one.steps] for one in examples] if len(examples) > 1 else [],
        divergences=[first_difference(examples[0].steps, other.steps) for other in examples[1:]],
        drift=_drift(examples),
        first_divergence=_first_divergence(case, answers, groups) if len(examples) > 1 else None,
    )


def _brought(answers: Sequence[Answer]) -> list[str]:
    names = {"token_ids": "tokens", "tokens": "tokens", "logprobs": "logprobs", "top_logprobs": "top_logprobs"}
    return list(
        dict.fromkeys(shown for name, shown in names.items() if any(getattr(answer, name) for answer in answers))
    )


def _drift(examples: Sequence[Answer]) -> list[float]:
    """Largest |Δ logprob| to the first answer, position by position, up to the first token that differs."""
    reference = examples[0]
    worst = [0.0] * len(reference.logprobs)
    for other in examples[1:]:
        parted = first_difference(reference.steps, other.steps)
        # The token that differs has a logprob of another token: not comparable any more.
        until = min(len(reference.logprobs), len(other.logprobs), len(worst) if parted is None else parted)
        for at in range(until):
            worst[at] = max(worst[at], abs(reference.logprobs[at] - other.logprobs[at]))
    return worst if any(worst) else []


def _first_divergence(case: Case, answers: Sequence[Answer], groups: Sequence[int]) -> Divergence:
    reference = answers[0]
    found = []
    for number in range(1, max(groups) + 1):
        at = groups.index(number)
        position, name, left, right = _parting(reference, answers[at])
        found.append((name != "text", position, at, name, left, right))
    # A difference that a reader sees comes before one in the digits.
    _, position, at, name, left, right = min(found, key=lambda one: one[:3])
    return Divergence(
        position=position,
        field=name,  # type: ignore[arg-type]
        reference_condition=case.observations[0].condition,
        other_condition=case.observations[at].condition,
        reference_text=reference.text,
        other_text=answers[at].text,
        reference_value=left,
        other_value=right,
    )


def _parting(reference: Answer, other: Answer) -> tuple[int, str, str, str]:
    def shown(sequence: Sequence[object], at: int) -> str:
        if at >= len(sequence):
            return "(ended)"
        value = sequence[at]
        return f"{value!r} ({value.hex()})" if isinstance(value, float) else repr(value)

    if (at := first_difference(reference.steps, other.steps)) is not None:
        left, right = (one.tokens or one.steps for one in (reference, other))
        return at, "text", shown(left, at), shown(right, at)
    if reference.text != other.text:
        at = first_difference(reference.text, other.text) or 0
        return at, "text", shown(reference.text, at), shown(other.text, at)
    if (at := first_difference(reference.logprob_bits, other.logprob_bits)) is not None:
        return at, "logprobs", shown(reference.logprobs, at), shown(other.logprobs, at)
    if (at := first_difference(reference.top_logprobs, other.top_logprobs)) is not None:
        return at, "top_logprobs", shown(reference.top_logprobs, at), shown(other.top_logprobs, at)
    return len(reference.steps), "finish_reason", str(reference.finish_reason), str(other.finish_reason)


def power(cases: Sequence[CaseResult]) -> Power:
    """What the told cases could have found."""
    told = [case for case in cases if case.runs > 1]
    comparisons = sum(case.runs - 1 for case in told)
    tokens = sum(case.tokens * (case.runs - 1) // case.runs for case in told)
    return Power(
        comparisons=comparisons,
        tokens=tokens,
        detectable_rate=detectable_rate(comparisons),
        detectable_rate_per_token=detectable_rate(tokens),
        miss_probability_at_1_percent=miss_probability(0.01, comparisons),
    )


def latencies(cases: Sequence[Case]) -> list[Latency]:
    """Seconds per request by endpoint and number of neighbours; streamed and whole alike, scored prompts left out."""
    seen: dict[tuple[str, int], list[Observation]] = {}
    for case in cases:
        for observation in case.observations:
            if observation.seconds > 0:
                seen.setdefault((observation.endpoint, observation.neighbours), []).append(observation)
    found = []
    for (endpoint, neighbours), observations in sorted(seen.items()):
        seconds = sorted(one.seconds for one in observations)
        per_token = [one.seconds / max(1, len(one.answer.steps)) for one in observations]
        found.append(
            Latency(
                endpoint=endpoint,
                neighbours=neighbours,
                runs=len(seconds),
                median_seconds=statistics.median(seconds),
                p95_seconds=seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))],
                median_seconds_per_token=statistics.median(per_token),
            )
        )
    return found
