"""Real servers for the contract over HTTP: each configuration starts once, one at a time, and is killed by its pid.

SERVE_OPTIONS: further options of each, for example of a card that others use too.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_deterministic.verify.probes import (
    Answer,
    Comparison,
    Endpoint,
    Probe,
    ask,
    compare,
    hang_up,
    run_load,
    score,
)
from vllm_deterministic.verify.server import Server, serve

STORY = (
    "A lighthouse keeper finds a map behind a loose brick. The map shows an island that no sailor has ever named, "
    "and in one corner somebody has written the date of his own birth. He asks the baker, the priest and the captain "
    "of the mail boat what they know. Each of them tells another story, and each story is true in one detail only. "
)
# 257 tokens: sixteen chunks of 16 and one token, two pages of the KV cache and one token. That token alone is what a
# prefix hit computes: one row, as in decoding, where vLLM without the flag takes other paths than for many.
LONG_PROMPT = STORY * 3 + STORY[: STORY.index(", the priest")]


VARIANTS = {
    "small": ("--num-gpu-blocks-override", "17"),
    "random": ("--deterministic-unseeded", "random"),
    "twofronts": ("--api-server-count", "2"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A server configuration: mode-dtype-compilation-tokens[-variant], for example det-bf16-compiled-2048."""

    name: str
    env: tuple[tuple[str, str], ...] = ()

    @property
    def dtype(self) -> str:
        return {"bf16": "bfloat16", "f32": "float32"}[self.name.split("-")[1]]

    @property
    def cli_args(self) -> list[str]:
        mode, _, compilation, tokens, *variants = self.name.split("-")
        args = ["--dtype", self.dtype, "--max-model-len", "2048", "--max-num-batched-tokens", tokens]
        # vLLM wants at least as many tokens in a step as sequences.
        args += ["--max-num-seqs", "8" if int(tokens) < 64 else "64"]
        args += ["--enforce-eager"] if compilation == "eager" else []
        args += ["--deterministic"] if mode == "det" else []
        args += os.environ.get("SERVE_OPTIONS", "").split()
        return [*args, *(option for variant in variants for option in VARIANTS[variant])]


class Servers:
    """At most one server is alive: a second one would take the cores of the first."""

    def __init__(self, model: Callable[[str], Path], logs: Path) -> None:
        self._model, self._logs = model, logs
        self._stack = contextlib.ExitStack()
        self._live: tuple[Config, Server] | None = None
        self._answers: dict[tuple[str, str], list[Answer]] = {}

    def get(self, name: str, **env: str) -> Server:
        """The live server of this configuration: the one that runs if it is that, else a new one in its place."""
        config = Config(name, tuple(sorted(env.items())))
        if self._live is None or self._live[0] != config or not self._live[1].healthy():
            self.stop()
            log = self._logs / f"{name}-{uuid.uuid4().hex[:6]}.log"
            environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **env}
            server = self._stack.enter_context(
                serve(self._model(config.dtype), *config.cli_args, env=environment, log=log)
            )
            self._live = (config, server)
        return self._live[1]

    def stop(self) -> None:
        self._stack.close()
        self._live = None

    def answers(self, name: str, probe: Probe) -> list[Answer]:
        """What this configuration answers, alone and with a cold prefix cache; asked once a session."""
        key = (name, repr(probe))
        if key not in self._answers:
            self._answers[key] = asyncio.run(ask(self.get(name).endpoint, cold(probe)))
        return self._answers[key]

    def reference(self, name: str, probe: Probe) -> list[Answer]:
        """What the deterministic server of the same dtype and compilation, with 2048 tokens a step, answers."""
        _, dtype, compilation = name.split("-")[:3]
        return self.answers(f"det-{dtype}-{compilation}-2048", probe)


def cold(probe: Probe) -> Probe:
    """The same probe, whose prompt no earlier request has left in the prefix cache."""
    return dataclasses.replace(probe, extra_body={**probe.extra_body, "cache_salt": uuid.uuid4().hex})


