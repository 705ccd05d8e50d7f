"""`vllm-deterministic verify` and `demo`: arguments in, exit status out. The work is imported when it is needed."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from vllm_deterministic.errors import ConfigurationError, DeterministicError

__all__ = ["add_parser", "demo", "verify"]

SECONDS_BETWEEN_FILES = 5.0


def add_parser(subparsers: Any) -> None:
    """Adds both subcommands."""
    _add_verify(subparsers)
    _add_demo(subparsers)


def _add_verify(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify",
        help="ask any OpenAI endpoint whether it is deterministic",
        description="Asks an OpenAI endpoint the same requests in many ways, while it is loaded, and compares the "
        "answers bit by bit. Exit status: 0 the same, 1 they differ, 2 could not tell.",
    )
    _connection(parser)
    parser.add_argument("--level", choices=("quick", "standard", "deep"), default="standard")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.json, report.html and junit.xml there")
    parser.add_argument("--against", metavar="URL2", help="a second endpoint that must answer the same")
    parser.add_argument("--against-model", metavar="M", help="its model, where it has another name")
    parser.add_argument("--against-api-key-env", metavar="NAME", help="its key (default: the first endpoint's)")
    parser.add_argument("--families", metavar="A,B", help="only these probe families")
    parser.add_argument("--require", metavar="A,B|all", help="families that must have told for exit status 0")
    parser.add_argument("--max-requests", type=int, metavar="N")
    parser.add_argument("--max-seconds", type=float, metavar="S")
    parser.add_argument("--tokens", type=int, metavar="N", help="deep: compare this many tokens (default 1,000,000)")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="deep: ask N rounds at once (default 1)")
    parser.add_argument("--seed", type=int, help="of the prompts, neighbours and order (default: a fresh one)")
    parser.add_argument("--fail-fast", action="store_true", help="end at the first difference")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=verify)


def _add_demo(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="one prompt, many times at temperature 0: how many different answers?",
        description="Sends one prompt N times at temperature 0 and draws how many different answers there were, and "
        "where they parted. Exit status: 0 one answer, 1 several.",
    )
    _connection(parser)
    parser.add_argument("--n", type=int, default=1000, help="how often (default 1000)")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once (default 64)")
    parser.add_argument("--tokens", type=int, default=200, help="length of an answer (default 200)")
    parser.add_argument("--prompt", default="Tell me about Richard Feynman")
    parser.add_argument("--report", type=Path, metavar="DIR", default=Path("demo"), help="default: ./demo")
    parser.set_defaults(run=demo)


def _connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="base URL, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--model", metavar="M", help="needed where the endpoint serves several")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a request may take (600)")


def _key(name: str | None, default: str | None = None) -> str | None:
    if name is None:
        return default
    if not os.environ.get(name):
        raise ConfigurationError(f"--api-key-env {name}: the environment has no variable {name}, or it is empty")
    return os.environ[name]


def _names(value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


def verify(args: argparse.Namespace) -> int:
    """Runs the probes, shows and writes the report; returns 0 same, 1 differs, 2 could not tell."""
    import asyncio

    from rich.console import Console

    from vllm_deterministic.verify import live, output
    from vllm_deterministic.verify.runner import Plan, Run

    plan = Plan(
        url=args.url,
        model=args.model,
        api_key=_key(args.api_key_env) or "EMPTY",
        level=args.level,
        against=args.against,
        against_model=args.against_model,
        against_api_key=_key(args.against_api_key_env),
        families=_names(args.families),
        require=_names(args.require),
        max_requests=args.max_requests,
        max_seconds=args.max_seconds,
        tokens=args.tokens,
        parallel=args.parallel,
        timeout=args.timeout,
        seed=args.seed,
        fail_fast=args.fail_fast,
    )
    console = Console(quiet=args.quiet)
    folder: Path | None = args.report
    if folder is not None:
        output.prepare(folder)

    written = 0.0
    with live.Display(console, args.quiet) as display:

        def finished(run: Run) -> None:
            display.finished(run)
            nonlocal written
            if folder is not None and time.monotonic() - written > SECONDS_BETWEEN_FILES:
                written = time.monotonic()
                # What is known so far, should the process be killed; a full disk is told of at the end.
                with contextlib.suppress(output.OutputError):
                    output.write(run.report(), folder)

        try:
            report = asyncio.run(Run(plan, display.moved, finished).run())
        except KeyboardInterrupt:
            raise DeterministicError("interrupted before anything was compared") from None
    live.show_summary(console, report)
    if folder is not None:
        try:
            output.write(report, folder)
        except output.OutputError as error:
            # The verdict stands; only its paper is missing.
            print(f"vllm-deterministic: {error}", file=sys.stderr)
            return report.exit_code or 2
        console.print(f"  report: {folder / 'report.html'}", style="dim", soft_wrap=True, highlight=False)
    return report.exit_code


def demo(args: argparse.Namespace) -> int:
    """Runs the classic experiment and draws it; returns 0 for one answer, 1 for several, 2 where none came back."""
    import asyncio

    from rich.console import Console

    from vllm_deterministic.verify import demo as experiment
    from vllm_deterministic.verify import output

    for option in ("n", "concurrency", "tokens"):
        if getattr(args, option) < 1:
            raise ConfigurationError(f"--{option} {getattr(args, option)}: 1 or more")
    output.prepare(args.report)
    console = Console()
    try:
        result = asyncio.run(
            experiment.run(
                console, args.url, args.model, _key(args.api_key_env) or "EMPTY", args.timeout, prompt=args.prompt,
                n=args.n, concurrency=args.concurrency, tokens=args.tokens,
            )
        )  # fmt: skip
    except KeyboardInterrupt:
        raise DeterministicError("interrupted before the first answer") from None
    experiment.show(console, result)
    experiment.write(result, args.report)
    console.print(f"  {args.report / 'demo.html'}", style="dim", soft_wrap=True, highlight=False)
    return 0 if result.distinct == 1 else 1
