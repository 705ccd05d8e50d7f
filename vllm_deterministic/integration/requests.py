"""Requests on their way in: what cannot be promised gets HTTP 400, and who brings no seed gets one."""

from __future__ import annotations

import contextvars
import functools
import logging
import secrets
from collections.abc import Callable, Sized
from typing import Any

import msgspec
from prometheus_client import Counter
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, SamplingType

from vllm_deterministic import compat, policy
from vllm_deterministic.contract import Settings
from vllm_deterministic.integration import wire
from vllm_deterministic.integration.refusals import refusal
from vllm_deterministic.kernels.sampling.noise import derive_seed

__all__ = ["SEED_HEADER", "arm", "seeds_given"]

SEED_HEADER = "x-vllm-deterministic-seed"

logger = logging.getLogger("vllm.deterministic")
unseeded = Counter("vllm_deterministic_unseeded_requests", "Requests at T > 0 that brought no seed.", ["mode"])
# Seeds drawn while one HTTP request is handled; the middleware that answers it reads them.
seeds_given: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("seeds_given", default=None)

_UNSEEDED_WARNING = (
    "A request at temperature > 0 brought no seed. Its seed is computed from its own content, so identical requests "
    "get identical answers: to sample one prompt several times give each a seed, use n, or start the server with "
    "--deterministic-unseeded random. (Said once; vllm_deterministic_unseeded_requests_total counts.)"
)


_DISTRIBUTION = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "allowed_token_ids", "bad_words",
)  # fmt: skip
# Fields of the engine's parameters that are not promised, with their defaults: None, False and the like.
_UNPROVED = {
    name: getattr(SamplingParams(), name)
    for name in SamplingParams.__struct_fields__
    if not name.startswith("_") and name not in policy.SAMPLING_FIELDS
}


class _State:
    settings = Settings()
    server_seed = 0
    warned = False


def arm(settings: Settings, server_seed: int) -> None:
    """Installs the request seams in this front-end process. Idempotent. Raises SeamError."""
    _State.settings, _State.server_seed = settings, server_seed
    for name in ("chat", "completion"):
        compat.install(compat.REQUEST_SEAMS[name], _checked)
    compat.install(compat.REQUEST_SEAMS["responses"], lambda original: wire.named_in_metadata(_checked(original)))
    for name in ("chat_beam", "completion_beam"):
        compat.install(compat.REQUEST_SEAMS[name], _checked_beam)
    compat.install(compat.REQUEST_SEAMS["offline_beam"], _no_beam_search)
    compat.install(compat.REQUEST_SEAMS["completion_create"], _checked_first)
    compat.install(compat.REQUEST_SEAMS["process_inputs"], _seeded)


def _refuse(request: Any) -> None:
    """Raises VLLMValidationError for the first thing in an HTTP request that is not promised."""
    fields = type(request).model_fields
    stated = [
        name
        for name in request.model_fields_set & set(fields)
        if getattr(request, name) != fields[name].get_default(call_default_factory=True)
    ]
    if (field := policy.request_refusal(stated)) is not None:
        raise _not_proved(field, getattr(request, field))
    kinds = [tool.type for tool in getattr(request, "tools", None) or ()]
    if (unproved := policy.tools_refusal(kinds, getattr(request, "n", None) or 1)) is not None:
        raise refusal(unproved[1], parameter=unproved[0], reason="not_proved")


def _refuse_sampling(params: SamplingParams) -> None:
    """The same for whoever comes without such a request: `LLM.generate`, the token endpoints, a generation config."""
    # By identity: an array would be compared element by element. vLLM writes False or {} where nobody said anything.
    for name, plain in _UNPROVED.items():
        value = getattr(params, name)
        empty = value is None or value is False or (isinstance(value, Sized) and len(value) == 0)
        if value is not plain and not empty:
            raise _not_proved(name, value)


def _not_proved(field: str, value: Any) -> VLLMValidationError:
    """Becomes HTTP 400 with `param`."""
    message = f"{field!r} is not proved deterministic: leave it out, or ask a server without --deterministic"
    return refusal(message, parameter=field, reason="not_proved", value=value)


def _checked(to_sampling_params: Callable[..., SamplingParams]) -> Callable[..., SamplingParams]:
    """Runs before a stream's first byte, where a refusal still becomes HTTP 400."""

    @functools.wraps(to_sampling_params)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> SamplingParams:
        _refuse(self)
        params = to_sampling_params(self, *args, **kwargs)
        if _State.settings.unseeded == "random" and _needs_seed(params):
            params.seed = _fresh_seed()
            if (seeds := seeds_given.get()) is not None:
                seeds.append(params.seed)
        return params

    return wrapped


def _checked_beam(to_beam_search_params: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to_beam_search_params)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse(self)
        return to_beam_search_params(self, *args, **kwargs)

    return wrapped


def _no_beam_search(beam_search: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(beam_search)
    def wrapped(self: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        raise _not_proved("beam_search", params)

    return wrapped


def _checked_first(create_completion: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create_completion)
    async def wrapped(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse(request)
        return await create_completion(self, request, *args, **kwargs)

    return wrapped


def _needs_seed(params: SamplingParams) -> bool:
    return params.seed is None and params.sampling_type != SamplingType.GREEDY


def _fresh_seed() -> int:
    unseeded.labels("random").inc()
    return secrets.randbits(31)


def _seeded(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(process_inputs)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        if (params := request.sampling_params) is not None:
            _refuse_sampling(params)
            if _needs_seed(params):
                params.seed = _derived_seed(request) if _State.settings.unseeded == "derived" else _fresh_seed()
        wire.took(request)
        return request

    return wrapped


def _derived_seed(request: Any) -> int:
    unseeded.labels("derived").inc()
    if not _State.warned:
        _State.warned = True
        logger.warning(_UNSEEDED_WARNING)
    # What shapes the distribution, and nothing that says only how much of the answer is wanted or how it is delivered:
    # a longer answer continues the shorter one, and streaming changes nothing.
    shape = [getattr(request.sampling_params, name) for name in _DISTRIBUTION]
    content = msgspec.json.encode([list(request.prompt_token_ids), shape], order="deterministic")
    return derive_seed(_State.server_seed, content)
