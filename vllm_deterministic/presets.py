"""`vllm-deterministic preset`: where the configuration files for `vllm serve --config` lie."""

from __future__ import annotations

import argparse
from typing import Any

from vllm_deterministic.configs import serve_presets

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "preset", help="print the path of a preset for `vllm serve --config`"
    )
    parser.add_argument("name", choices=sorted(serve_presets()))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the file's path."""
    print(serve_presets()[args.name])
    return 0
