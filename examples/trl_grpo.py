"""GRPO with trl on a live deterministic server: what it trains on are the sampler's own log-probabilities, bit for bit.

$ pip install 'vllm-deterministic[cpu,rl]'
$ VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --dtype float32 --deterministic --enforce-eager \
      --weight-transfer-config '{"backend": "safetensors"}'
usage: python examples/trl_grpo.py http://127.0.0.1:8000 MODEL [STEPS]

Prints the fingerprint of the server with the trained weights. Run it again, on a server started anew: the same one.
"""

import re
import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from vllm_deterministic.train import LiveServer
from vllm_deterministic.train.trl import rollout, scoring

SHOWN = "1 + 1 = 2\n5 + 2 = 7\n3 + 3 = 6\n"
SUMS = [(2, 3), (4, 4), (7, 2), (6, 5)]


def right(completions, total, **_):
    """1 for an answer whose first number is the sum."""
    found = [re.search(r"\d+", text) for text in completions]
    return [float(number is not None and int(number[0]) == wanted) for number, wanted in zip(found, total, strict=True)]


def main(url, folder, steps=3):
    live = LiveServer(url)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        num_generations=8,  # answers to a prompt, each with a seed of its own
        max_completion_length=6,
        max_steps=int(steps),
        learning_rate=2e-5,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        right,
        config,
        train_dataset=Dataset.from_list([{"prompt": f"{SHOWN}{a} + {b} =", "total": a + b} for a, b in SUMS]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        rollout_func=rollout(live),
    )
    with scoring(trainer.model):
        trainer.train()
        print(live.send_weights(trainer.model))


if __name__ == "__main__":
    main(*sys.argv[1:])
