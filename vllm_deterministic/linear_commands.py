"""`vllm-deterministic certify` and `tune`: linear layers on this card, without starting a server."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_deterministic.errors import ConfigurationError, UnsupportedError

if TYPE_CHECKING:
    from vllm_deterministic.kernels.gemm.tree import Problem

__all__ = ["add_parser", "model_problems"]


def add_parser(subparsers: Any) -> None:
    for name, run, what in (
        ("certify", _certify, "check every schedule of a model's linear layers on this card, bit for bit"),
        ("tune", _tune, "find the fastest schedules for a model's linear layers on this card; cannot change a bit"),
    ):
        parser: argparse.ArgumentParser = subparsers.add_parser(name, help=what, description=what)
        parser.add_argument("--model", help="Hugging Face id or folder, whose layers are taken")
        parser.add_argument("--shape", action="append", default=[], metavar="NxK", help="a weight shape; may repeat")
        parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
        parser.add_argument("--bias", action="store_true", help="the shapes given by --shape have a bias")
        if name == "certify":
            parser.add_argument("--max-m", type=int, default=8192, help="largest number of rows (8192)")
            parser.add_argument("--fresh", action="store_true", help="do not use a cached certificate")
        parser.set_defaults(run=run)


def _problems(args: argparse.Namespace) -> list[Problem]:
    try:
        import torch
    except ImportError as missing:
        raise UnsupportedError(f"this command needs PyTorch and a CUDA card: {missing}") from missing
    if not torch.cuda.is_available():
        raise UnsupportedError("this command needs a CUDA card; on CPU the server certifies its layers when it starts")
    from vllm_deterministic.kernels.gemm.tree import Problem

    dtype = getattr(torch, args.dtype)
    found = []
    for shape in args.shape:
        if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)):
            raise ConfigurationError(f"--shape {shape!r} is no weight shape: write N x K as in 4096x12288")
        found.append(Problem(int(match[1]), int(match[2]), dtype, args.bias))
    if args.model:
        from transformers import AutoConfig

        found += model_problems(AutoConfig.from_pretrained(args.model), dtype)
    if not found:
        raise ConfigurationError("nothing to do: name a --model or a --shape")
    return list(dict.fromkeys(found))


def model_problems(config: Any, dtype: Any) -> Iterator[Problem]:
    """The linear layers of a dense Llama-like model as vLLM merges them: qkv, o, gate_up, down, lm_head.

    config: a transformers configuration. Raises UnsupportedError for one that does not describe such a model.
    """
    from vllm_deterministic.kernels.gemm.tree import Problem

    try:
        hidden, heads = config.hidden_size, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head = getattr(config, "head_dim", None) or hidden // heads
        inner, vocabulary = config.intermediate_size, config.vocab_size
    except AttributeError as missing:
        raise UnsupportedError(f"{type(config).__name__} describes no dense Llama-like model: {missing}") from missing
    attention_bias = bool(getattr(config, "attention_bias", False))
    yield Problem((heads + 2 * kv_heads) * head, hidden, dtype, attention_bias or config.model_type == "qwen2")
    yield Problem(hidden, heads * head, dtype, attention_bias)
    yield Problem(2 * inner, hidden, dtype, bool(getattr(config, "mlp_bias", False)))
    yield Problem(hidden, inner, dtype, bool(getattr(config, "mlp_bias", False)))
    yield Problem(-(-vocabulary // 64) * 64, hidden, dtype)  # vLLM pads the vocabulary


def _certify(args: argparse.Namespace) -> int:
    """Prints what was certified; returns 1 where a shape has no schedule left, or one family only."""
    problems = _problems(args)
    import torch

    from vllm_deterministic.errors import CertificationError
    from vllm_deterministic.kernels.gemm.dispatch import prepare

    table = Table("layer", "schedule", "row counts on the tree", "seconds", title=torch.cuda.get_device_name())
    failed = False
    for problem in track(problems, description="certifying"):
        try:
            found = prepare(problem, args.max_m, torch.device("cuda", torch.cuda.current_device()), fresh=args.fresh)
        except CertificationError as reason:
            table.add_row(str(problem), "[red]none[/red]", str(reason), "")
            failed = True
            continue
        for name, spans in found.schedules.items():
            table.add_row(str(problem), name, _spans(spans), f"{found.seconds:.1f}")
        for name, why in found.dropped.items():
            table.add_row(str(problem), f"[yellow]{name}[/yellow]", why, "")
        failed |= len({name.split()[0] for name in found.schedules}) < 2
    Console().print(table)
    return int(failed)


def _spans(spans: list[tuple[int, int]], most: int = 4) -> str:
    said = [f"{first}" if first == last else f"{first}-{last}" for first, last in spans]
    return ", ".join(said[:most]) + (f" and {len(said) - most} more" if len(said) > most else "")


def _tune(args: argparse.Namespace) -> int:
    problems = _problems(args)
    import torch

    from vllm_deterministic.kernels.gemm import tune

    console = Console()
    device = torch.device("cuda", torch.cuda.current_device())
    with console.status("compiling the candidates"):
        for failure in tune.compile_all(problems[0].dtype, any(problem.bias for problem in problems)):
            console.print(f"not on this card: {failure}", style="dim")
    for problem in track(problems, description="tuning", console=console):
        sizes = [m for m in tune.SIZES if m <= 1024 or problem.n < 100_000]  # a vocabulary sees sampled rows only
        path = tune.write_table({problem: tune.tune(problem, device, sizes)}, torch.cuda.get_device_name(device))
    console.print(f"written: {path}")
    return 0
