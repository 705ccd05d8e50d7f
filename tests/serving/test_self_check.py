"""`--deterministic-self-check` on a real server under load: a planted fault is seen, and nothing is without one."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from pathlib import Path

import openai
import pytest

from vllm_deterministic.verify.probes import Probe, hang_up, run_load
from vllm_deterministic.verify.server import Server, serve

sys.path.insert(0, str(Path(__file__).parents[1] / "verify"))
import planted_faults

pytestmark = [pytest.mark.serving, pytest.mark.slow]

SECONDS = 6
OPTIONS = (
    "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "64", "--enforce-eager", "--deterministic",
    "--deterministic-self-check", str(SECONDS / 60),
)  # fmt: skip
PROBE = Probe("greedy", "The lighthouse keeper counts", max_tokens=32, extra_body={"ignore_eos": True})


@pytest.fixture
def start(tmp_path, model, servers):
    """Starts a server that checks itself every few seconds, with or without a fault."""
    servers.stop()
    path = planted_faults.server_path(tmp_path)

    def starting(fault: str, *more: str):
        env = {"PYTHONPATH": path, planted_faults.VARIABLE: fault, "VLLM_CPU_KVCACHE_SPACE": "1"}
        return serve(model("bfloat16"), *OPTIONS, *more, env=env, log=tmp_path / "server.log")

    return starting


def checks(server: Server, result: str) -> float:
    return server.metric(f'vllm_deterministic_self_checks_total{{result="{result}"}}')


def wait_for(server: Server, result: str, more: int, seconds: float = 60) -> None:
    wanted, deadline = checks(server, result) + more, time.monotonic() + seconds
    while checks(server, result) < wanted:
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.2)


def loaded(server: Server, result: str, more: int) -> None:
    """Waits for results while neighbours come and go."""

    async def both():
        load = asyncio.create_task(run_load(server.endpoint, PROBE, repeats=24, concurrency=4, neighbours=48))
        await asyncio.to_thread(wait_for, server, result, more)
        await load

    asyncio.run(both())


def leave(server: Server) -> None:
    """A reader hangs up: with the fault `abort-leak` every later request draws other noise."""

    async def leaving():
        async with server.endpoint.client() as client:
            await hang_up(server.endpoint, dataclasses.replace(PROBE, max_tokens=400), 3, client)

    asyncio.run(leaving())


def ask(server: Server, demand: object):
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=server.base_url, api_key="EMPTY", max_retries=0, http_client=http) as client:
        options = {"model": server.model, "max_tokens": 1, "extra_body": {"deterministic": demand}}
        return client.completions.create(prompt="x", **options)


def test_nothing_is_seen_without_a_fault(start):
    with start("", "--deterministic-self-check-stop") as server:
        leave(server)
        loaded(server, "same", 3)
        assert (checks(server, "reference"), checks(server, "differs"), checks(server, "failed")) == (1, 0, 0)
        assert ask(server, "require").system_fingerprint.startswith("vd1-")


def test_a_difference_stops_the_promise(start):
    with start("abort-leak", "--deterministic-self-check-stop") as server:
        loaded(server, "same", 1)
        promised = ask(server, "require").system_fingerprint
        leave(server)
        loaded(server, "differs", 1)
        for demand in ("require", {"require": promised}, {"receipt": True}):
            with pytest.raises(openai.InternalServerError) as refusal:
                ask(server, demand)
            assert refusal.value.status_code == 503
            assert "self-check" in str(refusal.value)
        assert ask(server, False).system_fingerprint is None
        assert server.metric('vllm_deterministic_refused_requests_total{field="deterministic",reason="stopped"}') == 3
        assert server.healthy()


def test_a_difference_is_only_told_where_stopping_was_not_asked(start):
    with start("abort-leak") as server:
        leave(server)
        wait_for(server, "differs", 1)
        assert ask(server, "require").system_fingerprint.startswith("vd1-")
        assert "deterministic self-check: differs" in server.log.read_text(errors="replace")
