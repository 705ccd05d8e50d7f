"""REINFORCE on sums, SmolLM2-135M-Instruct, a real vLLM server: how far sampler and trainer are apart.

Ways: `default` (vLLM, transformers; the difference between them ignored), `corrected` (the same with truncated
importance weights), `ours` (`--deterministic`, `deterministic_forward`) and `again` (ours, from the beginning: must end
in the same weights). Each answer's reward is 1 if the first number in it is the sum asked for. Advantages are those of
GRPO: the reward minus the mean of its prompt's group, over the group's standard deviation.

On a card where there is one, server and trainer sharing its memory, else on CPU.

usage: benchmarks/rl_demo.py [--steps 10] [--dtype bfloat16] [--ways default corrected ours again] [--side-by-side]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import hashlib
import json
import math
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch
from report import machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_deterministic.models import prepare_default_model
from vllm_deterministic.train import LiveServer, accumulate, deterministic_forward
from vllm_deterministic.verify.probes import Answer, Probe, ask
from vllm_deterministic.verify.server import Server, serve

PLACE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
RESULT = Path(__file__).parent / "results" / ("rl_demo.json" if PLACE.type == "cpu" else "rl_demo_gpu.json")
# The card's memory is the trainer's too.
SERVED = () if PLACE.type == "cpu" else ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(1 << 30))
WAYS = ("default", "corrected", "ours", "again")
GROUP, TOKENS, MICRO_BATCH = 8, 6, 16
SUMS = ((2, 3), (4, 4), (7, 2), (6, 5))
SHOWN = "1 + 1 = 2\n5 + 2 = 7\n3 + 3 = 6\n"  # the model knows what is asked, and is right in some of its answers
LEARNING_RATE = 2e-5
MOST_WEIGHT = 2.0  # at which importance weights are cut off

# (token ids, prompt lengths, sampler's log-probabilities, advantages) -> trainer's log-probabilities, .grad filled
Step = Callable[[list[list[int]], list[int], list[torch.Tensor], list[float]], list[torch.Tensor]]


def prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(f"{SHOWN}{a} + {b} =")["input_ids"] for a, b in SUMS]


def reward(text: str, question: tuple[int, int]) -> float:
    number = re.search(r"\d+", text)
    return float(number is not None and int(number[0]) == sum(question))


def sample(server: Server, asked: list[list[int]], step: int) -> list[Answer]:
    """GROUP answers to each prompt, at temperature 1, every one with a seed of its own."""
    probes = [
        Probe(f"{step}/{i}", ids, None, TOKENS, 1.0, 1000 * step + 100 * i, n=GROUP, logprobs=0)
        for i, ids in enumerate(asked)
    ]

    async def together() -> list[list[Answer]]:
        return list(await asyncio.gather(*(ask(server.endpoint, probe) for probe in probes)))

    return [answer for group in asyncio.run(together()) for answer in group]


def advantages(rewards: list[float]) -> list[float]:
    groups = torch.tensor(rewards).view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def plain_step(model: Any, dtype: torch.dtype, corrected: bool) -> Step:
    """transformers' forward, padded on the right, as training libraries call it."""

    def step(ids: Any, first: Any, sampled: Any, weights: Any) -> list[torch.Tensor]:
        found = []
        for at in range(0, len(ids), MICRO_BATCH):
            part = range(at, min(at + MICRO_BATCH, len(ids)))
            width = max(len(ids[i]) for i in part)
            padded = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in part], device=PLACE)
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in part], device=PLACE)
            with torch.autocast(PLACE.type, dtype, enabled=dtype != torch.float32):
                logits = model(padded, attention_mask=mask).logits
            scores = logits[:, :-1].float().log_softmax(-1).gather(-1, padded[:, 1:, None]).squeeze(-1)
            loss = torch.zeros((), device=PLACE)
            for row, i in enumerate(part):
                score = scores[row, first[i] - 1 : len(ids[i]) - 1]
                ratio = (score.detach() - sampled[i]).exp().clamp(max=MOST_WEIGHT) if corrected else 1.0
                loss = loss - (ratio * score).mean() * weights[i] / len(ids)
                found.append(score.detach())
            loss.backward()
        return found

    return step


def our_step(model: Any) -> Step:
    def step(ids: Any, first: Any, sampled: Any, weights: Any) -> list[torch.Tensor]:
        found: list[Any] = [None] * len(ids)

        def loss(index: int, score: torch.Tensor) -> torch.Tensor:
            found[index] = score.detach()
            return -score.mean() * weights[index] / len(ids)

        accumulate(model, ids, loss, first, micro_batch=MICRO_BATCH)
        return found

    return step


def reload_plain(server: Server, model: Any, folder: Path) -> None:
    """New weights for a server without the flag: vLLM's own reload from disk, then an empty prefix cache."""
    model.save_pretrained(folder)
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=server.url, api_key="x", max_retries=0, timeout=600, http_client=http) as client:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        client.post("/collective_rpc", cast_to=object, body=body)
        client.post("/reset_prefix_cache", cast_to=object, body={})


