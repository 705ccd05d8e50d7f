"""Answers under a grammar: the grammar masks a row's logits, and which rows have one must not matter to the others."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re

import pytest

from vllm_deterministic.verify.probes import Probe, ask

pytestmark = pytest.mark.serving

MAIN = "det-bf16-compiled-2048"
main = pytest.mark.parametrize("config", [MAIN])
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "year": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["name", "year"],
    "additionalProperties": False,
}
YEAR = r"[A-Z][a-z]{3,9} [0-9]{4}"
GRAMMARS = {
    "json": {
        "chat": True,
        "extra_body": {"response_format": {"type": "json_schema", "json_schema": {"name": "keeper", "schema": SCHEMA}}},
    },
    "regex": {"extra_body": {"structured_outputs": {"regex": YEAR}}},
}


@main
@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "seeded"])
@pytest.mark.parametrize("grammar", sorted(GRAMMARS))
def test_under_a_grammar(servers, axes, said, config, grammar, temperature):
    seed = None if temperature == 0.0 else 7
    question = "Who kept the lighthouse, and since when?"
    probe = Probe(grammar, question, temperature=temperature, seed=seed, max_tokens=64, logprobs=0, **GRAMMARS[grammar])
    answers = axes.batch(servers.get(config).endpoint, probe, repeats=4, neighbours=12)
    assert said(config, f"grammar: {grammar}", "greedy" if seed is None else "seeded", answers).identical
    # The grammar was in force.
    if grammar == "regex":
        assert re.fullmatch(YEAR, answers[0].text)
    if grammar == "json":
        assert set(json.loads(answers[0].text)) == {"name", "year"}
    assert answers[0].token_ids


@main
def test_a_grammar_next_door_changes_nothing(servers, probes, said, config):
    """A plain request beside four that are held to a grammar."""

    endpoint = servers.get(config).endpoint
    held = [Probe(name, "A keeper:", max_tokens=48, **GRAMMARS[name]) for name in ("json", "regex", "regex", "json")]
    greedy = dataclasses.replace(probes["greedy"], max_tokens=48)

    async def together():
        return await asyncio.gather(ask(endpoint, greedy), *(ask(endpoint, probe) for probe in held))

    answers = asyncio.run(ask(endpoint, greedy)) + asyncio.run(together())[0]
    assert said(config, "grammar next door", "greedy", answers).identical
