"""What a run that found no difference has shown: the chance that it missed one."""

from __future__ import annotations

import math

__all__ = ["ASSUMPTION", "detectable_rate", "miss_probability", "runs_needed"]

ASSUMPTION = (
    "A defect of rate p makes each further answer differ from the first one with probability p, independently. "
    "Then n comparisons all agree with probability (1 - p)^n: the chance of missing the defect. The rate that would "
    "have been found with 95 % is 1 - 0.05^(1/n), about 3/n. It speaks of the conditions that were tried; a defect "
    "that needs another condition (a longer prompt, a fuller server, another card) has rate 0 here."
)


def miss_probability(rate: float, comparisons: int) -> float:
    """The probability that `comparisons` independent comparisons all agree under a defect of `rate`."""
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate lies between 0 and 1, not at {rate}")
    return float((1 - rate) ** comparisons)


def detectable_rate(comparisons: int, confidence: float = 0.95) -> float:
    """The smallest defect rate that `comparisons` comparisons find with probability `confidence`; 1.0 for none."""
    if comparisons <= 0:
        return 1.0
    # expm1 keeps the digits where the rate is small.
    return -math.expm1(math.log1p(-confidence) / comparisons)


def runs_needed(rate: float, confidence: float = 0.95) -> int:
    """How many comparisons find a defect of `rate` with probability `confidence`."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-rate))
