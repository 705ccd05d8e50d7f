"""Answers that must not change, compared with `==`: the fixture has made sure that a difference means something.

pytest --deterministic-url http://127.0.0.1:8000/v1            compare with golden.json
UPDATE_GOLDEN=1 pytest --deterministic-url …                   write it anew
"""

import asyncio
import json
import os
from pathlib import Path

import pytest

from vllm_deterministic.verify.probes import Probe, ask, digest

GOLDEN = Path(__file__).with_name("golden.json")
PROMPTS = {
    "capital": "The capital of France is",
    "story": "The lighthouse keeper opened the letter and",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_answer_is_that_of_last_time(deterministic_endpoint, name):
    probe = Probe(name, PROMPTS[name], max_tokens=32, logprobs=1)
    (answer,) = asyncio.run(ask(deterministic_endpoint, probe))
    found = {"text": answer.text, "digest": digest(answer)}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({**golden, name: found}, indent=1) + "\n")
    elif name not in golden:
        pytest.fail(f"no golden answer for {name!r}: run once with UPDATE_GOLDEN=1")
    else:
        assert found == golden[name]
