"""Quality: perplexity of a text under `--deterministic`, under the default engine, and in float32.

Each engine is a process of its own and reads the text as prompts, in windows, from the same bf16 weights; float32 is
transformers' model with these weights. The text is this repository's own documentation unless files are named.

usage: benchmarks/perplexity.py MODEL_FOLDER [FILE ...] [--window 1024] [--tokens 32768] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from report import machine, write

HERE = Path(__file__).parent
SUM = "sum of logprobs: "
ENGINES: dict[str, dict[str, Any]] = {"default": {}, "ours": {"additional_config": {"vllm_deterministic": {}}}}


def windows(model: str, files: Sequence[Path], window: int, most: int) -> list[list[int]]:
    """The text's first `most` tokens, in pieces of `window` or a little less; no piece of one token."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model).encode("\n".join(file.read_text() for file in files))[:most]
    return [piece for at in range(0, len(ids), window) if len(piece := ids[at : at + window]) > 1]


def in_engine(model: str, options: dict[str, Any], pieces: list[list[int]]) -> float:
    """The sum of every piece's logprobs, its first token's left out."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, max_model_len=len(pieces[0]) + 1, gpu_memory_utilization=0.3, max_logprobs=1, **options)
    ask = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": piece} for piece in pieces], ask, use_tqdm=False)
    return math.fsum(
        row[token].logprob
        for piece, output in zip(pieces, outputs, strict=True)
        for token, row in zip(piece[1:], output.prompt_logprobs[1:], strict=True)
    )


def in_float32(model: str, pieces: list[list[int]]) -> float:
    """The same sum, of transformers' model in float32, with float64 logprobs of its logits."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").to(device)
    found = []
    with torch.inference_mode():
        for piece in pieces:
            ids = torch.tensor([piece], device=device)
            logprobs = net(ids).logits[0, :-1].double().log_softmax(-1)
            found.append(float(logprobs.gather(1, ids[0, 1:, None]).sum()))
    return math.fsum(found)


def sums(model: str, pieces: list[list[int]]) -> Iterator[tuple[str, float]]:
    """The sum of logprobs of every way, each in a process of its own."""
    for name in (*ENGINES, "float32"):
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = subprocess.run(
            [sys.executable, __file__, model, "--one", name], input=json.dumps(pieces), env=environment,
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        said = [line for line in done.stdout.splitlines() if line.startswith(SUM)]  # engines print there, too
        yield name, float.fromhex(said[-1].removeprefix(SUM))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "perplexity.json")
    parser.add_argument("--one", choices=(*ENGINES, "float32"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        pieces = json.loads(sys.stdin.read())
        way = args.one
        total = in_float32(args.model, pieces) if way == "float32" else in_engine(args.model, ENGINES[way], pieces)
        print(f"{SUM}{total.hex()}", flush=True)
        return
    files = args.files or [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
    pieces = windows(args.model, files, args.window, args.tokens)
    tokens = sum(len(piece) - 1 for piece in pieces)
    found = {name: math.exp(-total / tokens) for name, total in sums(args.model, pieces)}
    what = f"{Path(args.model).name}, {tokens} tokens of documentation in windows of {args.window}"
    points = [
        {"what": what, "unit": "perplexity", "name": peer, "peer": found[peer], "ours": found["ours"],
         "ratio": found[peer] / found["ours"]}
        for peer in found if peer != "ours"
    ]  # fmt: skip
    command = shlex.join(["python", "benchmarks/perplexity.py", Path(args.model).name, *sys.argv[2:]])
    facts = machine("torch", "transformers", "vllm")
    write(args.out, {**facts, "command": command, "date": datetime.date.today().isoformat(), "points": points})
    print(json.dumps(points, indent=1))


if __name__ == "__main__":
    main()
