"""The trainer against one engine on a card: its log-probabilities are the engine's, its gradients the same each time.

Run by test_train.py. Prints a line of JSON after every part, the last one complete.

usage: train_proof.py MODEL_FOLDER [processed]     the folder gets made-up weights

processed: the engine gives `processed_logprobs` at another temperature than 1.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM

import vllm_deterministic
from vllm_deterministic.train import LocalEngine, accumulate, deterministic_forward, logprobs
from vllm_deterministic.verify.probes import Answer, Probe

# Around pages, tiles, splits, the query tokens that count as few, and what has attention's gradient for itself.
PROMPTS = (1, 3, 17, 127, 128, 130, 511, 640, 2060)
TOKENS = 40
MICRO_BATCHES = (1, 4, 18)
Ids = list[list[int]]


def made(folder: Path) -> Any:
    """The folder's model with weights of which no norm and no bias is one or zero; writes them into the folder."""
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(5)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_((1.0 if "norm" in name else 0.0) + torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0, 0.03)
    model.save_pretrained(folder)
    return model


def unequal(answers: Sequence[Answer], scores: Sequence[torch.Tensor]) -> int:
    """How many tokens got another log-probability."""
    return sum(
        int((torch.tensor(answer.logprobs, dtype=torch.float64) != score.double().cpu()).sum())
        for answer, score in zip(answers, scores, strict=True)
    )


