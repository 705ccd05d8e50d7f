"""Training on the server's own arithmetic: a trainer whose log-probabilities are the sampler's, bit for bit.

    with deterministic_forward(model):
        scores = logprobs(model, token_ids, first=prompt_lengths)

Needs the server's vLLM: the operators are its own. vLLM's CPU build serves models on the CPU, its CUDA build models on
one card.
"""

from vllm_deterministic.train.accumulate import accumulate
from vllm_deterministic.train.engine import LocalEngine
from vllm_deterministic.train.patch import deterministic_forward, logprobs
from vllm_deterministic.train.server import LiveServer

__all__ = ["LiveServer", "LocalEngine", "accumulate", "deterministic_forward", "logprobs"]
