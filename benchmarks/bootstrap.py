"""The interval that every benchmark states beside its ratio."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

__all__ = ["interval"]


def interval(ratios: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median; the same for the same ratios."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return medians[resamples * 25 // 1000], medians[resamples * 975 // 1000]
