"""The schedules of a linear layer by name, and which of them are tried where no table of the card says better.

A name is a family and its parameters: "pointer block_m=16 block_n=64 … ". Tables, certificates and messages use it.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from vllm_deterministic.kernels.gemm.cublaslt import CublasLt
from vllm_deterministic.kernels.gemm.pointer import Pointer
from vllm_deterministic.kernels.gemm.tma import Tma
from vllm_deterministic.kernels.gemm.tree import Problem

from vllm_deterministic.errors import ConfigurationError

__all__ = ["Schedule", "default_table", "name_of", "parse"]


class Schedule(Protocol):
    """Anything that executes the tree. Frozen: equal parameters are the same schedule."""

    @property
    def family(self) -> str: ...
    @property
    def one_kernel(self) -> bool: ...
    def refusal(self, problem: Problem) -> str | None: ...
    def rows(self, m: int) -> int: ...
    def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None: ...


_FAMILIES = {kind.family: kind for kind in (Pointer, Tma, CublasLt)}


def name_of(schedule: Schedule) -> str:
    """The schedule's name; values that are the class's defaults are left out."""
    parts = [schedule.family]
    for field in dataclasses.fields(schedule):  # type: ignore[arg-type]
        if (value := getattr(schedule, field.name)) != field.default:
            parts.append(f"{field.name}={int(value) if isinstance(value, bool) else value}")
    return " ".join(parts)


def parse(name: str) -> Schedule:
    """The schedule of this name. Raises ConfigurationError for a name that is none."""
    try:
        family, *settings = name.split()
        kind = _FAMILIES[family]
        types = {field.name: field.type for field in dataclasses.fields(kind)}
        values = {}
        for setting in settings:
            key, value = setting.split("=")
            values[key] = bool(int(value)) if types[key] == "bool" else int(value)
        schedule: Schedule = kind(**values)
        return schedule
    except (KeyError, ValueError, TypeError) as reason:
        raise ConfigurationError(f"{name!r} names no schedule of a linear layer: {reason!r}") from reason


def default_table(problem: Problem) -> list[tuple[int, list[Schedule]]]:
    """(up to this M, schedules in order of preference), without knowing the card; the last entry holds for any M.

    The first of each entry is the better guess for a Hopper card; the second is another family, so that a server still
    starts where one of them is off the tree.
    """
    plain = Pointer(64, 64, 32, 64, False, 4, 3)
    if problem.dtype == torch.float32:
        return [(1 << 30, [CublasLt(), plain])]
    # Few rows: 64 weight rows a program, as many bytes under way as shared memory holds. A weight of few rows has fewer
    # programs than the card has processors, and gains by nothing more.
    few: list[Schedule] = [Tma(16, 64, 256, 8, True, False, 4, 5), Tma(32, 64, 128, 8, True, False, 4, 6)]
    middle: Schedule = Tma(64, 64, 128, 8, False, False, 4, 5)
    many: Schedule = Tma(128, 128, 64, 8, False, False, 8, 4)
    if many.refusal(problem) is not None:  # rows that the tensor memory accelerator cannot address
        few = [Pointer(m, 64, 128, 64, True, 4, 6) for m in (16, 32)]
        middle = many = plain
    library = CublasLt()
    return [(16, [few[0], library]), (32, [few[1], library]), (128, [library, middle]), (1 << 30, [library, many])]
