"""Other ways to the engine: several API server processes, and `LLM(...)` without a server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys

import openai
import pytest

from vllm_deterministic.verify.probes import ask

pytestmark = pytest.mark.serving


@pytest.mark.slow
@pytest.mark.parametrize("config", ["det-f32-eager-2048-twofronts"])
def test_two_api_servers(servers, probes, said, config):
    """The flag reaches both processes: equal answers, equal derived seeds, and the same refusals from either."""
    reference = {kind: servers.reference(config, probe) for kind, probe in probes.items()}
    endpoint = servers.get(config).endpoint
    unseeded = dataclasses.replace(probes["seeded"], seed=None, max_tokens=16)
    refused = dataclasses.replace(unseeded, extra_body={"use_beam_search": True})
    # Each call is a connection of its own, and the kernel hands it to one of the two: all to one is 1 in 2^11.
    answers = [answer for _ in range(12) for answer in asyncio.run(ask(endpoint, unseeded))]
    assert said(config, "two API servers", "T = 0.8", answers).identical
    for _ in range(12):
        with pytest.raises(openai.BadRequestError, match="use_beam_search"):
            asyncio.run(ask(endpoint, refused))
    for kind, probe in probes.items():
        answers = reference[kind] + asyncio.run(ask(endpoint, probe))
        assert said(config, "two API servers", kind, answers).identical


# Writes, for each kind, how many positions of the same answer agree: alone against in a batch, decode against prompt;
# and what is said to two things that are not promised.
OFFLINE = """
import json, sys
import vllm_deterministic
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams

def main():
    config = vllm_deterministic.enable() if sys.argv[2] == "on" else {}
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=1024, additional_config=config)
    prompts = ["The map shows an island that no sailor has named. " * repeats for repeats in range(1, 13)]
    def said(outputs, at):
        answer = outputs[at].outputs[0]
        chosen = zip(answer.token_ids, answer.logprobs, strict=True)
        return [(token, step[token].logprob.hex()) for token, step in chosen]
    def agree(left, right):
        return sum(a == b for a, b in zip(left, right, strict=True))
    found = {}
    for kind, sampling in {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 0.8, "seed": 5}}.items():
        params = SamplingParams(max_tokens=48, ignore_eos=True, logprobs=0, **sampling)
        alone = llm.generate([prompts[9]], params)
        crowd = llm.generate(prompts, params)
        ids = [*alone[0].prompt_token_ids, *alone[0].outputs[0].token_ids]
        (read,) = llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, prompt_logprobs=0))
        scored = list(zip(ids, read.prompt_logprobs, strict=True))[len(alone[0].prompt_token_ids):]
        decoded = said(alone, 0)
        found[kind] = {
            "batch": agree(decoded, said(crowd, 9)),
            "prompt": agree(decoded, [(token, step[token].logprob.hex()) for token, step in scored]),
        }
    unproved = {
        "parameter": lambda: llm.generate(["x"], SamplingParams(max_tokens=1, extra_args={"x": 1})),
        "beam search": lambda: llm.beam_search([{"prompt": "x"}], BeamSearchParams(beam_width=2, max_tokens=1)),
    }
    for kind, ask in unproved.items():
        try:
            ask()
            found[kind] = "answered"
        except Exception as error:
            found[kind] = str(error)
    with open(sys.argv[3], "w") as file:  # standard output is vLLM's log
        json.dump(found, file)

if __name__ == "__main__":
    main()
"""


def offline(folder, tmp_path, state: str) -> dict:
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE)
    result = tmp_path / "found.json"
    command = [sys.executable, str(script), str(folder), state, str(result)]
    environ = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    # Not the exit code: the script writes at its end, and after it vLLM's daemon threads can abort the interpreter that
    # is shutting down ("terminate called without an active exception", once in some twenty runs).
    assert result.exists(), (done.stdout + done.stderr)[-6000:]
    return json.loads(result.read_text())


def test_offline(servers, model, tmp_path):
    servers.stop()
    found = offline(model("bfloat16"), tmp_path, "on")
    assert found.pop("parameter").startswith("'extra_args' is not proved deterministic")
    assert found.pop("beam search").startswith("'beam_search' is not proved deterministic")
    assert found == {kind: {"batch": 48, "prompt": 48} for kind in ("greedy", "seeded")}


@pytest.mark.slow
def test_offline_control(servers, model, tmp_path):
    """Without the plugin's settings the same engine gives other bits in a batch, and as prompt."""
    servers.stop()
    found = offline(model("bfloat16"), tmp_path, "off")
    assert found.pop("parameter") == found.pop("beam search") == "answered"
    assert all(found[kind][axis] < 48 for kind in found for axis in ("batch", "prompt"))
