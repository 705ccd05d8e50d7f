"""What an endpoint can do, found out by asking it: the model, the two APIs, logprobs, token ids, seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from vllm_deterministic.verify.probes import Answer, Endpoint, Probe
from vllm_deterministic.verify.report import EndpointFacts
from vllm_deterministic.verify.session import (
    Broken,
    EndpointError,
    Refused,
    Session,
    TransportError,
    cause_of,
    message_of,
)

__all__ = ["Api", "Capabilities", "base_urls", "discover", "find_model"]

QUESTION = "The three things a lighthouse keeper counts every night are"
# The number of top logprobs asked for: OpenAI's completions give 5 at most.
TOP = 3


@dataclass(frozen=True)
class Api:
    """How requests to one of the two APIs may look. `refusal`: what the endpoint said where it offers none."""

    offered: bool
    logprobs: int | None = None
    extensions: bool = False
    refusal: str = ""


@dataclass(frozen=True)
class Capabilities:
    completions: Api
    chat: Api
    token_ids: bool
    seeds: bool
    seeds_reason: str
    server: str
    max_model_len: int | None
    fingerprint: str | None = None
    parts: Mapping[str, Any] | None = None

    @property
    def api(self) -> Api:
        """The API that most families use: completions where there are both."""
        return self.completions if self.completions.offered else self.chat

    @property
    def use_chat(self) -> bool:
        return not self.completions.offered

    @property
    def salts(self) -> bool:
        """Whether cache_salt is understood: servers that return token ids on request are vLLM's kind."""
        return self.token_ids and self.api.extensions

    def facts(self, endpoint: Endpoint) -> EndpointFacts:
        return EndpointFacts(
            url=endpoint.base_url,
            model=endpoint.model,
            server=self.server,
            completions=self.completions.offered,
            chat=self.chat.offered,
            logprobs=self.api.logprobs is not None,
            token_ids=self.token_ids,
            extensions=self.api.extensions,
            seeds=self.seeds,
            max_model_len=self.max_model_len,
            fingerprint=self.fingerprint,
            numerics_id=(self.parts or {}).get("numerics_id"),
        )


