"""Which schedule is fastest, by card and weight shape: tables that `tune` measured. They cannot change a bit.

A card's table ships in configs/schedules/; one that `vllm-deterministic tune` made on this machine, in the user's
cache, goes before it. A shape that no table has, and a card without a table, get the model-free default.
"""

from __future__ import annotations

import functools
import json
import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from vllm_deterministic.kernels import certificates
from vllm_deterministic.kernels.gemm.schedules import Schedule, default_table, parse
from vllm_deterministic.kernels.gemm.tree import Problem

from vllm_deterministic.errors import ConfigurationError

__all__ = ["Table", "card_file", "table_for"]

logger = logging.getLogger("vllm.deterministic")

# (up to this M, schedules in order of preference), M ascending; the last entry holds for any M.
Table = list[tuple[int, list[Schedule]]]


def card_file(card: str) -> str:
    """The name of a card's table: "NVIDIA H200" -> "nvidia-h200.json"."""
    return "-".join(card.lower().replace("/", " ").split()) + ".json"


@functools.cache
def _tuned(card: str) -> dict[str, Any]:
    """shape -> rows of the card's tables, the user's own before the shipped one."""
    name = card_file(card)
    shipped = files("vllm_deterministic.configs") / "schedules" / name
    shapes: dict[str, Any] = {}
    for source in (shipped, Path(certificates.cache_dir()) / "schedules" / name):
        if not source.is_file():
            continue
        try:
            shapes |= json.loads(source.read_text())["shapes"]
        except (OSError, ValueError, KeyError, TypeError) as reason:
            logger.warning("the schedule table %s cannot be read (%s): the default is used", source, reason)
    return shapes


def table_for(problem: Problem, card: str) -> Table:
    """The card's table for this shape, each entry followed by the default's schedules as reserves."""
    default = default_table(problem)
    # fp16 has the sizes and the instructions of bf16, and with them its fastest schedules.
    tuned = problem.dtype != torch.float32 and _tuned(card).get(f"{problem.n}x{problem.k}")
    if not tuned:
        return default
    try:
        table = [(int(most), [parse(name) for name in names]) for most, names in tuned]
    except (ConfigurationError, TypeError, ValueError) as reason:
        logger.warning("the schedule table of %s for %s is wrong (%s): the default is used", card, problem, reason)
        return default
    table[-1] = (1 << 30, table[-1][1])
    bounds = sorted({most for most, _ in table} | {most for most, _ in default})
    return [(most, list(dict.fromkeys([*_at(table, most), *_at(default, most)]))) for most in bounds]


def _at(table: Table, m: int) -> list[Schedule]:
    return next(schedules for most, schedules in table if m <= most)
