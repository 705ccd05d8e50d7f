"""The V1 sampler on CPU: noise from (seed, position), truncation row by row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.sampling_params import SamplingType
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinTokensLogitsProcessor

from vllm_deterministic import compat
from vllm_deterministic.errors import DeterministicError
from vllm_deterministic.integration.logprobs import ChosenLogprobs
from vllm_deterministic.kernels.sampling.chosen import chosen_logprobs, compiled, likeliest
from vllm_deterministic.kernels.sampling.noise import noise_seed
from vllm_deterministic.kernels.sampling.top import top_logprobs
from vllm_deterministic.kernels.sampling.truncate import top_k_top_p_by_row

__all__ = ["RowNoise", "arm"]


class RowNoise:
    """Stands where vLLM keeps a request's torch.Generator, and holds no state that a draw could change."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def seed(self) -> int:
        """Noise seed of the token that the request draws next."""
        return noise_seed(self._request.sampling_params.seed, self._request.num_tokens)

    # A prefill chunk that is not the last draws a token which is thrown away; vLLM then rewinds the generator.
    # CPU generators cannot be rewound (the engine dies); noise without state needs no rewinding.
    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        del offset


def arm() -> None:
    """Installs the seams in this worker process. Idempotent. Raises SeamError."""
    compat.install(compat.CPU_SEAMS["input_batch"], _noise_instead_of_generators)
    compat.install(compat.CPU_SEAMS["sampler"], lambda original: _sample)
    compat.install(compat.CPU_SEAMS["chosen_logprobs"], _no_others)
    compiled()
    compat.install(compat.CPU_SEAMS["top_logprobs"], _ties_by_token_id)


def _noise_instead_of_generators(add_request: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(add_request)
    def wrapped(self: Any, request: Any) -> int:
        index = add_request(self, request)
        params = request.sampling_params
        if params is not None and params.sampling_type != SamplingType.GREEDY:
            if params.seed is None:
                raise DeterministicError(
                    "a sampled request reached the worker without a seed: the front end is not armed"
                )
            self.generators[index] = RowNoise(request)
        return index

    return wrapped


def _no_others(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Where the whole batch wants the chosen tokens' logprobs only, those alone are computed, from the same logits."""

    @functools.wraps(forward)
    def wrapped(
        self: Any,
        logits: torch.Tensor,
        sampling_metadata: Any,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> Any:
        metadata, mode = sampling_metadata, logprobs_mode_override or self.logprobs_mode
        if metadata.max_num_logprobs != 0 or metadata.logprob_token_ids or mode != "raw_logprobs":
            return forward(self, logits, metadata, predict_bonus_token, logprobs_mode_override)
        if _takes_the_likeliest(metadata) and (found := likeliest(logits)) is not None:
            token_ids, logprobs, ranks = found
            sampled = token_ids.to(torch.int32).unsqueeze(-1)
            return SamplerOutput(sampled, ChosenLogprobs(sampled, logprobs.unsqueeze(-1), ranks))
        raw = logits.clone() if logits.dtype == torch.float32 else logits  # vLLM samples from f32 logits in place
        metadata.max_num_logprobs = None  # for the call: a copy of the metadata takes longer than most of this
        try:
            output = forward(self, logits, metadata, predict_bonus_token, logprobs_mode_override)
        finally:
            metadata.max_num_logprobs = 0
        logprobs, ranks = chosen_logprobs(raw, output.sampled_token_ids.squeeze(-1).long())
        output.logprobs_tensors = ChosenLogprobs(output.sampled_token_ids, logprobs.unsqueeze(-1), ranks)
        return output

    return wrapped


def _takes_the_likeliest(metadata: Any) -> bool:
    """Whether vLLM's sampler does nothing but that: no request of the batch draws or changes its logits."""
    budgets = metadata.thinking_budget_state_holder
    return bool(
        metadata.all_greedy
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and (budgets is None or not budgets.has_tracked_requests())
        and all(_idle(processor) for processor in metadata.logitsprocs.non_argmax_invariant)
    )


def _idle(processor: Any) -> bool:
    """Whether no request of the batch asks anything of it; False for one that is not vLLM's own."""
    if type(processor) is LogitBiasLogitsProcessor:
        return not processor.biases
    return type(processor) is MinTokensLogitsProcessor and not processor.min_toks


def _ties_by_token_id(gather_logprobs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(gather_logprobs)
    def wrapped(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
        chosen = gather_logprobs(logprobs, 0, token_ids)  # the token's own logprob and rank: vLLM's
        if not num_logprobs:
            return chosen
        values, indices = top_logprobs(logprobs, num_logprobs)
        return chosen._replace(
            logprob_token_ids=torch.cat((chosen.logprob_token_ids, indices.to(torch.int32)), dim=1),
            logprobs=torch.cat((chosen.logprobs, values), dim=1),
        )

    return wrapped


def _sample(
    self: Any, logits: torch.Tensor, generators: dict[int, Any], k: torch.Tensor | None, p: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draws one token a row: argmax of logit + Gumbel noise of (noise seed, token), ties to the lower token id.

    logits: [rows, vocab] f32, may be overwritten. Returns [rows] token ids and what logprobs_mode asks for.
    """
    logits = top_k_top_p_by_row(logits, k, p)
    processed = None
    if self.logprobs_mode == "processed_logits":
        processed = logits
    elif self.logprobs_mode == "processed_logprobs":
        processed = logits.log_softmax(dim=-1, dtype=torch.float32)
    seeds = torch.zeros(logits.shape[0], dtype=torch.int64)
    for row, noise in generators.items():
        # vLLM's warm-up brings plain generators; a greedy row's draw is not used.
        if isinstance(noise, RowNoise):
            seeds[row] = noise.seed()
    return torch.ops._C.fused_gumbel_argmax(logits.to(torch.float32), seeds), processed