@contextlib.contextmanager
def way(name: str, dtype: str, folder: Path, scratch: Path) -> Iterator[tuple[Server, Any, Step, Callable[[], Any]]]:
    """A server, the model in f32 on PLACE, its training step and what puts the new weights into the server."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(PLACE)
    narrow = getattr(torch, dtype)
    options = ["--dtype", dtype, "--max-model-len", "512", "--enforce-eager", *SERVED]
    ours = name in ("ours", "again")
    if ours:
        options += ["--deterministic", "--weight-transfer-config", '{"backend": "safetensors"}']
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve(folder, *options, env=environment, log=scratch / f"{name}.log"))
        if ours:
            stack.enter_context(deterministic_forward(model, narrow))
            live = LiveServer(server.url)
            live.send_weights(model)
            yield server, model, our_step(model), lambda: live.send_weights(model)
        else:
            update = scratch / f"{name}-weights"
            yield (
                server,
                model,
                plain_step(model, narrow, name == "corrected"),
                lambda: reload_plain(server, model, update),
            )


def train(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = prompts(tokenizer)
    log = []
    torch.manual_seed(0)
    with way(name, args.dtype, folder, args.scratch) as (server, model, step, update):
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        for number in range(args.steps):
            if time.monotonic() - began > args.seconds:
                break
            begun = time.perf_counter()
            answers = sample(server, asked, number)
            questions = [question for question in SUMS for _ in range(GROUP)]
            rewards = [reward(answer.text, question) for answer, question in zip(answers, questions, strict=True)]
            ids = [[*answer.prompt_token_ids, *answer.token_ids] for answer in answers]
            sampled = [torch.tensor(answer.logprobs, dtype=torch.float64).float().to(PLACE) for answer in answers]
            optimizer.zero_grad()
            scores = step(ids, [len(answer.prompt_token_ids) for answer in answers], sampled, advantages(rewards))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            log.append(compare(sampled, scores) | {"reward": sum(rewards) / len(rewards), "served": update()})
            log[-1]["seconds"] = round(time.perf_counter() - begun, 2)
            print(name, number, json.dumps(log[-1]), flush=True)
            if name in ("ours", "again"):
                assert log[-1]["kl"] == 0.0, "sampler and trainer differ"
                assert log[-1]["unequal"] == 0.0
        weights = hashlib.sha256()
        for _, parameter in sorted(model.named_parameters()):
            weights.update(parameter.detach().cpu().numpy().tobytes())
    return {"steps": log, "weights": weights.hexdigest()}


def same(run: dict[str, Any], again: dict[str, Any]) -> str:
    """What a second run had in common with the first: every step of both. Raises AssertionError where one differs."""
    both = list(zip(run["steps"], again["steps"], strict=False))  # under --seconds one may have come further
    assert both, "no step of both runs"
    for number, (one, other) in enumerate(both):
        # The fingerprint, which names the weights that were sent.
        assert one["served"] == other["served"], f"a second run had other weights after step {number}"
    if len(run["steps"]) == len(again["steps"]):
        assert run["weights"] == again["weights"], "a second run ended in other weights"
    return f"a second run had the same weights, bit for bit, after each of {len(both)} steps"


def compare(sampled: list[torch.Tensor], scores: list[torch.Tensor]) -> dict[str, float]:
    """kl: KL(sampler || trainer) over the sampled tokens, by the estimator exp(d) - 1 - d, which no sign can cancel."""
    d = torch.cat(scores).double() - torch.cat(sampled).double()
    return {
        "kl": (d.expm1() - d).mean().item(),
        "unequal": (d != 0).double().mean().item(),
        "largest": d.abs().max().item(),
        "tokens": d.numel(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no step begins later, from the way's start on")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--side-by-side", action="store_true", help="every way in a process of its own, all at once")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct's folder, where it is not to be made")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/vllm-deterministic-rl"))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    folder = args.model or prepare_default_model(dtype=args.dtype)
    if args.side_by_side and len(args.ways) > 1:
        runs = side_by_side(args, folder)
    else:
        runs = {name: train(name, args, folder) for name in args.ways}
    if {"ours", "again"} <= runs.keys():
        print(same(runs["ours"], runs["again"]))
    here = machine("vllm", "torch", "transformers", "vllm_deterministic")
    if PLACE.type == "cpu":
        here["card"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    command = ["benchmarks/rl_demo.py", "--steps", str(args.steps), "--dtype", args.dtype, "--ways", *args.ways]
    report = {
        **here,
        "command": shlex.join([*command, *(["--side-by-side"] if args.side_by_side else [])]),
        "date": datetime.date.today().isoformat(),
        "setting": {"dtype": args.dtype, "prompts": len(SUMS), "group": GROUP, "tokens": TOKENS, "lr": LEARNING_RATE},
        "runs": runs,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def side_by_side(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every way's run, of processes that share the machine. Raises CalledProcessError where one fails."""

    def run(name: str) -> Any:
        out = args.scratch / f"{name}.json"
        command = [sys.executable, __file__, "--steps", str(args.steps), "--dtype", args.dtype, "--ways", name]
        command += ["--model", str(folder), "--scratch", str(args.scratch), "--out", str(out)]
        command += ["--seconds", str(args.seconds)]
        subprocess.run(command, check=True)
        return json.loads(out.read_text())["runs"][name]

    with ThreadPoolExecutor(len(args.ways)) as pool:
        return dict(zip(args.ways, pool.map(run, args.ways), strict=True))


if __name__ == "__main__":
    main()
