"""Where the promise meets vLLM's HTTP server: computed before the first route answers, watched while tokens come."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

from vllm.sampling_params import RequestOutputKind

from vllm_deterministic import __version__, compat, policy
from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.integration import facts
from vllm_deterministic.integration.refusals import refusal
from vllm_deterministic.integration.scheduler import TOGETHER
from vllm_deterministic.serving import metrics, promise
from vllm_deterministic.serving.fingerprint import agree
from vllm_deterministic.serving.signing import load_signer

__all__ = ["arm", "engines", "named_in_metadata", "promise_anew", "stop", "took"]

logger = logging.getLogger("vllm.deterministic")

# Sampling parameters that a request may leave to the server's defaults; the API calls them as vLLM does.
_USED = (
    "temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty seed min_tokens max_tokens"
).split()


# Engine, application state and arguments of this process's HTTP server.
_server: tuple[Any, Any, Any] | None = None


def arm() -> None:
    """Installs the seams of the HTTP server in this process. Idempotent. Raises SeamError."""
    compat.install(compat.WIRE_SEAMS["init_app_state"], _promising)
    compat.install(compat.WIRE_SEAMS["generate"], _recording)
    compat.install(compat.WIRE_SEAMS["logprobs"], _unread)


def _promising(init_app_state: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init_app_state)
    async def wrapped(engine_client: Any, state: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        global _server
        kept = await _promise(engine_client, args)
        # vLLM's own seam for the field `system_fingerprint`.
        args.fingerprint_mode, args.fingerprint_value = "custom", kept.fingerprint
        _server = (engine_client, state, args)
        if minutes := getattr(args, "deterministic_self_check", None):
            from vllm_deterministic.integration import canary  # it stops what is promised here

            await canary.watch(engine_client, minutes, bool(args.deterministic_self_check_stop))
        return await init_app_state(engine_client, state, args, *rest, **kwargs)

    return wrapped


def engines(engine_client: Any) -> int:
    """How many engines answer behind this server: the data parallel ranks that it sends requests to."""
    parallel = engine_client.vllm_config.parallel_config
    return int(parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size)


async def _reports(engine_client: Any) -> list[Any]:
    """The report of every engine's worker. AsyncLLM.collective_rpc asks them all, too, but hands over one."""
    asked = "collective_rpc", "deterministic_report", None, (), None
    try:
        answers = await engine_client.engine_core.call_utility_all_async(*asked)
    except Exception as error:
        raise UnsupportedError(
            f"--deterministic: an engine does not say what it computes with ({error}). Start every data parallel rank "
            "with --deterministic"
        ) from error
    return [report for (report,) in answers]


async def _promise(engine_client: Any, args: Any) -> promise.Promise:
    reports = await _reports(engine_client)
    of_server = facts.fingerprint(engine_client.vllm_config, args, engine_client.renderer.tokenizer, reports[0])
    if len(reports) > 1:
        agree(of_server.parts, [report["parts"] for report in reports])
    key = getattr(args, "deterministic_signing_key", None)
    about = _about(reports[0], engine_client.vllm_config.device_config.device_type)
    about["engines"] = len(reports)
    before, kept = promise.kept(), promise.Promise.of(of_server, about, load_signer(key) if key else None)
    if before is not None:
        kept = dataclasses.replace(kept, stopped=before.stopped)  # new weights do not mend the arithmetic
    promise.keep(kept)
    certified = metrics.certified(reports[0]["certified"], reports[0]["certification_seconds"])
    minutes = getattr(args, "deterministic_self_check", None)
    logger.info(
        "deterministic: %s, numerics %s, %s, weights %s, engines %d, %s, self-check %s; GET /deterministic says more",
        kept.fingerprint, of_server.numerics.id, of_server.numerics.dtype, of_server.weights[:12], len(reports),
        certified, f"every {minutes:g} min" if minutes else "off",
    )  # fmt: skip
    return kept


async def promise_anew() -> None:
    """The weights have changed: computes the fingerprint again, and has every later answer carry it."""
    if _server is None:
        return  # an engine without an HTTP server has promised nothing
    _stamp((await _promise(_server[0], _server[2])).stamp)


