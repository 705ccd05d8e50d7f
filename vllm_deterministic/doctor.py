"""`vllm-deterministic doctor`: what is installed here, whether the seams are there, and what would be served."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from itertools import chain
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from vllm_deterministic import __version__, compat, policy
from vllm_deterministic.errors import SeamError

__all__ = ["Finding", "add_parser", "findings", "run"]


class Finding(NamedTuple):
    """One line of the report. `fatal`: `--deterministic` would not start with it."""

    what: str
    value: str
    fatal: bool = False


def findings() -> Iterator[Finding]:
    """Everything `--deterministic` depends on in this environment, cheapest first. Loads vLLM where it is installed."""
    yield Finding("vllm-deterministic", __version__)
    plugins = [point.value for point in entry_points(group="vllm.general_plugins")]
    ours = "vllm_deterministic.plugin:register" in plugins
    yield Finding("registered as a vLLM plugin", "yes" if ours else "no: reinstall this package", not ours)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "deterministic" not in allowed.split(","):
        yield Finding("VLLM_PLUGINS", f"{allowed!r} leaves the plugin out: add 'deterministic'", True)
    try:
        yield Finding("vLLM", compat.vllm_version())
        from vllm.platforms import current_platform

        device = current_platform.device_type
    except (ImportError, SeamError) as missing:
        yield Finding("vLLM", f"not usable here ({missing}); the client commands work without it", True)
        return
    known = device in policy.ARCHITECTURES
    yield Finding("device", device if known else f"{device}: not proved yet", not known)
    if not known:
        return
    try:
        compat.require_version(device)
    except SeamError as reason:
        yield Finding("vLLM", str(reason), True)
    yield _card() if device == "cuda" else _processor()
    for refusal in policy.environment_refusals(device, os.environ):
        yield Finding("environment", str(refusal), True)
    of_device = compat.GPU_SEAMS if device == "cuda" else compat.CPU_SEAMS
    for seam in chain.from_iterable(
        seams.values() for seams in (compat.ENTRY_SEAMS, compat.REQUEST_SEAMS, compat.WIRE_SEAMS, of_device)
    ):
        try:
            compat.probe(seam)
            yield Finding(f"seam {seam.attribute}", seam.reason)
        except SeamError as reason:
            yield Finding(f"seam {seam.attribute}", str(reason), True)
    if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        yield Finding("C++ compiler", "none: install g++, or serve with --enforce-eager", True)
    yield Finding("model architectures", ", ".join(sorted(policy.ARCHITECTURES[device])))
    yield Finding("dtypes", ", ".join(sorted(policy.DTYPES[device])))
    yield Finding("refused: not proved", ", ".join(policy.refused_features()))
    for name, (_, why) in policy.ENVIRONMENT[device].items():
        yield Finding(f"refused: {name}", why)


def _processor() -> Finding:
    import torch

    from vllm_deterministic.kernels.gemm import cpu

    threads = f"{torch.get_num_threads()} thread(s)"
    name = cpu.machine({})["model name"] or "a processor without a name"
    return Finding("processor", f"{name}, {torch.backends.cpu.get_cpu_capability()}, {threads} in this process")


def _card() -> Finding:
    """The card, without starting CUDA in this process."""
    from vllm.platforms import current_platform

    name, capability = current_platform.get_device_name(), current_platform.get_device_capability()
    proved = capability is not None and (capability.major, capability.minor) in policy.CARDS
    known = ", ".join(policy.CARDS.values())
    return Finding("card", name if proved else f"{name}: not proved (proved: {known})", not proved)


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor", help="what is installed, which seams were found, what is supported here"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 0 where `--deterministic` would start, else 1."""
    del args
    table = Table("", "what", "found", title="vllm-deterministic doctor")
    fatal = False
    for finding in findings():
        fatal |= finding.fatal
        table.add_row("[red]✗[/red]" if finding.fatal else "[green]✓[/green]", finding.what, finding.value)
    Console().print(table)
    return int(fatal)
