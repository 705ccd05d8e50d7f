"""Launches a kernel without asking Triton each time which of its compilations fits the arguments.

Triton looks at every argument of every launch (dtypes, alignments, ones). That takes longer than a small kernel runs,
and where no CUDA graph replays the launches the host sets the pace. Here the caller names what decides: `key`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

__all__ = ["Compiled", "aligned"]


def aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes, as Triton asks of pointers."""
    return not any([x.data_ptr() % 16 for x in tensors if x is not None])  # noqa: C419  a list is faster than a generator


class Compiled:
    """A Triton kernel and what it was compiled to, by key."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._found: dict[Hashable, tuple[Any, Any, Any, tuple[Any, ...]]] = {}

    def launch(
        self, key: Hashable, grid: tuple[int, int, int], *args: Any, constants: Callable[[], dict[str, Any]]
    ) -> None:
        """Launches the kernel on the current card and stream.

        key: with pointers that are aligned, everything else that Triton chooses a compilation by: the card, dtypes,
        which pointers are None, the value of each integer that it specialises on, and the constants. None asks Triton.
        args: the kernel's arguments up to its first constexpr. constants: makes the constexprs, and options such as
        num_warps; called where Triton is asked.
        """
        found = self._found.get(key)
        if found is not None:
            run, function, metadata, rest = found
            stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
            run(*grid, stream, function, metadata, None, None, None, *args, *rest)  # as Triton's JITFunction.run does
            return
        named = constants()
        compiled = self.kernel[grid](*args, **named)
        if key is not None and compiled is not None:  # Triton's interpreter compiles nothing
            rest = tuple(named[name] for name in self.kernel.arg_names[len(args) :])
            self._found[key] = (compiled.run, compiled.function, compiled.packed_metadata, rest)
