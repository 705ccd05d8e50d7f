"""The scheduler on CPU: logprobs that a receipt alone reads leave the engine together, with the request's last token.

One by one, each of them costs the engine and the HTTP server more time than it took to compute.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import LogprobsLists

__all__ = ["TOGETHER", "DeterministicScheduler"]

# In SamplingParams.extra_args: nobody reads this request's logprobs before its end.
TOGETHER = "vllm_deterministic_logprobs_together"


class DeterministicScheduler(Scheduler):
    """vLLM's, which schedules as it does; it holds back the chosen tokens' logprobs of some requests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, list[float]] = {}

    def add_request(self, request: Any) -> None:
        params = request.sampling_params
        if params is not None and params.extra_args and TOGETHER in params.extra_args:
            self._held[request.request_id] = []
        super().add_request(request)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if not (held := self._held):
            return super().update_from_output(scheduler_output, model_runner_output)
        logprobs, rows = model_runner_output.logprobs, model_runner_output.req_id_to_index
        if held.keys() >= scheduler_output.num_scheduled_tokens.keys():
            model_runner_output.logprobs = None  # nobody else's: vLLM has none to cut out for each request
        produced = super().update_from_output(scheduler_output, model_runner_output)
        column = [] if logprobs is None else logprobs.logprobs[:, 0].tolist()
        for outputs in produced.values():
            for output in outputs.outputs:
                if (mine := held.get(name := output.request_id)) is None:
                    continue
                row = rows.get(name, 0)
                mine += column[row : row + len(output.new_token_ids)]  # one at most, without speculative decoding
                output.new_logprobs = _together(held.pop(name)) if output.finish_reason is not None else None
        return produced

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        finished = super().finish_requests(*args, **kwargs)
        self._held = {name: held for name, held in self._held.items() if name in self.requests}
        return finished


def _together(logprobs: list[float]) -> LogprobsLists:
    column = np.array(logprobs, np.float32).reshape(-1, 1)
    return LogprobsLists(np.empty((0, 1), np.int32), column, np.empty(0, np.int32))
