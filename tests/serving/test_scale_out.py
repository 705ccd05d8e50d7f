"""Two replicas behind a router that knows nothing of us: whichever serves, the answer and its receipt are the same."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from vllm_deterministic.configs import serve_presets

from vllm_deterministic.serving.replay import find_receipt, replay
from vllm_deterministic.verify.probes import Endpoint, compare, run_load
from vllm_deterministic.verify.server import Server, free_port, serve

pytestmark = [pytest.mark.serving, pytest.mark.slow]

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin"
# Different batch sizes and steps, one fingerprint; a core for each where there are two.
REPLICAS = {"latency": "0", "throughput": str((os.cpu_count() or 1) - 1)}
HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 300s
    timeout server 300s
frontend all
    bind 127.0.0.1:{port}
    default_backend deterministic
backend deterministic
    balance roundrobin
    option httpchk GET /deterministic
    server one 127.0.0.1:{one} check
    server two 127.0.0.1:{two} check
"""


@pytest.fixture(scope="module")
def replicas(servers, model, tmp_path_factory) -> Iterator[list[Server]]:
    """A server for each preset, side by side."""
    servers.stop()
    logs = tmp_path_factory.mktemp("replicas")
    with contextlib.ExitStack() as stack:
        started = []
        for preset, core in REPLICAS.items():
            options = ["--config", str(serve_presets()[preset]), "--max-model-len", "2048"]
            env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": core}
            options += ["--served-model-name", "smollm2"]
            served = serve(model("bfloat16"), *options, env=env, log=logs / f"{preset}.log", timeout=900)
            started.append(stack.enter_context(served))
        yield started


def command(router: str, port: int, replicas: list[Server], folder: Path) -> list[str]:
    program = shutil.which(router, path=PATH)
    if program is None:
        pytest.skip(f"{router} is not installed")
    if router == "haproxy":
        config = folder / "haproxy.cfg"
        config.write_text(HAPROXY.format(port=port, one=replicas[0].port, two=replicas[1].port))
        return [program, "-f", str(config)]
    options = ["--worker-urls", *(server.url for server in replicas), "--policy", "round_robin"]
    options += ["--health-check-endpoint", "/deterministic", "--prometheus-port", str(free_port())]
    return [program, "--host", "127.0.0.1", "--port", str(port), *options]


@pytest.fixture(params=["vllm-router", "haproxy"])
def routed(request, replicas, tmp_path) -> Iterator[Endpoint]:
    """The endpoint of a router before the replicas."""
    port = free_port()
    with (tmp_path / "router.log").open("wb") as log:
        process = subprocess.Popen(
            command(request.param, port, replicas, tmp_path), stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while not _answers(f"http://127.0.0.1:{port}/v1/models"):
            assert process.poll() is None, (tmp_path / "router.log").read_text()[-2000:]
            assert time.monotonic() < deadline, (tmp_path / "router.log").read_text()[-2000:]
            time.sleep(0.5)
        yield Endpoint(f"http://127.0.0.1:{port}/v1", "smollm2")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def client(base_url: str) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=base_url, api_key="EMPTY", max_retries=0, http_client=http)


def served(replicas: list[Server]) -> list[float]:
    return [server.metric("vllm:request_success_total") for server in replicas]


def test_answers_are_the_same_whichever_replica_serves(replicas, routed, probes, said) -> None:
    fingerprints = {client(server.url).get("/deterministic", cast_to=object)["fingerprint"] for server in replicas}  # type: ignore[index]
    assert len(fingerprints) == 1
    for kind, probe in probes.items():
        before = served(replicas)
        answers = asyncio.run(run_load(routed, probe, 6, concurrency=2, neighbours=12))
        assert all(new > old for new, old in zip(served(replicas), before, strict=True)), "one replica served nothing"
        assert said("two replicas", "router", kind, answers).identical
    # The control: the comparison sees another seed.
    other = dataclasses.replace(probes["seeded"], seed=1)
    answers += asyncio.run(run_load(routed, other, 1, concurrency=1, neighbours=0))
    assert not compare(answers).identical


def test_receipts_replay_on_either_replica(replicas, routed) -> None:
    answer = client(routed.base_url).completions.create(
        model="smollm2", prompt="The map shows", max_tokens=24, temperature=0.8,
        extra_body={"deterministic": {"require": True, "receipt": True}},
    )  # fmt: skip
    receipt = find_receipt(answer.model_dump_json())
    for server in replicas:
        came = replay(receipt, server.url)
        assert came.same_bits
        assert came.reasons == []
    # The control: the same request with another seed is no replay.
    body = {**receipt.request.body, "seed": receipt.request.body["seed"] + 1}
    other = receipt.model_copy(update={"request": receipt.request.model_copy(update={"body": body})})
    assert not replay(other, replicas[0].url).same_bits


def test_a_pinned_fingerprint_goes_through_the_router(replicas, routed) -> None:
    with pytest.raises(openai.ConflictError):
        client(routed.base_url).completions.create(
            model="smollm2", prompt="x", max_tokens=1, extra_body={"deterministic": {"require": "vd1-" + "0" * 32}}
        )
