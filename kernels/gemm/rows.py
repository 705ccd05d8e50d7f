"""The operator that runs a row schedule: compiled where there is a C++ compiler, else in Python with the same bits.

`linear` is one opaque call in a traced graph, which carries integers and tensors only: schedules are therefore kept
here and named by number.
"""

from __future__ import annotations

import functools
import logging
from importlib.resources import files

import torch
from vllm_deterministic.kernels.gemm.cpu import RowSchedule

__all__ = ["add_schedule", "compiled", "linear"]

logger = logging.getLogger("vllm.deterministic")

_SCHEMA = "cpu_linear(Tensor! y, Tensor x, Tensor? bias, Tensor weight, int schedule) -> ()"
# What the Python operator needs, kept for as long as the process: a graph may call any schedule at any time.
_library = torch.library.Library("vllm_deterministic", "FRAGMENT")
_by_number: list[tuple[torch._ops.OpOverload, int, int, RowSchedule]] = []


def add_schedule(product: str, n: int, k: int, schedule: RowSchedule) -> int:
    """The number under which `linear` knows the schedule of weights [n, k].

    product: qualified name of an operator (Tensor! y, Tensor x, Tensor? bias, Tensor weight) -> () that writes the
    product of x's rows with a packed weight into y: the one that was certified.
    """
    if compiled():
        return int(torch.ops.vllm_deterministic.add_schedule(product, n, k, schedule.padded))
    namespace, name = product.split("::")
    _by_number.append((getattr(getattr(torch.ops, namespace), name).default, n, k, schedule))
    return len(_by_number) - 1


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n: int, schedule: int) -> torch.Tensor:
    """y = x @ W.T + bias on the tree. x: [..., K], last dimension contiguous; returns [..., N] of x's dtype.

    weight: the packed weight as the schedule's product takes it. The result is allocated here, outside the operator,
    so that a compiled graph plans its memory as it does for the library's own product.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(rows.shape[0], n)
    torch.ops.vllm_deterministic.cpu_linear(y, rows, bias, weight, schedule)
    return y.view(*x.shape[:-1], n)


@functools.cache
def compiled() -> bool:
    """Registers the operator, once a process; whether it is the compiled one."""
    try:
        from torch._inductor.codecache import CppCodeCache

        # torch.compile's own compiler, flags and cache: what it needs is there wherever compiled CPU serving works.
        CppCodeCache.load(files("vllm_deterministic.kernels.gemm").joinpath("rows.cpp").read_text())
        native = True
    except Exception as reason:
        logger.warning(
            "linear layers are called from Python, which costs microseconds a call and changes no bit: the C++ "
            "operator could not be compiled. Is g++ installed (or CXX set)? %s",
            str(reason).partition("\n")[0],
        )
        _library.define(_SCHEMA)
        _library.impl("cpu_linear", _in_python, "CPU")
        native = False
    torch.library.register_fake("vllm_deterministic::cpu_linear", _fake, lib=_library)
    return native


def _in_python(
    y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, schedule: int
) -> None:
    product, n, k, rows = _by_number[schedule]
    if (y.shape[1], x.shape[1]) != (n, k):
        raise RuntimeError(f"schedule {schedule} is of weights [{n}, {k}], not [{y.shape[1]}, {x.shape[1]}]")
    rows.run(lambda a, b: product(b, a, bias, weight), x, y)


def _fake(y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, schedule: int) -> None:
    del y, x, bias, weight, schedule
