"""The command line: `--deterministic` and its companions; what the engine must know goes into `additional_config`."""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any

from vllm_deterministic import policy
from vllm_deterministic.contract import NUMERICS_VERSIONS, UNSEEDED_MODES, Settings
from vllm_deterministic.errors import ConfigurationError
from vllm_deterministic.serving.signing import load_signer

__all__ = ["add_arguments"]

_SEED_HEADER = "vllm_deterministic.integration.middleware.SeedHeader"
_CONTRACT = "vllm_deterministic.integration.contract_middleware.Contract"
_VALUE_GIVEN = "argument --deterministic: ignored explicit argument"
_NO_VALUE = "--deterministic takes no value: give it alone to switch determinism on, leave it out otherwise"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to `parser` and folds what they say into `additional_config` once everything is parsed.

    Folding happens after parsing, so it does not matter whether `--additional-config` or a `--config` file says its
    part earlier or later. Does nothing on a parser that has the options already.
    """
    if "--deterministic" in parser._option_string_actions:
        return
    group = parser.add_argument_group(
        "Deterministic serving", "The same request gives the same bits, whoever else is being served."
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        default=False,
        help="Serve deterministically: answers depend on the weights, the request and the server's answer-changing "
        "settings only. What cannot be promised is refused.",
    )
    group.add_argument(
        "--deterministic-numerics",
        metavar="VERSION",
        default=None,
        help=f"Version of the frozen reduction trees: {', '.join(NUMERICS_VERSIONS)} (the newest by default).",
    )
    group.add_argument(
        "--deterministic-unseeded",
        metavar="MODE",
        default=None,
        help=f"Seed of a request at temperature > 0 that brings none: {' or '.join(UNSEEDED_MODES)}. derived (the "
        "default) computes it from the request's own content, so identical requests give identical answers; random "
        "draws a fresh one and returns it in the header x-vllm-deterministic-seed.",
    )
    group.add_argument(
        "--deterministic-date",
        metavar="YYYY-MM-DD",
        default=None,
        help="The day that chat templates see. Without it, a request whose chat template asks for the day is refused.",
    )
    group.add_argument(
        "--deterministic-signing-key",
        metavar="FILE",
        default=None,
        help="Ed25519 private key (PEM, unencrypted) that signs receipts; GET /deterministic names its public key.",
    )
    group.add_argument(
        "--deterministic-self-check",
        metavar="MINUTES",
        type=float,
        default=None,
        help="Repeat one request every so many minutes beside whatever is being served, and compare its bits; a "
        "difference is logged and counted (vllm_deterministic_self_checks_total).",
    )
    group.add_argument(
        "--deterministic-self-check-stop",
        action="store_true",
        default=None,
        help="A self-check that differs stops the promise: answers carry no fingerprint any more, and requests that "
        "require determinism get 503.",
    )
    _fold_after_parsing(parser)


def _fold_after_parsing(parser: argparse.ArgumentParser) -> None:
    parse_known_args, error = parser.parse_known_args, parser.error

    def folding(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = parse_known_args(*args, **kwargs)
        given = [word for flag, word in itertools.pairwise(args[0] if args else ()) if flag == "--deterministic"]
        if any(word in rest and not word.startswith("-") for word in given):
            error(_NO_VALUE)  # else the parser above would say that it does not know the value
        try:
            _fold(namespace)
        except ConfigurationError as reason:
            error(str(reason))
        return namespace, rest

    def explaining(message: str) -> Any:
        if message.startswith(_VALUE_GIVEN):
            message = _NO_VALUE
        error(message)

    # On the instance: other parsers of the process keep argparse's behaviour.
    parser.parse_known_args = folding  # type: ignore[method-assign,assignment]
    parser.error = explaining  # type: ignore[method-assign]


def _fold(namespace: argparse.Namespace) -> None:
    given = {
        name: value
        for name in ("numerics", "unseeded", "date", "signing_key", "self_check", "self_check_stop")
        if (value := getattr(namespace, f"deterministic_{name}", None)) is not None
    }
    if hasattr(namespace, "middleware") and _CONTRACT not in (namespace.middleware or []):
        # Also without the flag: a request that requires determinism must be told that it gets none.
        namespace.middleware = [*(namespace.middleware or []), _CONTRACT]
    if not getattr(namespace, "deterministic", False):
        if given:
            raise ConfigurationError(f"--deterministic-{next(iter(given)).replace('_', '-')} needs --deterministic")
        return
    if getattr(namespace, "grpc", False):
        raise ConfigurationError("--deterministic does not cover the gRPC server yet: serve without --grpc")
    policy.refuse(policy.front_end_refusals(vars(namespace)))
    if (key := given.pop("signing_key", None)) is not None:
        load_signer(key)  # a mistake is told before the model is loaded
    _check_self_check(given.pop("self_check", None), bool(given.pop("self_check_stop", None)), namespace)
    settings = Settings(**given)
    namespace.additional_config = settings.merged_into(getattr(namespace, "additional_config", None))
    if settings.unseeded == "random" and hasattr(namespace, "middleware"):
        namespace.middleware = [*namespace.middleware, _SEED_HEADER]


def _check_self_check(minutes: float | None, stops: bool, namespace: argparse.Namespace) -> None:
    if minutes is not None and not 0 < minutes < math.inf:
        raise ConfigurationError(f"--deterministic-self-check: {minutes:g} is no number of minutes above 0")
    if stops and minutes is None:
        raise ConfigurationError("--deterministic-self-check-stop needs --deterministic-self-check MINUTES")
    # Where nobody says how many, vLLM starts one API server for each data parallel rank behind this server.
    fronts = getattr(namespace, "api_server_count", None) or getattr(namespace, "data_parallel_size", None) or 1
    if stops and fronts > 1:
        raise ConfigurationError(
            "--deterministic-self-check-stop: the other API servers would go on promising; add --api-server-count 1"
        )
