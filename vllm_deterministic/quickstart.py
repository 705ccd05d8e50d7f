"""The defect and the cure on this machine: one request among many, served without and with `--deterministic`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_deterministic import models
from vllm_deterministic.errors import DeterministicError
from vllm_deterministic.verify.probes import Answer, Comparison, Probe, compare, run_load
from vllm_deterministic.verify.server import Server, serve

__all__ = ["main"]

PROMPT = (
    "A lighthouse keeper finds a map behind a loose brick. The map shows an island that no sailor has ever named. "
    "Tell the story of how he decides whether to look for it."
)
TOKENS = 64
# The server is quiet at times and busy at others, as servers are: the request alone, then two copies among others.
QUIET, BUSY = 8, 8
PROBES = QUIET + 2 * BUSY
console = Console()


@dataclass(frozen=True)
class Side:
    """What one server gave."""

    name: str
    answers: list[Answer]
    comparison: Comparison
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Returns 0 where the deterministic server gave one answer, 1 where it did not, 2 for a user's mistake."""
    args = _arguments(argv)
    try:
        with console.status("making the default model") if args.model is None else contextlib.nullcontext():
            model = str(args.model or models.prepare_default_model(dtype=args.dtype))
        logs = Path(tempfile.mkdtemp(prefix="vllm-deterministic-"))
        with _server(model, args, logs / "default.log") as server:
            default = _ask("default", server, args.requests)
        with _server(model, args, logs / "deterministic.log", "--deterministic") as server:
            ours = _ask("--deterministic", server, args.requests)
            _show(default, ours, args.requests)
            if not args.once:
                _leave_running(server)
    except DeterministicError as error:
        console.print(Text(f"quickstart: {error}", style="red"))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if ours.comparison.identical else 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument("--model", metavar="HF_ID_OR_PATH", help="default: SmolLM2-135M-Instruct out of a wheel")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--dtype", choices=models.DTYPES, default="bfloat16")
    parser.add_argument("--requests", type=int, default=200, help="requests sent to each server (default 200)")
    parser.add_argument("--once", action="store_true", help="exit after the table instead of serving on")
    args = parser.parse_args(argv)
    if args.requests < 2 * PROBES:
        parser.error(f"--requests must be {2 * PROBES} or more: {PROBES} of them are the one that is compared")
    if args.model is not None and (wrong := _wrong_folder(args.model)):
        parser.error(f"--model {args.model}: {wrong}")
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port {args.port} is no TCP port")
    return args


def _wrong_folder(model: str) -> str | None:
    """What is wrong with a model given as a path; None where nothing is, or where it is a Hugging Face id."""
    folder = Path(model)
    if folder.is_dir():
        return None if (folder / "config.json").exists() else "this folder holds no config.json"
    if folder.exists():
        return "this is a file: name the folder of a Hugging Face model"
    is_path = model.startswith(("/", ".", "~")) or model.count("/") > 1
    return "there is no such folder" if is_path else None


@contextlib.contextmanager
def _server(model: str, args: argparse.Namespace, log: Path, *flags: str) -> Iterator[Server]:
    options = ["--dtype", args.dtype, "--max-model-len", "2048", "--max-num-seqs", "32", *flags]
    label = " ".join(["vllm serve", Path(model).name, *flags])
    # The spinner covers the start alone: serve() returns control once the server answers.
    with contextlib.ExitStack() as stack:
        with console.status(f"starting {label} (about a minute; log: {log})"):
            start = time.monotonic()
            served = serve(model, *options, env={"VLLM_CPU_KVCACHE_SPACE": "1"}, log=log, port=args.port, timeout=900)
            server = stack.enter_context(served)
        console.print(f"[green]✓[/green] {label}: ready after {time.monotonic() - start:.0f} s")
        yield server


def _ask(name: str, server: Server, requests: int) -> Side:
    """Sends the probe PROBES times among `requests` in all; who the others are is the same for both servers."""
    probe = Probe("quickstart", prompt=PROMPT, max_tokens=TOKENS, logprobs=1, extra_body={"ignore_eos": True})
    others = requests - PROBES
    start = time.monotonic()
    answers: list[Answer] = []
    with console.status(f"{name}: {requests} requests, {PROBES} of them the same one"):
        for group in range(BUSY):
            crowd = others * (group + 1) // BUSY - others * group // BUSY
            for copies, neighbours in ((QUIET // BUSY, 0), (2, crowd)):
                load = run_load(server.endpoint, probe, copies, copies, neighbours, seed=group)
                answers += asyncio.run(load)
    return Side(name, answers, compare(answers), time.monotonic() - start)


def _show(default: Side, ours: Side, requests: int) -> None:
    table = Table(title=f"{PROBES} times the same request among {requests}", title_justify="left")
    table.add_column("")
    for side in (default, ours):
        table.add_column(side.name, justify="right")
    rows = {
        "distinct answers": lambda side: side.comparison.distinct_tokens,
        "distinct logprob sequences": lambda side: side.comparison.distinct_logprobs,
        "first token that differs": lambda side: side.comparison.first_text_divergence,
        "first logprob that differs": lambda side: side.comparison.first_logprob_divergence,
        "seconds for all requests": lambda side: f"{side.seconds:.1f}",
    }
    for what, of in rows.items():
        table.add_row(what, *("none" if of(side) is None else str(of(side)) for side in (default, ours)))
    console.print(table)
    texts = sorted({answer.text for answer in default.answers})[:3]
    if len(texts) > 1:
        console.print("Without the flag the one request was answered, among others:")
        for text in texts:
            console.print(Text("  … " + text.strip().replace("\n", " "), style="dim"))


def _leave_running(server: Server) -> None:
    console.print(f"\nServing deterministically on {server.base_url} until Ctrl-C. Try:")
    console.print(
        f"  curl -s {server.base_url}/completions -H 'Content-Type: application/json' \\\n"
        f"""    -d '{{"model": "{server.model}", "prompt": "The sea", "max_tokens": 16}}'""",
        soft_wrap=True,
        highlight=False,
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.process.wait()


if __name__ == "__main__":
    sys.exit(main())
