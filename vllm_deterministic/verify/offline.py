"""The probes' client of an engine in this process: probes in, their answers out, without a server between.

It makes the engine's steps itself: it decides before each of them who arrives and who leaves, and sees how many tokens
it took. The engine core must live in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from vllm_deterministic.verify.probes import Answer, Probe

__all__ = ["Arrivals", "Engine", "answers", "parameters"]

# Who arrives before one step: probes whose answers are wanted, under their keys, and others under None.
Arrivals = Sequence[tuple[int | None, Probe]]


class Engine:
    """A client of vLLM's LLMEngine. Prompts of probes are token ids; extra_body holds SamplingParams' own arguments.

    cached: answers whose prompt came from the prefix cache in part. aborted: requests. most_rows: requests in the
    fullest step. steps: tokens in a step -> number of such steps. Priorities are drawn from 0 to 2, and count where the
    engine goes by them.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.core = engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.cached = self.aborted = self.most_rows = 0
        self.steps: Counter[int] = Counter()
        self._asked = 0
        self._random = random.Random(7)
        schedule = self.scheduler.schedule

        def counted(*args: Any, **named: Any) -> Any:
            step = schedule(*args, **named)
            self.steps[step.total_num_scheduled_tokens] += step.total_num_scheduled_tokens > 0
            self.most_rows = max(self.most_rows, len(step.num_scheduled_tokens))
            return step

        self.scheduler.schedule = counted

    def ask(self, probes: Sequence[Probe], others: Sequence[Probe] = ()) -> list[list[Answer]]:
        """The answers to probes that are all asked at once, in a random order among the others."""
        at_once = [*enumerate(probes), *((None, other) for other in others)]
        self._random.shuffle(at_once)
        found = self.play([at_once])
        return [found[key] for key in range(len(probes))]

    def play(self, script: Iterable[Arrivals], leave: float = 0.0) -> dict[int, list[Answer]]:
        """Makes a step after each of the script's arrivals, and then until every wanted answer is there.

        leave: the share of the others that are aborted in a step. Those that are left at the end are aborted too.
        """
        asked: dict[str, tuple[int | None, Probe]] = {}
        found: dict[int, list[Answer]] = {}
        wanted = 0
        arrivals = iter(script)
        more = True
        try:
            while more or len(found) < wanted:
                now = next(arrivals, None)
                more = now is not None
                for key, probe in now or ():
                    asked[self._add(probe)] = key, probe
                    wanted += key is not None
                others = [name for name, (key, _) in asked.items() if key is None] if leave else []
                self._abort([name for name in others if self._random.random() < leave], asked)
                for output in self.engine.step():
                    if output.finished and output.request_id in asked:
                        key, probe = asked.pop(output.request_id)
                        if key is not None:
                            self.cached += (output.num_cached_tokens or 0) > 0
                            found[key] = answers(output, probe)
        finally:
            self._abort([*asked], asked)
            while self.engine.has_unfinished_requests() or self.scheduler.has_requests():
                self.engine.step()
        return found

    def cold(self) -> None:
        """Forgets every cached prefix. Raises RuntimeError where requests still use them."""
        while self.core.batch_queue:  # a step under way holds pages
            self.engine.step()
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache was in use and could not be cleared")

    def metric(self, name: str) -> int:
        """A counter of vLLM's. The engine must log statistics."""
        return sum(int(metric.value) for metric in self.engine.get_metrics() if metric.name == name)

    @property
    def next_tokens(self) -> int:
        """How many tokens the requests that are here would take in a step without a limit."""
        here = [*self.scheduler.running, *self.scheduler.waiting]
        return sum(r.num_tokens_with_spec + r.num_output_placeholders - r.num_computed_tokens for r in here)

    def _abort(self, names: Sequence[str], asked: dict[str, tuple[int | None, Probe]]) -> None:
        if names:
            self.engine.abort_request([*names])
            self.aborted += len(names)
        for name in names:
            del asked[name]

    def _add(self, probe: Probe) -> str:
        self._asked += 1
        name = str(self._asked)
        prompt = {"prompt_token_ids": list(probe.prompt or ())}
        # A probe stops at its length alone, and its text is left to whoever wants it.
        asked = parameters(probe, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        self.engine.add_request(name, prompt, asked, priority=self._random.randrange(3))
        return name


def parameters(probe: Probe, **more: Any) -> SamplingParams:
    """What the probe asks of vLLM. extra_body, more: SamplingParams' own arguments."""
    said = {**probe.extra_body, **more}
    if grammar := said.pop("structured_outputs", None):
        said["structured_outputs"] = StructuredOutputsParams(**grammar)
    if probe.top_p is not None:
        said["top_p"] = probe.top_p
    return SamplingParams(
        max_tokens=probe.max_tokens, temperature=probe.temperature, seed=probe.seed, n=probe.n, logprobs=probe.logprobs,
        **said,
    )  # fmt: skip


def answers(output: Any, probe: Probe) -> list[Answer]:
    """The choices by index; after them what was said of the prompt, where that was asked for."""
    found = [
        scored(
            choice.token_ids, choice.logprobs or (), text=choice.text, index=choice.index,
            finish_reason=choice.finish_reason,
        )
        for choice in sorted(output.outputs, key=lambda choice: choice.index)
    ]  # fmt: skip
    if output.prompt_logprobs:
        found.append(scored(output.prompt_token_ids[1:], output.prompt_logprobs[1:], index=probe.n))
    return found


def scored(tokens: Sequence[int], scores: Sequence[Any], *, text: str = "", **more: Any) -> Answer:
    """Tokens with their logprobs; top logprobs under token ids. scores: per token a mapping of id to Logprob."""
    return Answer(
        text=text,
        token_ids=tuple(tokens),
        logprobs=tuple(step[token].logprob for token, step in zip(tokens, scores, strict=False)),
        top_logprobs=tuple(tuple(sorted((str(token), one.logprob) for token, one in s.items())) for s in scores),
        **more,
    )
