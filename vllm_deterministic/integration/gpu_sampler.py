"""The V2 runner's sampler: truncation, noise and logprobs row by row.

What else vLLM does to logits is row by row already, in f32, and stays vLLM's (docs/sampling.md says why for each).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample import logprob

from vllm_deterministic import compat
from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.kernels.sampling import ahead
from vllm_deterministic.kernels.sampling.draw import draw
from vllm_deterministic.kernels.sampling.scores import Scores
from vllm_deterministic.kernels.sampling.select import drop_below, thresholds

__all__ = ["arm", "serve"]

# Logits that vLLM's own warm-up has brought, by what they were for and their dtype; None once requests are served.
_warmed: set[tuple[str, torch.dtype]] | None = set()
_greedy = torch.float32  # the dtype of logits that nothing changes


def arm(vllm_config: Any) -> None:
    """Installs the seams in this worker process. Idempotent. Raises SeamError, and UnsupportedError for the V1 runner,
    whose generators depend on how often they were called."""
    if not vllm_config.use_v2_model_runner:
        raise UnsupportedError(
            "--deterministic needs vLLM's V2 model runner, which this configuration does not use: unset "
            "VLLM_USE_V2_MODEL_RUNNER, or see vLLM's log for the feature that excludes it"
        )
    global _greedy
    _greedy = vllm_config.model_config.dtype
    compat.install(compat.GPU_SEAMS["draw"], lambda original: _draw)
    for seam in ("scores", "prompt_scores"):
        compat.install(compat.GPU_SEAMS[seam], lambda original: _scores)


def serve() -> None:
    """From here on nothing is compiled ahead: requests would wait for it."""
    global _warmed
    _warmed = None


def _first(what: str, logits: torch.Tensor) -> bool:
    if _warmed is None or not len(logits) or (what, logits.dtype) in _warmed:
        return False
    _warmed.add((what, logits.dtype))
    return True


def _draw(
    self: Any,
    processed_logits: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    idx_mapping_np: Any,
    pos: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    *which_algorithm: Any,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row. What is left of the arguments chooses among vLLM's algorithms; here there is one."""
    ranks = thresholds(processed_logits, top_k, top_p)
    states = self.sampling_states
    rows = (processed_logits, expanded_idx_mapping, states.temperature.gpu, states.seeds.gpu, pos)
    if _first("draws", processed_logits):
        ahead.draws(*rows, greedy=_greedy)
    sampled = draw(*rows, ranks)
    # Only who returns processed logits has them written.
    if ranks is not None and (self.return_sampling_mask or self.logprobs_mode in PROCESSED_LOGPROBS_MODES):
        processed_logits = drop_below(processed_logits, ranks)
    return sampled, processed_logits


def _scores(
    logits: torch.Tensor,
    num_logprobs: int,
    sampled_token_ids: torch.Tensor,
    cu_num_logits: list[int] | torch.Tensor | None = None,
    logprob_token_ids_state: Any = None,
    expanded_idx_mapping: torch.Tensor | None = None,
    max_per_req_token_ids: int = 0,
    logits_mode: bool = False,
) -> Any:
    """vLLM's compute_topk_scores. num_logprobs: the most that a row of the batch asks for; a row's own are the head."""
    if _first("scores", logits):
        ahead.scores(logits, sampled_token_ids)
    scores = Scores(logits, sampled_token_ids, num_logprobs)
    ids = torch.cat((sampled_token_ids.unsqueeze(-1), scores.best), dim=1)
    valid = None
    if max_per_req_token_ids:
        ids, valid = _named_tokens(
            scores.best, sampled_token_ids, logprob_token_ids_state, expanded_idx_mapping, max_per_req_token_ids
        )
    values = logits.gather(-1, ids).to(torch.float32) if logits_mode else scores.logprobs(ids)
    if valid is not None:
        values = values.masked_fill(~valid, float("-inf"))
    on_device, on_host = (cu_num_logits, None) if isinstance(cu_num_logits, torch.Tensor) else (None, cu_num_logits)
    return LogprobsTensors(
        logprob_token_ids=ids,
        logprobs=values,
        selected_token_ranks=scores.ranks.contiguous(),
        cu_num_generated_tokens=on_host,
        cu_num_generated_tokens_tensor=on_device,
    )


def _named_tokens(
    best: torch.Tensor, sampled: torch.Tensor, state: Any, requests: Any, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of requests that name tokens themselves (logprob_token_ids), by vLLM's kernel, which copies only."""
    columns = max(best.shape[1], most)
    ids = sampled.new_zeros((len(sampled), 1 + columns))
    valid = torch.zeros_like(ids, dtype=torch.bool)
    source = best.to(torch.int32) if best.shape[1] else state.token_ids.gpu
    logprob._fill_logprob_token_ids_kernel[(len(sampled),)](
        ids, ids.stride(0), valid, valid.stride(0), sampled, source, source.stride(0), requests,
        state.num_token_ids.gpu, state.token_ids.gpu, state.token_ids.gpu.stride(0),
        NUM_TOPK=best.shape[1], PADDED_COLS=triton.next_power_of_2(columns),
    )  # fmt: skip
    return ids, valid
