"""Chosen tokens' logprobs on their way from the worker to the engine, each step: three small arrays.

Pickle calls numpy for each array it writes or reads, which takes longer than the rest of a step's output: these go as
bytes. Whoever reads them finds vLLM's own type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

__all__ = ["ChosenLogprobs"]


class ChosenLogprobs(LogprobsTensors):
    """vLLM's, on CPU, with one logprob a row."""

    __slots__ = ()

    def tolists(self, cu_num_generated_tokens: list[int] | None = None) -> LogprobsLists:
        columns = self.logprob_token_ids.numpy(), self.logprobs.numpy(), self.selected_token_ranks.numpy()
        return _Lists(*columns, cu_num_generated_tokens)


class _Lists(LogprobsLists):
    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        columns = self.logprob_token_ids, self.logprobs, self.sampled_token_ranks
        return _lists, (*(column.tobytes() for column in columns), self.cu_num_generated_tokens)


def _lists(token_ids: bytes, logprobs: bytes, ranks: bytes, cu_num_generated_tokens: list[int] | None) -> LogprobsLists:
    return LogprobsLists(
        np.frombuffer(token_ids, np.int32).reshape(-1, 1),
        np.frombuffer(logprobs, np.float32).reshape(-1, 1),
        np.frombuffer(ranks, np.int64),
        cu_num_generated_tokens,
    )
