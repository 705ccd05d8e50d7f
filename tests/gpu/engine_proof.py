"""One engine against itself: the same requests alone, in company, cached, cut and scored must give the same bits.

Run by test_engine.py, which also runs the vLLM without the flag as a control. Prints one line of JSON: per axis how
many tokens were compared with what each request gave alone in a cold cache, and how many requests differed.

usage: engine_proof.py MODEL_FOLDER SIDE(ours|default|planted) [bulk=N] [key=value of LLM() as JSON ...]
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import made_up
import torch
from vllm import LLM, SamplingParams

# Around every edge of pages, tiles and splits of attention.
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 511, 512, 513, 1023, 1025, 1041, 3000)
# One of each kind of sampling; noise, truncation, penalties and masks are row by row.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.95, "top_k": 200, "min_p": 0.02},
    {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"temperature": 1.0, "logit_bias": {"500": 3.0, "777": -100.0}},
)
TOKENS = 32

Request = tuple[list[int], SamplingParams]
# token ids, and per position the (token id, logprob) pairs that were asked for
Answer = tuple[tuple[int, ...], tuple[tuple[tuple[int, float], ...], ...]]


@dataclass
class Axis:
    requests: int = 0
    tokens: int = 0
    differing: int = 0
    first: str = ""


class Proof:
    """Probes of one engine. Everything is drawn from one seed, so two engines are asked the same."""

    def __init__(self, llm: LLM, bulk: int, longest: int) -> None:
        self.llm, self.bulk, self.longest = llm, bulk, longest
        self.rng = random.Random(5)
        self.vocabulary = llm.llm_engine.model_config.get_vocab_size()
        lengths = [n for n in LENGTHS if n <= longest]
        self.probes = [self._request(n, i) for i, n in enumerate([*lengths, *lengths])]
        self.axes: dict[str, Axis] = {}
        self.hits = 0

    def ids(self, count: int) -> list[int]:
        return [self.rng.randrange(100, self.vocabulary - 1000) for _ in range(count)]

    def _request(self, length: int, i: int) -> Request:
        kind = dict(KINDS[i % len(KINDS)])
        if kind["temperature"]:
            kind["seed"] = 1000 + i
        if "logit_bias" in kind:
            kind["logit_bias"] = {int(token): bias for token, bias in kind["logit_bias"].items()}
        scores = (1, 5, 20)[i % 3]
        return self.ids(length), SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=scores, **kind)

    def filler(self, most: int = 300) -> Request:
        few = SamplingParams(max_tokens=self.rng.randrange(4, 2 * TOKENS), temperature=0, ignore_eos=True)
        return self.ids(self.rng.randrange(1, most)), few

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        outputs = self.llm.generate(prompts, [params for _, params in requests], use_tqdm=False)
        self.hits += sum((output.num_cached_tokens or 0) > 0 for output in outputs)
        return [answer(output.outputs[0]) for output in outputs]

    def cold(self) -> None:
        self.llm.reset_prefix_cache()

    def compare(self, axis: str, got: Iterable[Answer], want: Iterable[Answer]) -> None:
        tally = self.axes.setdefault(axis, Axis())
        for mine, reference in zip(got, want, strict=True):
            tally.requests += 1
            tally.tokens += len(reference[0])
            if mine != reference:
                tally.differing += 1
                tally.first = tally.first or difference(mine, reference)

    def company(self, requests: Sequence[Request], size: int, most: int = 300) -> list[Answer]:
        """The requests in batches of `size`, the rest of each batch neighbours of other lengths, in random order."""
        answers: list[Answer] = []
        mine = min(len(requests), max(1, size // 2))
        for first in range(0, len(requests), mine):
            part = list(requests[first : first + mine])
            batch = part + [self.filler(most) for _ in range(size - len(part))]
            order = self.rng.sample(range(len(batch)), len(batch))
            found = dict(zip(order, self.ask([batch[i] for i in order]), strict=True))
            answers += [found[i] for i in range(len(part))]
        return answers

    def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        probes = self.probes
        self.cold()
        alone = []
        for probe in probes:
            alone += self.ask([probe])
        assert self.hits == 0
        self.compare("again, whole prefix cached", self.ask(probes), alone)
        assert self.hits > 0
        for size in (2, 9, 33, 65, 129, 256):
            self.cold()
            few = max(size, 8)
            self.compare(f"in a batch of {size}", self.company(probes[:few], size), alone[:few])
        self.cold()
        # Prompts of which the cache holds a part: their own first two thirds were asked before.
        self.ask([(ids[: len(ids) * 2 // 3 + 1], SamplingParams(max_tokens=1)) for ids, _ in probes])
        self.compare("prefix partly cached", self.ask(probes), alone)
        self.cold()
        # More prompt tokens than one step takes: prefills are cut wherever the budget ends.
        crowd = [self.filler(self.longest) for _ in range(40)]
        self.compare("prefill cut into chunks", self.ask([*crowd, *probes])[len(crowd) :], alone)
        self.scored(probes, alone)
        self.many()
        axes = {name: vars(axis) for name, axis in self.axes.items()}
        return {
            "axes": axes,
            "tokens": sum(axis.tokens for axis in self.axes.values()),
            "differing": sum(axis.differing for axis in self.axes.values()),
            "prefix_hits": self.hits,
            "preemptions": self.preemptions(),
            # Engines of one fingerprint give the same answers.
            "answers": hashlib.sha256(repr(alone).encode()).hexdigest(),
            "distinct_tokens": len({token for tokens, _ in alone for token in tokens}),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def preemptions(self) -> int:
        return sum(int(m.value) for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")

    def scored(self, probes: Sequence[Request], alone: Sequence[Answer]) -> None:
        """What was generated, scored as a prompt: raw logprobs of decoding and of prefill are the same bits."""
        self.cold()
        wholes = [[*ids, *tokens] for (ids, _), (tokens, _) in zip(probes, alone, strict=True)]
        score = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in wholes], score, use_tqdm=False)
        got, want = [], []
        for (ids, _), (tokens, scores), output in zip(probes, alone, outputs, strict=True):
            rows = output.prompt_logprobs[len(ids) :]
            got.append((tokens, tuple(((t, row[t].logprob),) for t, row in zip(tokens, rows, strict=True))))
            want.append((tokens, tuple(((t, dict(row)[t]),) for t, row in zip(tokens, scores, strict=True))))
        self.compare("generated, then scored as a prompt", got, want)

    def many(self) -> None:
        """Many requests at once, twice, in two orders: who is beside whom is another each time."""
        requests = [self._request(self.rng.randrange(1, 200), i) for i in range(self.bulk)]
        self.cold()
        first = self.ask(requests)
        order = self.rng.sample(range(len(requests)), len(requests))
        self.cold()
        second = dict(zip(order, self.ask([requests[i] for i in order]), strict=True))
        self.compare("many at once, in another order", [second[i] for i in range(len(requests))], first)


def answer(output: Any) -> Answer:
    scores = tuple(tuple((token, score.logprob) for token, score in step.items()) for step in output.logprobs or ())
    return tuple(output.token_ids), scores


def difference(got: Answer, want: Answer) -> str:
    at = next((i for i, (a, b) in enumerate(zip(got[0], want[0], strict=False)) if a != b), None)
    scored = next((i for i, (a, b) in enumerate(zip(got[1], want[1], strict=False)) if a != b), None)
    return f"first other token at {at}, first other logprob at {scored} of {len(want[0])}"


def plant() -> None:
    """The planted fault of a model that multiplies matrices by itself."""
    from vllm.model_executor.models.qwen2 import Qwen2MLP

    def forward(self: Qwen2MLP, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.nn.functional.linear(x, self.gate_up_proj.weight)
        return self.down_proj(self.act_fn(gate_up))[0]

    Qwen2MLP.forward = forward


def main() -> None:
    folder, side, *rest = sys.argv[1:]
    given = dict(item.split("=", 1) for item in rest)
    bulk = int(given.pop("bulk", "256"))
    options = {name: json.loads(value) for name, value in given.items()}
    if side == "planted":
        plant()
    if side != "default":
        options["additional_config"] = {"vllm_deterministic": {}}
    made_up.use()
    llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, seed=0, disable_log_stats=False, **options)
    longest = llm.llm_engine.model_config.max_model_len - 2 * TOKENS
    report = Proof(llm, bulk, longest).run()
    if side == "ours":
        report["certified"] = llm.collective_rpc("deterministic_report")[0]["certified"]
    print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
