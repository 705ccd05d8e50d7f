"""`vllm-deterministic replay`: repeats a receipt's request on any server and says whether the bits are the same.

The chains are built here, from the token ids and logprobs that the server sends: a server is not asked to vouch for
itself. It need not be deterministic, nor have this plugin; it must send token ids (vLLM does).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pydantic

from vllm_deterministic.errors import ConfigurationError
from vllm_deterministic.serving.fingerprint import differing_parts
from vllm_deterministic.serving.receipts import (
    Chain,
    ChoiceReceipt,
    Divergence,
    Receipt,
    first_divergence,
    prompt_digest,
)
from vllm_deterministic.serving.signing import signature_holds

__all__ = ["Replay", "add_parser", "choices_of", "find_receipt", "replay", "run"]


class Replay(pydantic.BaseModel):
    """What came of a replay. reasons: fingerprint parts in which the two servers differ; None where it names none."""

    same_prompt: bool
    divergences: list[Divergence]
    reasons: list[str] | None

    @property
    def same_bits(self) -> bool:
        return self.same_prompt and not self.divergences


def find_receipt(text: str) -> Receipt:
    """The receipt in a file's text: itself, an answer that carries it, or a stream's events.

    Raises ConfigurationError where there is none, or one that does not follow the schema.
    """
    events = [line[len("data: ") :] for line in text.splitlines() if line.startswith("data: {")]
    for candidate in events[::-1] or [text]:
        try:
            found = json.loads(candidate)
        except ValueError as error:
            raise ConfigurationError(f"no receipt: {error}") from error
        if isinstance(found, dict) and isinstance(inner := found.get("deterministic"), dict):
            found = inner.get("receipt")
        elif events:
            continue
        try:
            return Receipt.model_validate(found)
        except pydantic.ValidationError as error:
            raise ConfigurationError(f"no receipt: {error}") from error
    raise ConfigurationError("no receipt: none of the stream's events carries one")


def choices_of(answer: Mapping[str, Any]) -> tuple[str, list[ChoiceReceipt]]:
    """The prompt's digest and the chains of an answer, as JSON, that has token ids and logprobs.

    Raises ConfigurationError where it has not.
    """
    chains = []
    prompt_ids = answer.get("prompt_token_ids")
    for choice in answer["choices"]:
        prompt_ids = prompt_ids or choice.get("prompt_token_ids")
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs") or {}
        scores = logprobs.get("token_logprobs")
        if scores is None:
            scores = [entry["logprob"] for entry in logprobs.get("content") or ()]
        if ids is None or prompt_ids is None or len(ids) != len(scores):
            raise ConfigurationError("the answer does not have the token ids and logprobs of every token")
        # The engine stopped; that the text is a call was found by the parser behind it.
        reason = "stop" if choice["finish_reason"] == "tool_calls" else choice["finish_reason"]
        chains.append((choice["index"], ids, scores, reason))
    prompt = prompt_digest(prompt_ids or ())
    built = []
    for index, ids, scores, reason in chains:
        chain = Chain(prompt, index)
        chain.add(ids, scores)
        built.append(chain.finish(reason))
    return prompt, sorted(built, key=lambda choice: choice.index)


def replay(receipt: Receipt, url: str, *, api_key: str = "EMPTY", model: str | None = None) -> Replay:
    """Repeats the receipt's request at `url` (the server's root, or its /v1).

    model: the name that the server knows it by, where that is another one. Raises openai.APIError as the client does,
    ConfigurationError for a server that sends no token ids.
    """
    root = url.rstrip("/").removesuffix("/v1")
    body = dict(receipt.request.body) | {"return_token_ids": True}
    if model is not None:
        body["model"] = model
    if receipt.request.path.endswith("/chat/completions"):
        body |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0}
    else:
        body |= {"logprobs": body.get("logprobs") or 0, "echo": False}  # an echoed prompt is none of the answer
    here = urlsplit(root).hostname in ("127.0.0.1", "localhost", "::1")
    with openai.OpenAI(
        base_url=root, api_key=api_key, max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=not here)
    ) as client:
        try:
            there: Any = client.get("/deterministic", cast_to=object)
        except openai.APIStatusError:
            there = None
        answer: Any = client.post(receipt.request.path, body=body, cast_to=object)
    prompt, choices = choices_of(answer)
    parts = there.get("parts") if isinstance(there, dict) else None
    return Replay(
        same_prompt=prompt == receipt.prompt.digest,
        divergences=[
            parted
            for ours, theirs in zip(receipt.choices, choices, strict=True)
            if (parted := first_divergence(ours, theirs)) is not None
        ],
        reasons=differing_parts(receipt.parts, parts) if parts is not None else None,
    )


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "replay", help="repeat a receipt's request on a server; compare bit by bit"
    )
    parser.add_argument("receipt", help="file with a receipt, or with the answer that carries it; - reads stdin")
    parser.add_argument("--url", required=True, help="the server, for example http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="EMPTY")
    parser.add_argument("--model", help="the model's name there, where it is another one")
    parser.add_argument("--public-key", metavar="HEX", help="refuse a receipt that this Ed25519 key has not signed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the verdict. Status 0: same bits; 1: they differ, or the signature does not hold."""
    try:
        text = sys.stdin.read() if args.receipt == "-" else Path(args.receipt).read_text()
    except OSError as error:
        raise ConfigurationError(f"{args.receipt}: {error.strerror or error}") from error
    receipt = find_receipt(text)
    if (receipt.signature is not None or args.public_key) and not signature_holds(receipt, args.public_key):
        print("signature: does not hold; the receipt is not what the server signed")
        return 1
    try:
        result = replay(receipt, args.url, api_key=args.api_key, model=args.model)
    except openai.APIError as error:
        raise ConfigurationError(f"{args.url}: {error}") from error
    print("\n".join(_lines(receipt, result)))
    return 0 if result.same_bits else 1


def _lines(receipt: Receipt, result: Replay) -> list[str]:
    tokens = sum(choice.tokens for choice in receipt.choices)
    if result.same_bits:
        lines = [f"same bits: {len(receipt.choices)} choice(s), {tokens} tokens and their logprobs"]
    elif not result.same_prompt:
        lines = ["differs: the prompt's token ids are others (tokenizer or chat template)"]
    else:
        lines = [f"differs: choice {d.index}, {d.what} from position {d.position}" for d in result.divergences]
    if result.reasons is None:
        lines.append("the server promises nothing: it has no GET /deterministic")
    elif result.reasons:
        lines.append("the server differs in: " + ", ".join(result.reasons))
    else:
        lines.append(f"the server has the same fingerprint, {receipt.fingerprint}")
    return lines