def advantage(ids: Sequence[int]) -> float:
    """Something that weighs sequences differently and depends on the sequence alone."""
    return (sum(ids) % 7 - 3.3) / len(ids)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def digest(found: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(found):
        total.update(found[name].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()


class Proof:
    def __init__(self, folder: Path, processed: bool) -> None:
        began = time.perf_counter()
        self.model = made(folder)
        self.temperature = 0.7 if processed else 1.0
        self.engine = LocalEngine(
            LLM(
                str(folder),
                enforce_eager=True,
                max_model_len=4096,
                gpu_memory_utilization=0.05,
                kv_cache_memory_bytes=2 << 30,
                logprobs_mode="processed_logprobs" if processed else "raw_logprobs",
                additional_config=vllm_deterministic.enable(),
                weight_transfer_config={"backend": "safetensors"},
            )
        )
        self.report: dict[str, Any] = {"errors": {}, "start_seconds": round(time.perf_counter() - began, 1)}
        print("REPORT " + json.dumps(self.report), flush=True)

    def sample(self) -> tuple[list[Answer], Ids, list[int]]:
        """Two answers to each prompt, all at once; whole sequences; prompts' lengths."""
        vocabulary = self.model.config.vocab_size
        generator = torch.Generator().manual_seed(3)
        prompts = [torch.randint(100, vocabulary, (n,), generator=generator).tolist() for n in PROMPTS for _ in "ab"]
        probes = [
            Probe(str(i), prompt, None, TOKENS, self.temperature, seed=i, logprobs=0, extra_body={"ignore_eos": True})
            for i, prompt in enumerate(prompts)
        ]
        answers = self.engine.sample(probes)
        ids = [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
        return answers, ids, list(map(len, prompts))

    # --- parts ---
    @torch.no_grad()
    def forward(self) -> dict[str, Any]:
        """Packed, in micro-batches, padded on either side: the engine's bits. transformers' own: not."""
        answers, ids, first = self.sample()
        found: dict[str, Any] = {"tokens": sum(len(answer.token_ids) for answer in answers)}
        found["distinct_tokens"] = len({token for answer in answers for token in answer.token_ids})
        with deterministic_forward(self.model) as model:
            self.engine.check(model)
            for size in MICRO_BATCHES:
                parts = [
                    logprobs(model, ids[at : at + size], first[at : at + size], self.temperature)
                    for at in range(0, len(ids), size)
                ]
                found[f"unequal by {size}"] = unequal(answers, [score for part in parts for score in part])
            alone = [model(torch.tensor([each], device="cuda")).logits[0] for each in ids]
            width = max(map(len, ids))
            for side in ("left", "right"):
                batch, mask = torch.zeros(2, len(ids), width, dtype=torch.long, device="cuda")
                for row, each in enumerate(ids):
                    place = slice(width - len(each), width) if side == "left" else slice(0, len(each))
                    batch[row, place], mask[row, place] = torch.tensor(each, device="cuda"), 1
                logits = model(batch, attention_mask=mask).logits
                found[f"unequal logits, padded {side}"] = sum(
                    int((row[real.bool()] != one).sum()) for row, real, one in zip(logits, mask, alone, strict=True)
                )
        wide = copy.deepcopy(self.model).float()
        with deterministic_forward(wide, dtype=torch.bfloat16):
            found["unequal with f32 parameters"] = unequal(answers, logprobs(wide, ids, first, self.temperature))
        theirs = [
            (self.model(torch.tensor([each], device="cuda")).logits[0, at - 1 : -1].float() / self.temperature)
            .log_softmax(-1)
            .gather(-1, torch.tensor(each[at:], device="cuda")[:, None])
            .squeeze(1)
            for each, at in zip(ids, first, strict=True)
        ]
        found["control: unequal in transformers' own"] = unequal(answers, theirs)
        return found

    def summed(self, ids: Ids, size: int) -> dict[str, torch.Tensor]:
        accumulate(self.model, ids, lambda i, scores: scores.sum() * advantage(ids[i]), micro_batch=size)
        return gradients(self.model)

    def added(self, ids: Ids, size: int) -> dict[str, torch.Tensor]:
        for at in range(0, len(ids), size):
            part = ids[at : at + size]
            scores = logprobs(self.model, part)
            sum(s.sum() * advantage(each) for s, each in zip(scores, part, strict=True)).backward()
        return gradients(self.model)

    def backward(self) -> dict[str, Any]:
        """Digests of all gradients, by how they were computed."""
        _, ids, _ = self.sample()
        with deterministic_forward(self.model):
            found: dict[str, Any] = {f"by {size}": digest(self.summed(ids, size)) for size in MICRO_BATCHES}
            found["in reverse"] = digest(self.summed(ids[::-1], 4))
            self.model.train().gradient_checkpointing_enable()
            found["checkpointing"] = digest(self.summed(ids, 4))
            self.model.gradient_checkpointing_disable()
            plain = {size: digest(self.added(ids, size)) for size in (4, 18)}
            again = digest(self.added(ids, 18))
        return {
            "accumulated": found,
            "autograd, twice": [plain[18], again],
            "control: autograd, by 4": plain[4],
        }

    def accuracy(self) -> dict[str, Any]:
        """Distance of each gradient from transformers' own in f64, over transformers' own distance in bfloat16."""
        _, ids, _ = self.sample()
        ids = [each[:200] for each in ids[:12]]

        def plain(model: Any) -> dict[str, torch.Tensor]:
            for each in ids:
                logits = model(torch.tensor([each], device="cuda")).logits[0, :-1]
                scores = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
                chosen = scores.gather(-1, torch.tensor(each[1:], device="cuda")[:, None])
                (chosen.sum() * advantage(each)).backward()
            return gradients(model)

        exact, theirs = plain(copy.deepcopy(self.model).double()), plain(self.model)
        with deterministic_forward(self.model):
            ours = {"accumulated": self.summed(ids, 5), "autograd": self.added(ids, len(ids))}

        def error(found: torch.Tensor, name: str) -> float:
            return float((found - exact[name]).norm() / exact[name].norm())

        ratios = {
            way: {name: error(found[name], name) / (error(theirs[name], name) + 2**-9) for name in exact}
            for way, found in ours.items()
        }
        worst = {way: max(each, key=lambda name, each=each: each[name]) for way, each in ratios.items()}
        return {way: [name, round(ratios[way][name], 3)] for way, name in worst.items()}

    def update(self) -> dict[str, Any]:
        """New weights in the running engine, by which its answers are unlikely: the trainer's log-probabilities again,
        and other answers."""
        before, ids, first = self.sample()
        with deterministic_forward(self.model) as model:
            old = self.engine.check(model)
            accumulate(model, ids, lambda i, scores: scores.mean(), first)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(parameter.grad.sign() * parameter.abs() * -(2**-5))
            model.zero_grad()
            new = self.engine.send_weights(model)
            after, ids, first = self.sample()
            with torch.no_grad():
                found = unequal(after, logprobs(model, ids, first, self.temperature))
        changed = sum(a.token_ids != b.token_ids for a, b in zip(before, after, strict=True))
        return {"unequal": found, "answers changed": changed, "fingerprint changed": old != new}

    def run(self) -> None:
        for part in (self.forward, self.backward, self.accuracy, self.update):
            began = time.perf_counter()
            try:
                self.report[part.__name__] = part()
            except Exception:  # the other parts are worth the card's time
                self.report["errors"][part.__name__] = traceback.format_exc()[-3000:]
            self.report[f"{part.__name__}_seconds"] = round(time.perf_counter() - began, 1)
            torch.cuda.empty_cache()
            print("REPORT " + json.dumps(self.report), flush=True)


if __name__ == "__main__":
    Proof(Path(sys.argv[1]), "processed" in sys.argv[2:]).run()
