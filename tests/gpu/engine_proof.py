"""One engine against itself: the same requests alone, in company, cached, cut and scored must give the same bits.

Run by test_engine.py, which also runs the vLLM without the flag as a control. Prints a line of JSON after every axis,
the last one complete: per axis how many tokens were compared with what each request gave alone in a cold cache, and
how many answers differed.

usage: engine_proof.py MODEL_FOLDER SIDE [bulk=N] [only=AXIS,...] [inductor=SETTINGS] [key=value of LLM() as JSON ...]

SIDE: ours, default or planted. SETTINGS: of torch._inductor.config, as JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import made_up
import pytest
import torch
from torch._inductor import config as inductor
from vllm import LLM

from vllm_deterministic import policy
from vllm_deterministic.verify.offline import Arrivals, Engine
from vllm_deterministic.verify.probes import Answer, Probe, compare, digest

# Around every edge of pages, tiles and splits of attention, and of the query tokens that count as few.
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 511, 512, 513, 1023, 1025, 1041, 3000)
# One of each kind of sampling; noise, truncation, penalties and masks are row by row.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.95, "top_k": 200, "min_p": 0.02},
    {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 1.0, "logit_bias": {500: 3.0, 777: -100.0}},
    {"temperature": 0.7, "allowed_token_ids": list(range(400, 1400))},
    {"temperature": 0.0, "structured_outputs": {"regex": "[a-m]{400}"}},
    {"temperature": 1.3, "structured_outputs": {"regex": "([n-z][n-z]|[a-z]{3}){200}"}},
    {"temperature": 1.3, "bad_words": ["a", "e", "ab", "qz"], "top_k": 400},
)  # fmt: skip
TOKENS = 64
# Numbers of tokens in a step at which vLLM or we take another way: rows of the schedules' tables, the largest product,
# the largest step; the engine adds the sizes of its graphs. All numbers up to the first are met one by one.
EDGES = (512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (2, 9, 33, 65, 129, 256, 512)


@dataclass
class Axis:
    requests: int = 0
    tokens: int = 0
    differing: int = 0
    first: str = ""


class Proof:
    """Probes of one engine. Everything is drawn from one seed, so two engines are asked the same."""

    def __init__(self, engine: Engine, bulk: int, only: Sequence[str] = ()) -> None:
        self.engine, self.only = engine, only
        config = engine.engine.vllm_config
        self.vocabulary = config.model_config.get_vocab_size()
        self.longest = config.model_config.max_model_len - 2 * TOKENS
        self.most = config.scheduler_config.max_num_batched_tokens
        self.captured = config.compilation_config.cudagraph_capture_sizes or ()
        self.rng = random.Random(5)
        lengths = [n for n in LENGTHS if n <= self.longest]
        self.probes = [self.probe(n, i) for i, n in enumerate(lengths * 3)]
        self.bulk = [self.probe(self.rng.randrange(1, 200), i, (1, 1, 1, 20)) for i in range(bulk)]
        self.alone: list[list[Answer]] = []
        self.axes: dict[str, Axis] = {}
        self.errors: dict[str, str] = {}
        self.answered: list[list[Answer]] = []
        self.began = time.perf_counter()

    def ids(self, count: int) -> list[int]:
        return [self.rng.randrange(100, self.vocabulary - 1000) for _ in range(count)]

    def probe(self, length: int, i: int, scores: Sequence[int] = (1, 5, 20)) -> Probe:
        kind = dict(KINDS[i % len(KINDS)])
        told = {name: kind.pop(name) for name in ("temperature", "top_p") if name in kind}
        seed = 1000 + i if told["temperature"] else None
        many = scores[i % len(scores)]
        return Probe(str(i), self.ids(length), max_tokens=TOKENS, seed=seed, logprobs=many, extra_body=kind, **told)

    def other(self, most: int = 300, **changes: Any) -> Probe:
        """A neighbour: its length, its answer's and what it wants to know vary."""
        few, scores = self.rng.randrange(4, 2 * TOKENS), self.rng.choice((None, None, 0, 5, 20))
        ids = self.ids(self.rng.randrange(1, most))
        return dataclasses.replace(Probe("other", ids, max_tokens=few, logprobs=scores), **changes)

    def compare(self, axis: str, got: Sequence[Sequence[Answer]], want: Sequence[Sequence[Answer]]) -> None:
        tally = self.axes.setdefault(axis, Axis())
        for mine, reference in zip(got, want, strict=True):
            for one, other in zip(mine, reference, strict=True):
                tally.requests += 1
                tally.tokens += len(other.token_ids)
                if one != other and not (found := compare([other, one])).identical:
                    tally.differing += 1
                    at, scored = found.first_text_divergence, found.first_logprob_divergence
                    tally.first = tally.first or (
                        f"first other token at {at}, first other logprob at {scored} of {len(other.token_ids)}"
                    )

    # --- axes: each compares with what the probes gave alone ---
    def prefix_cached(self) -> None:
        # The last asked finds its prefix even in a small cache.
        self.compare("whole prefix cached", self.engine.ask(self.probes[-1:]), self.alone[-1:])
        for _ in range(2):
            self.compare("whole prefix cached", self.engine.ask(self.probes), self.alone)

    def prefix_partly_cached(self) -> None:
        for part in (2 / 3, 1 / 3):
            self.engine.cold()
            # Prompts of which the cache holds a part: their own beginning was asked before.
            beginnings = [list(probe.prompt or ())[: int(len(probe.prompt or ()) * part) + 1] for probe in self.probes]
            self.engine.ask([Probe("part", ids, max_tokens=1, logprobs=None) for ids in beginnings])
            self.compare("prefix partly cached", self.engine.ask(self.probes), self.alone)

    def batches(self) -> None:
        """Batches of so many, half of each (or all there are) probes, the rest neighbours of other lengths."""
        for size in BATCHES:
            self.engine.cold()
            probes = self.probes[: max(size, 8)]
            mine = min(len(probes), max(1, size // 2))
            for first in range(0, len(probes), mine):
                part = probes[first : first + mine]
                others = [self.other(max_tokens=TOKENS * 2) for _ in range(size - len(part))]
                self.compare(f"in a batch of {size}", self.engine.ask(part, others), self.alone[first:][: len(part)])

    def played(self, axis: str, others: Callable[[int], Sequence[Probe]], every: int, **how: Any) -> None:
        """A probe arrives every so many steps, and before each step `others` of its number."""
        self.engine.cold()

        def script() -> Iterator[Arrivals]:
            for step in range(every * len(self.probes)):
                mine = [(step // every, self.probes[step // every])] if step % every == 0 else []
                yield [*mine, *((None, other) for other in others(step))]

        found = self.engine.play(script(), **how)
        self.compare(axis, [found[key] for key in range(len(self.probes))], self.alone)

    def growing(self) -> None:
        """One neighbour more in each step, up to batches over 512; then each step's prompt is a token longer."""
        axis = "neighbours that grow a token at a time"
        self.played(axis, lambda step: [self.other(2, max_tokens=640)], every=9)
        self.played(axis, lambda step: [Probe("read", self.ids(step + 1), max_tokens=1, logprobs=None)], every=15)

    def edges(self) -> None:
        """Prompts that fill a step up to one token less, as many, and one more than each edge, and to whatever number
        below has not been met yet."""
        edges = dict.fromkeys((*EDGES, self.most, *self.captured))
        around = [m for edge in edges if edge >= EDGES[0] for m in (edge - 1, edge, edge + 1)]
        wanted = [m for m in (*around, *range(1, EDGES[0])) if m <= self.most]

        def fill(step: int) -> list[Probe]:
            if step % 5 == 0:  # a probe arrives
                return []
            left = [m for m in wanted if not self.engine.steps[m]] or wanted
            room = left[step % len(left)] - self.engine.next_tokens
            lengths = [min(self.longest, room - at) for at in range(0, room, self.longest)]
            return [Probe("read", self.ids(length), max_tokens=1, logprobs=None) for length in lengths]

        for _ in range(2):
            self.played("steps of as many tokens as an edge, and one less or more", fill, every=5)

    def chunks(self) -> None:
        """More prompt tokens than one step takes: prefills are cut wherever the budget ends."""
        for _ in range(2):
            self.engine.cold()
            crowd = [self.other(self.longest) for _ in range(40)]
            self.compare("prefill cut into chunks", self.engine.ask(self.probes, crowd), self.alone)

    def aborts(self) -> None:
        for every in (1, 3):
            axis = "beside neighbours that are aborted"
            self.played(axis, lambda step: [self.other(max_tokens=500)], every=every, leave=0.1)

    def scored(self) -> None:
        """What was generated, scored as a prompt: raw logprobs of decoding and of prefill are the same bits.

        Not under a grammar: vLLM's raw logprobs are those of the logits that the grammar has masked.
        """
        answered = [
            (probe, answer)
            for probe, (answer, *_) in zip(self.probes, self.alone, strict=True)
            if "structured_outputs" not in (probe.extra_body or {})
        ]
        wholes = [[*(probe.prompt or ()), *answer.token_ids] for probe, answer in answered]
        ask = [Probe("read", ids, max_tokens=1, logprobs=None, extra_body={"prompt_logprobs": 0}) for ids in wholes]
        for _ in range(2):
            self.engine.cold()
            got, want = [], []
            for (_, read), (_, answer) in zip(self.engine.ask(ask), answered, strict=True):
                last = len(answer.token_ids)
                plain = {"top_logprobs": (), "finish_reason": None, "index": 0}
                got.append([Answer("", read.token_ids[-last:], logprobs=read.logprobs[-last:])])
                want.append([dataclasses.replace(answer, **plain)])
            self.compare("generated, then scored as a prompt", got, want)

    def prompt_scores(self) -> None:
        """The 20 best of every position of the prompts."""
        body = {"prompt_logprobs": 20}
        ask = [Probe("read", p.prompt, max_tokens=1, extra_body=body) for p in self.probes[: len(self.probes) // 3]]
        alone = [self.engine.ask([probe])[0] for probe in ask]
        self.engine.cold()
        crowd = [self.other(extra_body={"prompt_logprobs": self.rng.choice((0, 5))}) for _ in range(24)]
        self.compare("prompt logprobs, top 20, in company", self.engine.ask(ask, crowd), alone)

    def choices(self) -> None:
        ask = [dataclasses.replace(p, n=3) for p in self.probes[: 2 * len(KINDS)] if p.temperature]
        alone = [self.engine.ask([probe])[0] for probe in ask]
        for size in (20, 60):
            self.engine.cold()
            others = [self.other(n=self.rng.randrange(1, 4), temperature=1.0, seed=at) for at in range(size)]
            self.compare("n = 3, each choice", self.engine.ask(ask, others), alone)

    def many(self) -> None:
        """Many requests with logprobs at once, then half as many at once: other neighbours, and other batches."""
        self.engine.cold()
        first = self.engine.ask(self.bulk)
        self.answered += first
        self.engine.cold()
        half = len(self.bulk) // 2
        second = [*self.engine.ask(self.bulk[:half]), *self.engine.ask(self.bulk[half:])]
        self.compare("many with logprobs at once, then half of them", second, first)

    def poisoned(self) -> None:
        """Neighbours whose prompts hold a token that is embedded as NaN, infinity or the largest number."""
        values = (float("nan"), float("inf"), -float("inf"), 3e38)
        # A probe that generated such a token itself is another request now.
        clean = [i for i, (a, *_) in enumerate(self.alone) if not {*a.token_ids} & {*range(len(values))}]
        probes, alone = [self.probes[i] for i in clean], [self.alone[i] for i in clean]

        def poison(model: torch.nn.Module) -> None:
            for token, value in enumerate(values):
                model.model.embed_tokens.weight.data[token].fill_(value)

        self.engine.engine.apply_model(poison)
        for _ in range(3):
            self.engine.cold()
            others = []
            for at in range(120):
                one = self.other(max_tokens=TOKENS, temperature=float(at % 2), seed=at)
                ids = list(one.prompt or ())
                ids[self.rng.randrange(len(ids))] = at % len(values)
                others.append(dataclasses.replace(one, prompt=ids))
            self.compare("beside NaN and infinities", self.engine.ask(probes, others), alone)

    def slept(self) -> None:
        """The card's memory given away and taken back, weights from the host's. A cache is empty after it."""
        llm = self.engine.engine
        for _ in range(14):
            self.engine.cold()  # a step under way is waited for
            llm.sleep(1)
            llm.wake_up()
            self.compare("asleep in between", self.engine.ask(self.probes), self.alone)
        with pytest.raises(Exception, match="forgets the weights"):
            llm.sleep(2)
        llm.wake_up(["scheduling"])
        self.compare("asleep in between", self.engine.ask(self.probes), self.alone)

        def forget(model: torch.nn.Module) -> None:
            model.model.layers[0].mlp.down_proj.weight.data.zero_()

        llm.apply_model(forget)  # the control: weights that had not come back
        without = zip(self.engine.ask(self.probes), self.alone, strict=True)
        changed = sum(not compare([one, other]).identical for (one, *_), (other, *_) in without)
        assert changed > len(self.probes) // 2, f"weights were lost, and {changed} answers changed"

    def offloaded(self) -> None:
        """Prefixes that the card has forgotten come back from the host's memory."""
        before = self.engine.metric("vllm:external_prefix_cache_hits")
        for _ in range(14):
            self.engine.cold()
            self.compare("prefix from the host's memory", self.engine.ask(self.probes), self.alone)
        found = self.engine.metric("vllm:external_prefix_cache_hits") - before
        assert found > 14 * 128, f"{found} tokens came from the host's memory"

    # Of every engine; `slept` and `offloaded` need options.
    AXES = (
        "prefix_cached", "batches", "growing", "edges", "prefix_partly_cached", "chunks", "aborts", "scored",
        "prompt_scores", "choices", "many", "poisoned",
    )  # fmt: skip

    def run(self) -> Iterator[dict[str, Any]]:
        self.engine.cold()
        # Alone: nobody else is served, and nothing is cached.
        self.alone = [self.engine.ask([probe])[0] for probe in self.probes]
        assert self.engine.cached == 0
        self.answered += self.alone
        for axis in self.only or self.AXES:
            try:
                getattr(self, axis)()
            except Exception:  # the other axes are worth the card's time
                self.errors[axis] = traceback.format_exc()[-2000:]
            yield self.report()

    def report(self) -> dict[str, Any]:
        answers = [answer for choices in self.answered for answer in choices]
        return {
            "axes": {name: vars(axis) for name, axis in self.axes.items()},
            "tokens": sum(axis.tokens for axis in self.axes.values()),
            "differing": sum(axis.differing for axis in self.axes.values()),
            "errors": self.errors,
            "prefix_hits": self.engine.cached,
            "preemptions": self.engine.metric("vllm:num_preemptions"),
            "aborted": self.engine.aborted,
            "steps": sum(self.engine.steps.values()),
            "rows": self.engine.most_rows,
            "step_tokens": sorted(self.engine.steps),
            # Engines of one fingerprint give the same answers.
            "answers": hashlib.sha256("".join(map(digest, answers)).encode()).hexdigest(),
            "answered_tokens": sum(len(answer.token_ids) for answer in answers),
            "distinct_tokens": len({token for answer in answers for token in answer.token_ids}),
            "seconds": round(time.perf_counter() - self.began, 1),
        }


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
    bulk, only = int(given.pop("bulk", "256")), given.pop("only", "")
    for name, value in json.loads(given.pop("inductor", "{}")).items():
        setattr(inductor, name, value)
    options = {"load_format": "dummy", **{name: json.loads(value) for name, value in given.items()}}
    if side == "planted":
        plant()
    # Refused until this proof has shown them.
    policy.ENGINE_OPTIONS.update(enable_sleep_mode=policy.ANY, kv_offloading_size=policy.ANY)
    if side != "default":
        options["additional_config"] = {"vllm_deterministic": {}}
    made_up.use()
    began = time.perf_counter()
    llm = LLM(folder, seed=0, disable_log_stats=False, **options)
    start = round(time.perf_counter() - began, 1)
    axes = [axis for axis in only.split(",") if axis] or list(Proof.AXES)
    # A head that is tied to the embedding would give every row a poisoned logit.
    if llm.llm_engine.model_config.hf_config.tie_word_embeddings:
        axes = [axis for axis in axes if axis != "poisoned"]
    for report in Proof(Engine(llm.llm_engine), bulk, axes).run():
        report["start_seconds"] = start
        if side == "ours":
            report["certified"] = llm.collective_rpc("deterministic_report")[0]["certified"]
        print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
