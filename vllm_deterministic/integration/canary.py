"""The self-check's request, asked of the engine behind the HTTP server, and what its result does to the promise."""

from __future__ import annotations

import asyncio
import datetime
import logging
import uuid
from typing import Any

from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_deterministic.integration import wire
from vllm_deterministic.serving import metrics, promise
from vllm_deterministic.serving.gate import gate
from vllm_deterministic.serving.receipts import Chain, ChoiceReceipt, prompt_digest
from vllm_deterministic.serving.self_check import SelfCheck

__all__ = ["watch"]

logger = logging.getLogger("vllm.deterministic")

# Two pages of the KV cache and one token: a prefix hit computes one row, as decoding does.
PROMPT_TOKENS, ANSWER_TOKENS = 257, 32
_watching: set[asyncio.Task[None]] = set()


async def watch(engine_client: Any, minutes: float, stops: bool) -> None:
    """Takes the reference, alone, before the first route answers; from then on checks every `minutes`."""

    def said(result: Any, found: str) -> None:
        metrics.self_checks.labels(result).inc()
        if result not in ("differs", "failed"):
            logger.info("deterministic self-check: %s (%s)", result, found)
            return
        logger.error("deterministic self-check: %s (%s)", result, found)
        if result == "differs" and stops:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            wire.stop(f"the self-check of {now} differs: {found}")

    def fingerprint() -> str:
        kept = promise.kept()
        assert kept is not None  # made before anybody watches
        return kept.fingerprint

    check = SelfCheck(_Canary(engine_client).ask, fingerprint, gate, said, wire.engines(engine_client))
    await check.once()
    task = asyncio.create_task(check.every(60 * minutes))
    _watching.add(task)  # asyncio itself keeps no task alive
    task.add_done_callback(_watching.discard)


class _Canary:
    """A sampled request over made-up tokens: sampling and logprobs see every bit of the logits."""

    def __init__(self, engine_client: Any) -> None:
        model = engine_client.vllm_config.model_config
        words = model.get_vocab_size()
        room = model.max_model_len
        self._engine = engine_client
        self._answer = max(1, min(ANSWER_TOKENS, room // 2))
        self._prompt = [7919 * (place + 1) % words for place in range(max(1, min(PROMPT_TOKENS, room - self._answer)))]
        self._salt = uuid.uuid4().hex  # nobody else's prompt shares these pages

    async def ask(self, engine: int, anew: bool) -> ChoiceReceipt:
        params = SamplingParams(
            temperature=0.8, seed=20261125, max_tokens=self._answer, ignore_eos=True, logprobs=0, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        salt = uuid.uuid4().hex if anew else self._salt
        prompt = TokensPrompt(prompt_token_ids=self._prompt, cache_salt=salt)
        chain, reason = Chain(prompt_digest(self._prompt), 0), ""
        name = f"deterministic-self-check-{uuid.uuid4().hex}"
        async for result in self._engine.generate(prompt, params, name, data_parallel_rank=engine):
            (output,) = result.outputs
            ids = list(output.token_ids)
            chain.add(ids, [entry[token].logprob for token, entry in zip(ids, output.logprobs, strict=True)])
            reason = output.finish_reason or reason
        return chain.finish(reason)
