"""The scheduler on CPU: logprobs that a receipt alone reads leave the engine together, with the request's last token.

One by one, each of them costs the engine and the HTTP server more time than it took to compute.
"""

from __future__ import annotations

from array import array
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
        self._held: dict[str, array[float]] = {}

    def add_request(self, request: Any) -> None:
        params = request.sampling_params
        if params is not None and params.extra_args and TOGETHER in params.extra_args:
            self._held[request.request_id] = array("f")
        super().add_request(request)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        produced = super().update_from_output(scheduler_output, model_runner_output)
        if self._held:
            for outputs in produced.values():
                for output in outputs.outputs:
                    if output.request_id in self._held:
                        self._hold(output)
        return produced

    def _hold(self, output: Any) -> None:
        held = self._held[output.request_id]
        if output.new_logprobs is not None:
            held.extend(output.new_logprobs.logprobs[:, 0].tolist())
            output.new_logprobs = None
        if output.finish_reason is not None:
            del self._held[output.request_id]
            logprobs = np.frombuffer(held, np.float32).reshape(-1, 1)
            output.new_logprobs = LogprobsLists(np.empty((0, 1), np.int32), logprobs, np.empty(0, np.int32))

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        finished = super().finish_requests(*args, **kwargs)
        self._held = {name: held for name, held in self._held.items() if name in self.requests}
        return finished
