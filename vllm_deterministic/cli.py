"""`vllm-deterministic`: the console command. Each subcommand lives beside what it is about."""

from __future__ import annotations

import argparse
import sys

from vllm_deterministic import __version__, bisect, doctor, linear_commands, models, presets
from vllm_deterministic.errors import DeterministicError
from vllm_deterministic.serving import replay
from vllm_deterministic.verify import command

__all__ = ["argument_parser", "main"]


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="vllm-deterministic", description="Deterministic serving for vLLM.")
    parser.add_argument("--version", action="version", version=f"vllm-deterministic {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for subcommand in (command, replay, doctor, presets, models, linear_commands, bisect):
        subcommand.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status; a mistake of the user's is one line on stderr and status 2."""
    args = argument_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except DeterministicError as error:
        print(f"vllm-deterministic: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