class Axes:
    """Each method asks one probe in ways that the contract calls equal, and returns the answers."""

    @staticmethod
    def batch(endpoint: Endpoint, probe: Probe, repeats: int = 6, neighbours: int = 48) -> list[Answer]:
        """Alone and cold; then among 1 to `neighbours` others, its prefix cached from the second time on."""
        alone = asyncio.run(ask(endpoint, cold(probe)))
        return alone + asyncio.run(run_load(endpoint, probe, repeats, concurrency=2, neighbours=neighbours))

    @staticmethod
    def prefix(endpoint: Endpoint, probe: Probe) -> list[Answer]:
        """Cold and then twice from the prefix cache, alone."""
        fixed = cold(probe)
        return [answer for _ in range(3) for answer in asyncio.run(ask(endpoint, fixed))]

    @staticmethod
    def delivery(endpoint: Endpoint, probe: Probe) -> list[Answer]:
        """Whole and streamed."""
        streamed = dataclasses.replace(probe, stream=True)
        return [answer for one in (probe, streamed) for answer in asyncio.run(ask(endpoint, cold(one)))]

    @staticmethod
    def aborted(endpoint: Endpoint, probe: Probe, quitters: int = 8) -> list[Answer]:
        """Alone; then among long answers whose readers hang up one after the other while it is being answered."""
        longer = dataclasses.replace(probe, max_tokens=400)

        async def among_quitters() -> list[Answer]:
            async with endpoint.client() as client:
                leaving = (hang_up(endpoint, cold(longer), 1 + 4 * place, client) for place in range(quitters))
                answers, *_ = await asyncio.gather(ask(endpoint, cold(probe), client), *leaving)
                return answers

        return asyncio.run(ask(endpoint, cold(probe))) + asyncio.run(among_quitters())

    @staticmethod
    def scored(endpoint: Endpoint, probe: Probe) -> list[Answer]:
        """As generated, and as scored when the generated tokens are read as prompt."""
        (answer,) = asyncio.run(ask(endpoint, cold(probe)))
        read = asyncio.run(score(endpoint, answer.prompt_token_ids, answer.token_ids))
        plain = dataclasses.replace(answer, top_logprobs=())
        return [plain, dataclasses.replace(plain, logprobs=read)]


@pytest.fixture(scope="session")
def model() -> Callable[[str], Path]:
    """Folder of the default model in a dtype; made once, kept in the user's cache."""
    from vllm_deterministic import models

    return lambda dtype: Path(models.prepare_default_model(dtype=dtype))


@pytest.fixture(scope="session")
def servers(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    pool = Servers(model, tmp_path_factory.mktemp("servers"))
    yield pool
    pool.stop()


_said: list[str] = []


@pytest.fixture(scope="session")
def said() -> Callable[..., Comparison]:
    """Compares answers and keeps the result for the table at the end of the run."""

    def comparing(config: str, axis: str, kind: str, answers: list[Answer]) -> Comparison:
        result = compare(answers)
        _said.append(
            f"{config:24} {axis:24} {kind:8} {result.runs:3} runs: {result.distinct_texts} texts, "
            f"{result.distinct_logprobs} logprob sequences, {result.distinct_digests} answers; first divergence "
            f"{result.first_text_divergence} / {result.first_logprob_divergence}"
        )
        return result

    return comparing


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _said:
        terminalreporter.section("distinct answers by configuration and axis")
        terminalreporter.write_line("\n".join(_said))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups the serving tests by server, the variants after their base, whose answers they need; the rest stays."""
    seen: dict[str, int] = {}
    ranks = {}
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        name = params.get("config") if item.get_closest_marker("serving") else None
        parts = name.split("-") if name else []
        variant = list(VARIANTS).index(parts[4]) if len(parts) > 4 else -1
        ranks[item] = (seen.setdefault("-".join(parts[:4]), len(seen)) if name else -1, variant)
    items.sort(key=ranks.__getitem__)


@pytest.fixture(scope="session")
def axes() -> type[Axes]:
    return Axes


@pytest.fixture(scope="session")
def probes() -> dict[str, Probe]:
    """T = 0 and T = 0.8 with a seed: 257 tokens in, 64 out, logprobs of the chosen tokens.

    "long" reads 1537 tokens: more keys than one tile of the CPU's attention holds, where a prefill has several rounds.
    """
    common = {"prompt": LONG_PROMPT, "max_tokens": 64, "logprobs": 0, "extra_body": {"ignore_eos": True}}
    greedy = Probe(name="greedy", temperature=0.0, **common)
    walk = [100 + (7919 * step) % 40_000 for step in range(1537)]
    return {
        "greedy": greedy,
        "seeded": Probe(name="seeded", temperature=0.8, seed=20261124, **common),
        "long": dataclasses.replace(greedy, name="long", prompt=walk, max_tokens=32),
    }