def base_urls(url: str) -> list[str]:
    """The base URLs that `url` may mean, most likely first. Raises EndpointError for something that is no URL."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(f"{url!r} is no URL of an OpenAI endpoint: write it like http://127.0.0.1:8000/v1")
    path = parts.path.rstrip("/")
    for tail in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(tail)
    plain = parts._replace(path=path, query="", fragment="").geturl()
    return [plain] if path.endswith("/v1") else [f"{plain}/v1", plain]


async def find_model(url: str, model: str | None, api_key: str, timeout: float) -> tuple[Endpoint, str, int | None]:
    """The endpoint, who serves it, and its context length where told. Raises EndpointError with what to change."""
    answers = []
    for base_url in base_urls(url):
        endpoint = Endpoint(base_url, model or "", api_key, timeout)
        async with endpoint.client() as client:
            try:
                raw = await client.models.with_raw_response.list()
                page = raw.parse()
                served = {str(card.id): card for card in page.data or ()}
            except openai.APIConnectionError as error:
                raise EndpointError(
                    f"cannot reach {base_url}: {cause_of(error)}. Is the server up, and the URL right?"
                ) from error
            except openai.APIStatusError as error:
                if error.status_code in (401, 403):
                    raise EndpointError(
                        f"{base_url} refuses the API key (HTTP {error.status_code}: {message_of(error)}). Put the key "
                        "into an environment variable and name it with --api-key-env NAME"
                    ) from error
                answers.append(f"{base_url}/models: HTTP {error.status_code}")
                continue
            except (openai.APIError, TransportError, AttributeError, TypeError, ValueError) as error:
                answers.append(f"{base_url}/models: no list of models ({type(error).__name__})")
                continue
        if model is None:
            if len(served) != 1:
                names = ", ".join(list(served)[:12]) or "none"
                raise EndpointError(f"{base_url} serves {len(served)} models: name one with --model ({names})")
            model = next(iter(served))
        card: Any = served.get(model)
        owner = str(getattr(card, "owned_by", "") or "")
        server = " / ".join(part for part in (raw.headers.get("server", ""), owner) if part)
        length = getattr(card, "max_model_len", None)
        return dataclasses.replace(endpoint, model=model), server, length if isinstance(length, int) else None
    if model is not None:  # some gateways list no models
        return Endpoint(base_urls(url)[0], model, api_key, timeout), "", None
    raise EndpointError(f"no OpenAI API at {url} ({'; '.join(answers)}). Name the base URL, and --model if needed")


async def discover(session: Session, server: str, max_model_len: int | None) -> Capabilities:
    """Asks a handful of short requests. Raises EndpointError where neither API answers."""
    completions, first = await _api(session, chat=False)
    chat, second = await _api(session, chat=True)
    if not completions.offered and not chat.offered:
        raise EndpointError(
            f"{session.endpoint.base_url} answers no request for model {session.endpoint.model!r}. Completions: "
            f"{completions.refusal}. Chat: {chat.refusal}. Check the URL and --model"
        )
    found = Capabilities(completions, chat, False, False, "", server, max_model_len)
    sample = first or second
    token_ids = bool(sample and sample.token_ids)
    session.endpoint = dataclasses.replace(session.endpoint, token_ids=found.api.extensions)
    seeds, reason = await _seeds(session, found)
    fingerprint, parts = await _promise(session.endpoint)
    return dataclasses.replace(
        found, token_ids=token_ids, seeds=seeds, seeds_reason=reason, fingerprint=fingerprint, parts=parts
    )


async def _promise(endpoint: Endpoint) -> tuple[str | None, Mapping[str, Any] | None]:
    """Fingerprint and parts of a server that promises something. Nothing depends on it: it is told, not believed."""
    async with endpoint.client() as client:
        try:
            said: Any = await client.get(f"{endpoint.base_url.removesuffix('/v1')}/deterministic", cast_to=object)
        except (openai.APIError, TransportError, ValueError):
            return None, None
    fingerprint, parts = (said.get("fingerprint"), said.get("parts")) if isinstance(said, dict) else (None, None)
    return (fingerprint, parts) if isinstance(fingerprint, str) and isinstance(parts, dict) else (None, None)


async def _api(session: Session, chat: bool) -> tuple[Api, Answer | None]:
    """The richest form of request that this API accepts, and what it answered."""
    refusal = ""
    for extensions, logprobs in ((True, TOP), (False, TOP), (True, None), (False, None)):
        session.endpoint = dataclasses.replace(session.endpoint, token_ids=extensions)
        extra = {"ignore_eos": True, "top_k": 50} if extensions else {}
        probe = Probe("discover", QUESTION, max_tokens=4, logprobs=logprobs, chat=chat, extra_body=extra)
        try:
            (answer, *_), _ = await session.ask(probe)
        except Refused as error:
            refusal = str(error)
            continue
        except Broken as error:
            if "no OpenAI completion" in str(error) or "HTTP 5" in str(error):
                refusal = str(error)  # some servers answer an unknown parameter with HTTP 500
                continue
            raise EndpointError(str(error)) from error
        return Api(True, logprobs if answer.logprobs else None, extensions), answer
    return Api(False, refusal=refusal), None


async def _seeds(session: Session, found: Capabilities) -> tuple[bool, str]:
    """Whether `seed` does anything: the control of every seeded probe."""
    texts = set()
    for seed in range(1, 5):
        probe = Probe("seeds", QUESTION, max_tokens=16, temperature=1.0, seed=seed, chat=found.use_chat, logprobs=None)
        try:
            (answer, *_), _ = await session.ask(probe)
        except (Refused, Broken) as error:
            return False, f"seeded requests are refused: {error}"
        texts.add(answer.text)
        if len(texts) > 1:
            return True, ""
    return False, "four seeds gave one answer at temperature 1: the seed, or the temperature, is ignored"
