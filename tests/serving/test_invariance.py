"""The contract over HTTP: the bits of an answer do not depend on any of these.

Every axis has its negative control in test_controls.py: the same questions, asked of a server without the flag.
"""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from vllm_deterministic.verify.probes import Probe, ask, by_choice, run_load

pytestmark = pytest.mark.serving

# 2048: prefills in one piece. 16: in seventeen chunks, the neighbours queue. 64: in between, decodes beside chunks.
# Compiled and eager round at other places, so each has its own reference; CI runs one of each.
QUICK = ["det-bf16-compiled-2048", "det-bf16-compiled-16", "det-f32-eager-2048"]
SLOW = [
    "det-bf16-compiled-64",
    "det-bf16-eager-2048",
    "det-bf16-eager-16",
    "det-f32-eager-16",
    "det-f32-eager-64",
    "det-f32-compiled-2048",
    "det-f32-compiled-16",
]
configs = pytest.mark.parametrize("config", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
kinds = pytest.mark.parametrize("kind", ["greedy", "seeded"])
with_long = pytest.mark.parametrize("kind", ["greedy", "seeded", "long"])


@configs
@with_long
def test_alone_in_any_chunks(servers, probes, said, config, kind):
    """16, 64 and 2048 tokens a step: three processes, one answer."""
    reference = servers.reference(config, probes[kind])
    alone = asyncio.run(ask(servers.get(config).endpoint, probes[kind]))
    # One token more than full chunks and full pages: the controls rest on it.
    assert len(alone[0].prompt_token_ids) % 128 == 1
    assert said(config, "chunk", kind, reference + alone).identical


@configs
@kinds
def test_among_neighbours(servers, axes, probes, said, config, kind):
    reference = servers.reference(config, probes[kind])
    neighbours = 48 if config.endswith("2048") else 16
    answers = axes.batch(servers.get(config).endpoint, probes[kind], neighbours=neighbours)
    assert said(config, "batch", kind, reference + answers).identical


@configs
def test_top_logprobs_among_neighbours(servers, axes, probes, said, config):
    """Tokens of equal logit (bf16 has many) are listed by one rule, however many a neighbour wants listed."""
    probe = dataclasses.replace(probes["greedy"], logprobs=2)
    answers = axes.batch(servers.get(config).endpoint, probe, repeats=4, neighbours=12)
    assert said(config, "top logprobs", "greedy", answers).identical


@configs
@with_long
def test_prefix_hit(servers, axes, probes, said, config, kind):
    reference = servers.reference(config, probes[kind])
    server = servers.get(config)
    before = server.metric("vllm:prefix_cache_hits_total")
    answers = axes.prefix(server.endpoint, probes[kind])
    assert server.metric("vllm:prefix_cache_hits_total") > before
    assert said(config, "prefix hit", kind, reference + answers).identical


@configs
@with_long
def test_decode_equals_prompt(servers, axes, probes, said, config, kind):
    answers = axes.scored(servers.get(config).endpoint, probes[kind])
    assert len(answers[0].logprobs) == probes[kind].max_tokens
    assert said(config, "decode against prompt", kind, answers).identical


@configs
@kinds
def test_streamed(servers, axes, probes, said, config, kind):
    answers = axes.delivery(servers.get(config).endpoint, probes[kind])
    assert said(config, "delivery", kind, servers.reference(config, probes[kind]) + answers).identical


@configs
@kinds
def test_chat_equals_completions(servers, probes, said, config, kind):
    """A chat request and a completion of the token ids that its template made of it."""
    endpoint = servers.get(config).endpoint
    chat = dataclasses.replace(probes[kind], chat=True)
    (spoken,) = asyncio.run(ask(endpoint, chat))
    (written,) = asyncio.run(ask(endpoint, dataclasses.replace(chat, chat=False, prompt=spoken.prompt_token_ids)))
    assert len(spoken.token_ids) == chat.max_tokens
    # The two endpoints list the top logprobs in different shapes.
    pair = [dataclasses.replace(answer, top_logprobs=()) for answer in (spoken, written)]
    assert said(config, "endpoint", kind, pair).identical


@configs
def test_choices_are_seeds(servers, probes, said, config):
    """Choice i of n = 4 is what n = 1 says with seed + i, whoever else is served."""
    endpoint = servers.get(config).endpoint
    probe = dataclasses.replace(probes["seeded"], max_tokens=32)
    four = dataclasses.replace(probe, n=4)
    crowded = by_choice(asyncio.run(run_load(endpoint, four, repeats=1, concurrency=1, neighbours=8)))
    assert list(crowded) == [0, 1, 2, 3]
    texts = set()
    for index, answers in crowded.items():
        single = asyncio.run(ask(endpoint, dataclasses.replace(probe, seed=probe.seed + index)))
        same = [dataclasses.replace(answer, index=0) for answer in answers + single]
        assert said(config, f"n = 4, choice {index}", "seeded", same).identical
        texts.add(single[0].text)
    assert len(texts) > 1, "the control: other seeds give other answers"


@pytest.mark.parametrize(
    "config", ["det-bf16-compiled-2048", pytest.param("det-f32-eager-2048", marks=pytest.mark.slow)]
)
@kinds
def test_neighbours_hang_up(servers, axes, probes, said, config, kind):
    server = servers.get(config)
    before = server.metric("vllm:generation_tokens_total")
    answers = axes.aborted(server.endpoint, probes[kind])
    generated = server.metric("vllm:generation_tokens_total") - before
    assert generated < 8 * 400 / 2, "the neighbours were to be cut off"
    assert said(config, "aborts", kind, answers).identical


@pytest.mark.parametrize(
    "config",
    # Another cache size compiles anew, so CI takes the eager one, which test_seeds.py asks too.
    ["det-f32-eager-2048-small-random", pytest.param("det-bf16-compiled-2048-small", marks=pytest.mark.slow)],
)
def test_preempted(servers, probes, said, config):
    """A cache of 16 pages and eight requests that need three each at first, and four in the end: some are evicted."""
    longer = {kind: dataclasses.replace(probes[kind], max_tokens=160) for kind in ("greedy", "seeded")}
    expected = {kind: servers.reference(config, probe) for kind, probe in longer.items()}
    server = servers.get(config)
    for kind, probe in longer.items():
        before = server.metric("vllm:num_preemptions_total")
        answers = asyncio.run(_together(server.endpoint, probe, 8))
        assert server.metric("vllm:num_preemptions_total") > before
        assert said(config, "preemption", kind, expected[kind] + answers).identical


async def _together(endpoint, probe: Probe, copies: int):
    """Copies that share no cached page, all at once."""
    salted = [
        dataclasses.replace(probe, extra_body={**probe.extra_body, "cache_salt": f"page-{copy}"})
        for copy in range(copies)
    ]
    return [answer for answers in await asyncio.gather(*(ask(endpoint, one) for one in salted)) for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["det-bf16-compiled-2048", "det-f32-compiled-2048"])
@kinds
def test_restart_and_compile_cache(servers, probes, said, config, kind, tmp_path):
    """A new process that compiles everything, and a second one that finds it compiled."""
    answers = list(servers.reference(config, probes[kind]))
    root = str(tmp_path / "compile-cache")
    for _ in ("cold", "warm"):
        servers.stop()
        server = servers.get(config, VLLM_CACHE_ROOT=root)
        answers += asyncio.run(ask(server.endpoint, probes[kind]))
    servers.stop()
    assert said(config, "restart, compile cache", kind, answers).identical
