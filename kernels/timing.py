"""Device time of short launches: captured in a CUDA graph, weights rotated through more than the L2 cache holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["Timed", "copies_beyond_l2"]


def copies_beyond_l2(operand_bytes: int, device: torch.device, most: int = 64) -> int:
    """How many copies of an operand are needed so that a rotation never finds one in the L2 cache."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(most, -(-3 * l2 // operand_bytes)))


class Timed:
    """One CUDA graph of `calls`, run after each other; `seconds` replays it and gives the time per call."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        calls[0]()  # compiles and allocates outside the capture
        torch.cuda.synchronize()
        self._calls = list(calls)  # a captured graph does not keep its operands alive
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self) -> float:
        self._start.record()
        self._graph.replay()
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1e3 / len(self._calls)
