"""The presets for `vllm serve --config` on a card, and the contract: real servers side by side, asked over HTTP.

GPU_MODEL names a checkpoint's folder; without it the model is made up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("vllm")

from side_by_side import FEW_GRAPHS, IDS, NAME, PROBES, client, promise, receipt, serve_all  # noqa: E402
from vllm_deterministic.configs import serve_presets  # noqa: E402

from vllm_deterministic.serving.replay import find_receipt, replay  # noqa: E402
from vllm_deterministic.verify.probes import Answer, Probe, compare, run_load  # noqa: E402
from vllm_deterministic.verify.server import Server  # noqa: E402


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Server]]:
    """A server for each preset."""
    sides = {name: ("--config", str(path), *FEW_GRAPHS) for name, path in serve_presets().items()}
    with serve_all(tmp_path_factory.mktemp("presets"), sides, checkpoint=os.environ.get("GPU_MODEL")) as running:
        yield running


def answers(server: Server, *probes: Probe) -> list[list[Answer]]:
    """What each probe gives several times among others."""
    return [asyncio.run(run_load(server.endpoint, probe, 8, concurrency=4, neighbours=32)) for probe in probes]


def test_latency_and_throughput_give_one_answer(servers: Mapping[str, Server]) -> None:
    sides = servers["latency"], servers["throughput"]
    assert len({promise(side)["fingerprint"] for side in sides}) == 1
    for quick, full in zip(*(answers(side, *PROBES) for side in sides), strict=True):
        assert compare([*quick, *full]).identical
    other = dataclasses.replace(PROBES[1], seed=12)  # the control: another seed is seen
    assert not compare([*answers(sides[0], PROBES[1])[0], *answers(sides[1], other)[0]]).identical


def test_the_contract_on_the_wire(servers: Mapping[str, Server]) -> None:
    """Fingerprints of whole and streamed answers, demands that are met, refused and not understood."""
    server = servers["latency"]
    fingerprint = promise(server)["fingerprint"]
    given: dict[str, Any] = {"model": NAME, "prompt": IDS[:50], "max_tokens": 8, "temperature": 0.8}

    def asked(demand: Any, **more: Any) -> Any:
        return client(server).completions.create(**given, extra_body={"deterministic": demand}, **more)

    for demand in ("require", {"require": fingerprint}, False):
        assert asked(demand).system_fingerprint == fingerprint
    chunks = list(asked({"receipt": True}, stream=True))
    assert {chunk.system_fingerprint for chunk in chunks} == {fingerprint}
    streamed = find_receipt("\n".join(f"data: {chunk.model_dump_json()}" for chunk in chunks))
    assert replay(streamed, server.url).same_bits
    with pytest.raises(openai.ConflictError, match=fingerprint):
        asked({"require": "vd1-" + "0" * 32})
    with pytest.raises(openai.BadRequestError) as refusal:
        asked({"unheard": True})
    assert refusal.value.param == "deterministic.unheard"
    assert server.metric("vllm_deterministic_refused_requests_total") >= 2


def test_an_audited_answer_is_replayed(servers: Mapping[str, Server]) -> None:
    made = receipt(servers["audit"])
    assert replay(made, servers["audit"].url).same_bits
    seed = made.request.body["seed"] + 1
    other = made.request.model_copy(update={"body": {**made.request.body, "seed": seed}})
    assert not replay(made.model_copy(update={"request": other}), servers["audit"].url).same_bits  # the control


def test_rollouts_differ_and_each_can_be_repeated(servers: Mapping[str, Server]) -> None:
    ask = client(servers["rl"]).completions.with_raw_response.create
    given: dict[str, Any] = {"model": NAME, "prompt": IDS[:100], "max_tokens": 48, "temperature": 1.0}
    made = [ask(**given) for _ in range(8)]
    texts = [raw.parse().choices[0].text for raw in made]
    assert len(set(texts)) == len(texts)
    for raw, text in zip(made, texts, strict=True):
        seed = int(raw.headers["x-vllm-deterministic-seed"])
        assert ask(**given, seed=seed).parse().choices[0].text == text
