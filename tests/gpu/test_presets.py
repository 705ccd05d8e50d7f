"""The presets for `vllm serve --config` on a card, and the contract: real servers side by side, asked over HTTP.

GPU_MODEL names a checkpoint's folder; without it the model is made up.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("vllm")

from vllm_deterministic.configs import serve_presets  # noqa: E402

from vllm_deterministic.serving.replay import find_receipt, replay  # noqa: E402
from vllm_deterministic.verify.probes import Answer, Probe, compare, run_load  # noqa: E402
from vllm_deterministic.verify.server import Server, free_port, serve  # noqa: E402

HERE = Path(__file__).parent
ROOM = (
    "--max-model-len", "4096", "--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(3 << 30),
    "--cudagraph-capture-sizes", "1", "2", "4", "8", "16", "32", "64",
)  # fmt: skip
_IDS = [100 + (7919 * step) % 30_000 for step in range(1537)]
PROBES = (
    Probe("greedy", _IDS[:257], max_tokens=64, logprobs=0, extra_body={"ignore_eos": True}),
    Probe("seeded", _IDS[9:90], max_tokens=64, temperature=0.8, seed=11, logprobs=5, extra_body={"ignore_eos": True}),
    Probe("long", _IDS, max_tokens=32, logprobs=0, extra_body={"ignore_eos": True}),
)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Server]]:
    """A server for each preset, all at once."""
    folder = tmp_path_factory.mktemp("presets")
    subprocess.run([sys.executable, HERE / "made_up.py", folder], check=True)
    sys.path.insert(0, str(HERE))
    import made_up

    checkpoint = os.environ.get("GPU_MODEL")
    model = (checkpoint or str(folder / "llama"), *(() if checkpoint else ("--load-format", "dummy")))
    path = os.environ.get("PYTHONPATH", "") if checkpoint else made_up.door(folder)
    ports = {name: free_port() for name in serve_presets()}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(ports)) as pool:

        def start(name: str) -> Server:
            environment = {
                "PYTHONPATH": path,
                "VLLM_CACHE_ROOT": str(folder / f"cache-{name}"),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "HF_HUB_OFFLINE": "1",
            }
            options = (*ROOM, "--served-model-name", "served", "--config", str(serve_presets()[name]))
            log = folder / f"{name}.log"
            served = serve(*model, *options, env=environment, log=log, timeout=300, port=ports[name])
            return stack.enter_context(served)

        yield dict(zip(ports, pool.map(start, ports), strict=True))


def answers(server: Server, *probes: Probe) -> list[list[Answer]]:
    """What each probe gives several times among others."""
    return [asyncio.run(run_load(server.endpoint, probe, 8, concurrency=4, neighbours=32)) for probe in probes]


def client(server: Server) -> Any:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=server.base_url, api_key="x", max_retries=0, http_client=http)


def promise(server: Server) -> Any:
    return client(server).get(f"{server.url}/deterministic", cast_to=object)


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
    given: dict[str, Any] = {"model": "served", "prompt": _IDS[:50], "max_tokens": 8, "temperature": 0.8}

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
    body = {"ignore_eos": True, "deterministic": {"require": True, "receipt": True}}
    ask = client(servers["audit"]).completions.create
    made = ask(model="served", prompt=_IDS[:300], max_tokens=64, temperature=0.8, extra_body=body)
    receipt = find_receipt(made.model_dump_json())
    assert replay(receipt, servers["audit"].url).same_bits
    seed = receipt.request.body["seed"] + 1
    other = receipt.request.model_copy(update={"body": {**receipt.request.body, "seed": seed}})
    assert not replay(receipt.model_copy(update={"request": other}), servers["audit"].url).same_bits  # the control


def test_rollouts_differ_and_each_can_be_repeated(servers: Mapping[str, Server]) -> None:
    ask = client(servers["rl"]).completions.with_raw_response.create
    given: dict[str, Any] = {"model": "served", "prompt": _IDS[:100], "max_tokens": 48, "temperature": 1.0}
    made = [ask(**given) for _ in range(8)]
    texts = [raw.parse().choices[0].text for raw in made]
    assert len(set(texts)) == len(texts)
    for raw, text in zip(made, texts, strict=True):
        seed = int(raw.headers["x-vllm-deterministic-seed"])
        assert ask(**given, seed=seed).parse().choices[0].text == text
