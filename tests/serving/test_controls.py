"""Negative controls: the questions of test_invariance.py, asked of vLLM without the flag, must get differing answers.

They keep the other tests honest: a check that a plain server passes too would prove nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses

import openai
import pytest

from vllm_deterministic.verify.probes import ask

pytestmark = pytest.mark.serving

plain = pytest.mark.parametrize(
    "config", ["plain-bf16-eager-2048", pytest.param("plain-f32-eager-2048", marks=pytest.mark.slow)]
)
chunked = pytest.mark.parametrize(
    "config", ["plain-bf16-eager-16", pytest.param("plain-f32-eager-16", marks=pytest.mark.slow)]
)
kinds = pytest.mark.parametrize("kind", ["greedy", "seeded"])


@plain
@kinds
def test_batch_matters(servers, axes, probes, said, config, kind):
    endpoint = servers.get(config).endpoint
    assert not said(config, "batch", kind, axes.batch(endpoint, probes[kind])).identical


@plain
def test_neighbours_reorder_top_logprobs(servers, axes, probes, said, config):
    probe = dataclasses.replace(probes["greedy"], logprobs=2)
    answers = axes.batch(servers.get(config).endpoint, probe, repeats=4, neighbours=12)
    assert not said(config, "top logprobs", "greedy", answers).identical


@pytest.mark.slow
@plain
def test_neighbours_that_hang_up_matter(servers, axes, probes, said, config):
    answers = axes.aborted(servers.get(config).endpoint, probes["greedy"])
    assert not said(config, "aborts", "greedy", answers).identical


@plain
@kinds
def test_prefix_hit_matters(servers, axes, probes, said, config, kind):
    endpoint = servers.get(config).endpoint
    assert not said(config, "prefix hit", kind, axes.prefix(endpoint, probes[kind])).identical


@plain
@kinds
def test_decode_differs_from_prompt(servers, axes, probes, said, config, kind):
    endpoint = servers.get(config).endpoint
    assert not said(config, "decode against prompt", kind, axes.scored(endpoint, probes[kind])).identical


@chunked
def test_chunks_matter(servers, probes, said, config):
    whole = servers.answers(config.replace("-16", "-2048"), probes["greedy"])
    assert not said(config, "chunk", "greedy", whole + servers.answers(config, probes["greedy"])).identical


@pytest.mark.slow
@pytest.mark.parametrize("config", ["plain-bf16-eager-16"])
def test_seeded_chunks_kill_the_engine(servers, probes, config):
    """vLLM's CPU runner cannot rewind a torch generator; the plugin has none to rewind."""
    server = servers.get(config)
    with pytest.raises(openai.APIError):
        asyncio.run(ask(server.endpoint, dataclasses.replace(probes["seeded"])))
    assert not server.healthy()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["plain-bf16-eager-2048"])
def test_without_the_flag_answers_are_vllms_own(servers, probes, said, config):
    """A server that has the plugin installed, and one that is told to load no plugin."""
    answers = servers.answers(config, probes["greedy"])
    stock = servers.get(config, VLLM_PLUGINS="")
    assert said(config, "no plugin", "greedy", answers + asyncio.run(ask(stock.endpoint, probes["greedy"]))).identical