def stop(reason: str) -> None:
    """From now on answers carry no fingerprint, and requests that require the promise get 503."""
    kept = promise.kept()
    assert kept is not None  # only a kept promise is checked
    if kept.stopped is None:
        promise.keep(dataclasses.replace(kept, stopped=reason))
        _stamp(None)
        logger.error("deterministic: promises nothing any more: %s", reason)


def _stamp(fingerprint: str | None) -> None:
    assert _server is not None
    for serving in vars(_server[1])["_state"].values():
        if hasattr(serving, "system_fingerprint"):
            serving.system_fingerprint = fingerprint


def _about(report: Any, device: str) -> dict[str, Any]:
    return {
        "versions": {"vllm_deterministic": __version__},
        "preview": policy.PREVIEWS.get(device),
        "certified": report["certified"],
        "refused": policy.refused_features(),
        "request_fields": sorted(policy.REQUEST_FIELDS),
    }


def _recording(generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def wrapped(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = promise.recording.get()
        if recorder is None:
            return generate(self, prompt, sampling_params, *args, **kwargs)
        if recorder.begun:
            message = "a receipt covers one prompt: ask for each prompt on its own"
            raise refusal(message, parameter="deterministic.receipt", reason="receipt")
        recorder.begin(sampling_params.n)
        if sampling_params.logprobs is None:
            sampling_params.logprobs = 0  # those of the chosen tokens; vLLM shows them to nobody who did not ask
            recorder.alone = sampling_params.prompt_logprobs is None
        return _watched(recorder, generate(self, prompt, sampling_params, *args, **kwargs), sampling_params)

    return wrapped


class _Scores(list[float]):
    """Logprobs of one choice that the recorder alone reads: numbers, where vLLM keeps an object for each token.

    False, so that vLLM hands the list on as it is, cut nowhere.
    """

    def take(self, output: Any) -> None:
        """What LogprobsProcessor.update_from_output does, for these."""
        if output.new_logprobs is not None:
            self.extend(output.new_logprobs.logprobs[:, 0].tolist())

    def __bool__(self) -> bool:
        return False


def _unread(from_new_request: Callable[..., Any]) -> Callable[..., Any]:
    """Logprobs that the recorder alone reads are kept without anything else of their tokens."""

    @functools.wraps(from_new_request)
    def wrapped(tokenizer: Any, request: Any) -> Any:
        recorder = promise.recording.get()
        if recorder is None or not recorder.alone:
            return from_new_request(tokenizer, request)
        processor = from_new_request(None, request)
        processor.logprobs = scores = _Scores()
        processor.update_from_output = scores.take
        return processor

    return wrapped


async def _watched(recorder: promise.Recorder, outputs: Any, params: Any) -> Any:
    """Hands the engine's outputs on. A stream brings each token once, a whole answer all at its end."""
    assert params.output_kind != RequestOutputKind.CUMULATIVE
    async for result in outputs:
        for output in result.outputs:
            ids = output.token_ids
            if recorder.alone:  # complete when the choice is
                scores = output.logprobs if output.finish_reason is not None else ()
            else:
                # Where an output brings no token, vLLM hands over the logprobs of all the tokens before.
                scores = [one[token].logprob for token, one in zip(ids, output.logprobs, strict=True)] if ids else ()
            recorder.add(output.index, ids, scores, output.finish_reason)
        yield result


def named_in_metadata(to_sampling_params: Callable[..., Any]) -> Callable[..., Any]:
    """Answers of the Responses API have no field for the fingerprint: it goes into their metadata."""

    @functools.wraps(to_sampling_params)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = to_sampling_params(self, *args, **kwargs)
        if (kept := promise.kept()) is not None and kept.stamp:
            self.metadata = {**(self.metadata or {}), "system_fingerprint": kept.stamp}
        return params

    return wrapped


def took(request: Any) -> None:
    """Notes the EngineCoreRequest of the HTTP request in hand, its seed drawn, where a receipt is wanted."""
    if (recorder := promise.recording.get()) is None:
        return
    params = request.sampling_params
    if recorder.alone and not params.stop:  # text that stops an answer is seen here: the engine does not know its end
        params.extra_args = {**(params.extra_args or {}), TOGETHER: True}
    recorder.ran(request.prompt_token_ids, {name: getattr(params, name) for name in _USED})
