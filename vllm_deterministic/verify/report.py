"""The report: what was asked, what came back, what follows. `Report.model_json_schema()` is report.json's schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "EXIT_CODES",
    "CaseResult",
    "Divergence",
    "EndpointFacts",
    "FamilyResult",
    "Latency",
    "Power",
    "Report",
    "Verdict",
]

SCHEMA = "vllm-deterministic/verify-report/1"
Verdict = Literal["same", "differs", "could not tell"]
EXIT_CODES: dict[str, int] = {"same": 0, "differs": 1, "could not tell": 2}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class EndpointFacts(_Model):
    url: str
    model: str
    server: str
    """The response's Server header and the model list's owner, as far as they were sent."""
    completions: bool
    chat: bool
    logprobs: bool
    """Whether logprobs came back. Without them texts alone are compared."""
    token_ids: bool
    extensions: bool
    """Whether vLLM's request fields (ignore_eos, top_k, cache_salt) are accepted."""
    seeds: bool
    """Whether another seed gave another answer."""
    max_model_len: int | None
    fingerprint: str | None = None
    numerics_id: str | None = None
    """What GET /deterministic says of both. None where nothing is promised."""


class Divergence(_Model):
    """The earliest difference of a case: the first answer, and the one that leaves it first."""

    position: int
    """Tokens (characters where no tokens were sent) from 0."""
    field: Literal["text", "logprobs", "top_logprobs", "finish_reason"]
    reference_condition: str
    other_condition: str
    reference_text: str
    other_text: str
    reference_value: str
    other_value: str


class CaseResult(_Model):
    """Answers to one request that must all be equal."""

    name: str
    prompt: str
    """The beginning of the prompt."""
    parameters: dict[str, str]
    compared: list[str]
    """The fields that every answer brought: text, tokens, logprobs, top_logprobs."""
    verdict: Verdict
    runs: int
    tokens: int
    distinct_texts: int
    distinct_tokens: int
    distinct_logprobs: int
    distinct_answers: int
    conditions: list[str]
    """Per answer, in the order of arrival: under which condition it was asked."""
    groups: list[int]
    """Per answer: number of its group of equal answers; 0 is the group of the first answer."""
    texts: list[str]
    """Per group, where there is more than one: its text."""
    sequences: list[list[str]]
    """Per group, where there is more than one: its tokens (characters where no tokens were sent)."""
    divergences: list[int | None]
    """Per group after the first: the first token that differs from the first answer; None where tokens agree."""
    drift: list[float]
    """Per position: the largest |difference of logprobs| to the first answer, while the tokens before it agree."""
    first_divergence: Divergence | None


class Power(_Model):
    comparisons: int
    """Answers beyond the first of their case."""
    tokens: int
    detectable_rate: float
    """Defect rate per answer found with 95 % probability."""
    detectable_rate_per_token: float
    miss_probability_at_1_percent: float


class Latency(_Model):
    endpoint: str
    neighbours: int
    runs: int
    median_seconds: float
    p95_seconds: float
    median_seconds_per_token: float


class FamilyResult(_Model):
    name: str
    title: str
    varies: str
    compares: str
    verdict: Verdict
    reason: str
    """Why it could not tell, or what was left out; empty where nothing was."""
    complete: bool
    seconds: float
    requests: int
    cases: list[CaseResult]
    power: Power


class Report(_Model):
    schema_version: str = SCHEMA
    version: str
    """Of vllm-deterministic."""
    started: str
    """ISO 8601, UTC."""
    seconds: float
    level: str
    seed: int
    """Of the prompts, the neighbours and the order: the same seed asks the same."""
    endpoint: EndpointFacts
    against: EndpointFacts | None
    verdict: Verdict
    headline: str
    notes: list[str]
    partial: bool
    """Whether the run ended before everything had been asked."""
    required: list[str]
    """Families that must have told for the verdict "same"."""
    requests: int
    answers: int
    neighbours: int
    """Requests that were there only to be in the way."""
    tokens: int
    """Generated tokens, the neighbours' included."""
    retries: int
    """Requests sent again after HTTP 429 or 503, or a lost connection; they count as no difference."""
    most_in_flight: int
    power: Power
    power_assumption: str
    latency: list[Latency]
    families: list[FamilyResult]

    @property
    def exit_code(self) -> int:
        """0 same, 1 differs, 2 could not tell."""
        return EXIT_CODES[self.verdict]

    @property
    def found_by(self) -> list[str]:
        """Names of the families that found a difference."""
        return [family.name for family in self.families if family.verdict == "differs"]


def overall(families: Sequence[FamilyResult], required: Sequence[str]) -> Verdict:
    """Any difference decides; else every required family must have told."""
    if any(family.verdict == "differs" for family in families):
        return "differs"
    told = {family.name for family in families if family.verdict == "same"}
    return "same" if told and set(required) <= told else "could not tell"
