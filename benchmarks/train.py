"""Cost of the trainer's deterministic arithmetic: forward, and forward with backward, against transformers with its
scaled-dot-product attention (FlashAttention, on a card), in one process, taking turns.

usage: benchmarks/train.py [--repeats 9] [--dtypes float32 bfloat16] [--layers 12] [--out FILE]
On CPU the model is SmolLM2-135M, measured is one thread's processor time (what else the machine does is not in it, but
for the caches), and the file is results/train_cpu.json. On a card it is LAYERS layers of Qwen3-8B with its vocabulary
and made-up weights in bfloat16, by the clock, and the file is results/train.json.
Both compute the log-probabilities of the same sequences; transformers gets them padded on the right, as training
libraries do. Backward is autograd's, and once more ours through `accumulate`, whose sums in f32 no micro-batch changes.
The ratio is theirs over ours: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bootstrap import interval
from report import machine, write
from transformers import AutoModelForCausalLM, Qwen3Config

from vllm_deterministic.models import prepare_default_model
from vllm_deterministic.train import accumulate, deterministic_forward, logprobs

CARD = torch.cuda.is_available()
UNIT = "s" if CARD else "processor s"
RESULTS = Path(__file__).parent / "results"
BATCHES = (
    {"8 sequences of 1024 tokens": [1024] * 8, "8 sequences of 128 to 1920 tokens": list(range(128, 2048, 256))}
    if CARD
    else {"8 sequences of 128 tokens": [128] * 8, "8 sequences of 16 to 240 tokens": list(range(16, 256, 32))}
)
RESAMPLES = 10_000
Ids = list[list[int]]


def loaded(dtype: str, layers: int) -> Any:
    if not CARD:
        return AutoModelForCausalLM.from_pretrained(prepare_default_model(dtype=dtype), dtype="auto")
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")


def theirs(model: Any, ids: Ids) -> torch.Tensor:
    width = max(map(len, ids))
    padded = torch.tensor([each + [0] * (width - len(each)) for each in ids], device=model.device)
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in ids], device=model.device)
    logits = model(padded, attention_mask=mask).logits[:, :-1]
    scores = logits.log_softmax(-1, dtype=torch.float32).gather(-1, padded[:, 1:, None]).squeeze(-1)
    return (scores * mask[:, 1:]).sum()


def ours(model: Any, ids: Ids) -> torch.Tensor:
    return torch.cat(logprobs(model, ids)).sum()


# What one round measures, in this order; ours inside `deterministic_forward`, entered anew each time: on CPU the
# weights are packed anew then, as after an optimiser's step.
WAYS: dict[str, Callable[[Any, Ids], Any]] = {
    "theirs, forward": torch.no_grad()(theirs),
    "ours, forward": torch.no_grad()(ours),
    "theirs, backward": lambda model, ids: theirs(model, ids).backward(),
    "ours, backward": lambda model, ids: ours(model, ids).backward(),
    "ours, folded": lambda model, ids: accumulate(model, ids, lambda index, scores: scores.sum()),
}
# What is reported -> (peer, ours).
POINTS = {
    "forward": ("theirs, forward", "ours, forward"),
    "forward and backward": ("theirs, backward", "ours, backward"),
    "forward and backward, micro-batch-invariant": ("theirs, backward", "ours, folded"),
}


def clock() -> float:
    """Seconds, after what has been asked of a card is done."""
    if not CARD:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measured(model: Any, ids: Ids) -> dict[str, float]:
    """Seconds of each way, in one round."""
    seconds = {}
    for way, run in WAYS.items():
        model.zero_grad()
        with deterministic_forward(model) if way.startswith("ours") else contextlib.nullcontext():
            begun = clock()
            run(model, ids)
            seconds[way] = clock() - begun
    return seconds


def report(path: Path, points: list[dict[str, Any]]) -> None:
    said = machine("vllm", "torch", "transformers", "vllm_deterministic", *(["triton"] if CARD else []))
    if not CARD:
        said["card"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"
    command = shlex.join(["benchmarks/train.py", *sys.argv[1:]])
    write(path, {**said, "command": command, "date": datetime.date.today().isoformat(), "points": points})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"] if CARD else ["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS / ("train.json" if CARD else "train_cpu.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    points = []
    for dtype in args.dtypes:
        model = loaded(dtype, args.layers)
        subject = f"{args.layers} layers of Qwen3-8B, {dtype}" if CARD else dtype
        measured(model, [[1, 2, 3]])  # certificates, compiled operators
        for what, lengths in BATCHES.items():
            ids = [[rng.randrange(100, 48_000) for _ in range(length)] for length in lengths]
            if CARD:
                measured(model, ids)  # memory, and kernels of these sizes
            rounds = [measured(model, ids) for _ in range(args.repeats)]
            for point, (peer, mine) in POINTS.items():
                ratios = [each[peer] / each[mine] for each in rounds]
                low, high = interval(ratios, RESAMPLES)
                points.append(
                    {
                        "what": f"{subject}, {what}: {point}",
                        "unit": UNIT,
                        "peer": round(statistics.median(each[peer] for each in rounds), 4),
                        "ours": round(statistics.median(each[mine] for each in rounds), 4),
                        "ratio": round(statistics.median(ratios), 3),
                        "interval": [round(low, 3), round(high, 3)],
                    }
                )
                print(json.dumps(points[-1]), flush=True)
            report(args.out, points)  # after each batch, so that a run that is cut leaves what it has measured


if __name__ == "__main__":
    main()
