"""Requests at T > 0 that bring no seed: one of their own content by default, a fresh and returned one where asked."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from vllm_deterministic.verify.probes import ask, by_choice, compare, run_load

pytestmark = pytest.mark.serving

UNSEEDED = "A request at temperature > 0 brought no seed."
MAIN = "det-bf16-compiled-2048"
main = pytest.mark.parametrize("config", [MAIN])
# Other settings compile anew, so CI takes the eager one.
fresh = pytest.mark.parametrize(
    "config", ["det-f32-eager-2048-small-random", pytest.param(f"{MAIN}-random", marks=pytest.mark.slow)]
)


@main
def test_identical_requests_get_identical_answers(servers, probes, said, config):
    server = servers.get(config)
    counted = 'vllm_deterministic_unseeded_requests_total{mode="derived"}'
    before = server.metric(counted) if UNSEEDED in server.log.read_text() else 0.0
    unseeded = dataclasses.replace(probes["seeded"], seed=None)
    answers = asyncio.run(run_load(server.endpoint, unseeded, repeats=4, concurrency=2, neighbours=8))
    assert said(config, "unseeded", "T = 0.8", answers).identical
    assert answers[0].seeds == ()
    assert server.metric(counted) >= before + 4, "some neighbours bring no seed either"
    assert server.log.read_text().count(UNSEEDED) == 1


@main
def test_other_seeds_give_other_answers(servers, probes, config):
    """The control: the sampler does sample."""
    endpoint = servers.get(config).endpoint
    seeds = [dataclasses.replace(probes["seeded"], seed=seed, max_tokens=16) for seed in range(4)]
    answers = [answer for probe in seeds for answer in asyncio.run(ask(endpoint, probe))]
    assert compare(answers).distinct_texts > 1


@main
def test_length_and_delivery_do_not_change_the_derived_seed(servers, probes, config):
    endpoint = servers.get(config).endpoint
    short = dataclasses.replace(probes["seeded"], seed=None, max_tokens=16)
    long = dataclasses.replace(short, max_tokens=32, stream=True, logprobs=0)
    (first,), (second,) = asyncio.run(ask(endpoint, short)), asyncio.run(ask(endpoint, long))
    assert second.token_ids[:16] == first.token_ids
    assert second.logprobs[:16] == first.logprobs


@fresh
def test_random_seeds_are_fresh_and_returned(servers, probes, said, config):
    """Also a restart with another option: seeded answers are those of the first server."""
    reference = servers.reference(config, probes["seeded"])
    endpoint = servers.get(config).endpoint
    assert said(config, "restart", "seeded", reference + asyncio.run(ask(endpoint, probes["seeded"]))).identical

    unseeded = dataclasses.replace(probes["seeded"], seed=None, max_tokens=24)
    answers = [answer for _ in range(3) for answer in asyncio.run(ask(endpoint, unseeded))]
    assert compare(answers).distinct_texts > 1
    assert len({answer.seeds for answer in answers}) == 3
    for answer in answers:
        (seed,) = answer.seeds
        again = asyncio.run(ask(endpoint, dataclasses.replace(unseeded, seed=seed)))
        assert again[0].seeds == ()
        assert compare([answer, *again]).identical


@fresh
def test_random_seed_of_streamed_choices(servers, probes, config):
    """One seed for the request; choice i used seed + i."""
    endpoint = servers.get(config).endpoint
    two = dataclasses.replace(probes["seeded"], seed=None, max_tokens=16, n=2, stream=True)
    choices = by_choice(asyncio.run(ask(endpoint, two)))
    for index, (answer,) in choices.items():
        (seed,) = answer.seeds
        single = dataclasses.replace(two, seed=seed + index, n=1, stream=False)
        again = asyncio.run(ask(endpoint, single))
        assert compare([dataclasses.replace(answer, index=0), *again]).identical
