"""vLLM's data parallel ranks of a dense model: engines of their own, which give one answer or do not start."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from vllm_deterministic.serving.replay import find_receipt, replay
from vllm_deterministic.verify.probes import compare, run_load
from vllm_deterministic.verify.server import Server, ServerError, free_port, serve

pytestmark = [pytest.mark.serving, pytest.mark.slow]

OPTIONS = ("--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager", "--served-model-name", "smollm2")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
RANKS = 2


def client(server: Server) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=server.base_url, api_key="EMPTY", max_retries=0, http_client=http)


def promised(server: Server) -> Any:
    return client(server).get(f"{server.url}/deterministic", cast_to=object)


def served(server: Server) -> list[float]:
    """Requests that each rank has ended."""
    return [server.metric("vllm:request_success_total", engine=str(rank)) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone(servers: Any, model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one engine promises and answers."""
    servers.stop()
    log = tmp_path_factory.mktemp("alone") / "log"
    with serve(model("bfloat16"), *OPTIONS, "--deterministic", env=ENVIRONMENT, log=log) as server:
        return {"promise": promised(server), "answer": asked(server)}


def asked(server: Server, rank: int | None = None) -> Any:
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    return client(server).completions.create(
        model="smollm2", prompt="The map shows", max_tokens=48, temperature=0.8, extra_headers=headers,
        extra_body={"deterministic": {"require": True, "receipt": True}},
    )  # fmt: skip


@pytest.fixture(scope="class")
def server(alone: Any, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two ranks, two API servers before them."""
    log = tmp_path_factory.mktemp("ranks") / "log"
    options = [*OPTIONS, "--deterministic", "--deterministic-self-check", "0.5", "--data-parallel-size", str(RANKS)]
    with serve(model("bfloat16"), *options, env=ENVIRONMENT, log=log) as server:
        yield server


class TestOneServer:
    """`--data-parallel-size 2`."""

    def test_it_promises_what_one_engine_promises(self, server: Server, alone: Any) -> None:
        there = promised(server)
        assert there["engines"] == RANKS
        assert alone["promise"]["engines"] == 1
        assert there["fingerprint"] == alone["promise"]["fingerprint"]

    def test_answers_are_the_same_whichever_rank_serves(self, server: Server, probes: Any, said: Any) -> None:
        for kind, probe in probes.items():
            before = served(server)
            answers = asyncio.run(run_load(server.endpoint, probe, 6, concurrency=2, neighbours=12))
            assert all(new > old for new, old in zip(served(server), before, strict=True)), "one rank served nothing"
            assert said("two ranks", "load balanced", kind, answers).identical
        # The control: the comparison sees another seed.
        other = dataclasses.replace(probes["seeded"], seed=1)
        answers += asyncio.run(run_load(server.endpoint, other, 1, concurrency=1, neighbours=0))
        assert not compare(answers).identical

    def test_a_receipt_of_either_rank_is_that_of_one_engine(self, server: Server, alone: Any) -> None:
        want = find_receipt(alone["answer"].model_dump_json())
        for rank in range(RANKS):
            before = served(server)[rank]
            receipt = find_receipt(asked(server, rank).model_dump_json())
            assert served(server)[rank] > before  # the self-check asks as well
            assert receipt == want
        came = [replay(want, server.url) for _ in range(2 * RANKS)]
        assert all(one.same_bits and one.reasons == [] for one in came)
        # The control: the same request with another seed is no replay.
        body = {**want.request.body, "seed": want.request.body["seed"] + 1}
        other = want.model_copy(update={"request": want.request.model_copy(update={"body": body})})
        assert not replay(other, server.url).same_bits

    def test_the_self_check_asks_every_rank(self, server: Server) -> None:
        def said(result: str) -> float:
            return server.metric("vllm_deterministic_self_checks_total", result=result)

        before, same = served(server), said("same")
        deadline = time.monotonic() + 150
        while said("same") == same:
            assert time.monotonic() < deadline
            time.sleep(1)
        assert all(new >= old + 2 for new, old in zip(served(server), before, strict=True))
        assert said("differs") == 0


def test_without_the_flag_the_answers_differ(servers: Any, model: Any, probes: Any, said: Any, tmp_path: Path) -> None:
    """The control: the same two ranks, the same load."""
    servers.stop()
    options = [*OPTIONS, "--data-parallel-size", str(RANKS)]
    with serve(model("bfloat16"), *options, env=ENVIRONMENT, log=tmp_path / "log") as server:
        answers = asyncio.run(run_load(server.endpoint, probes["greedy"], 6, concurrency=2, neighbours=12))
        assert not said("two ranks, no flag", "load balanced", "greedy", answers).identical


class TestTwoNodes:
    """One server before engines on two nodes, each started with options of its own."""

    @staticmethod
    @contextlib.contextmanager
    def nodes(folder: Path, scratch: Path, second: tuple[str, ...]) -> Iterator[Server]:
        """Both nodes are this machine: rank 0 behind the server, rank 1 from another command."""
        place = ["--data-parallel-size", "2", "--data-parallel-size-local", "1", "--data-parallel-address", "127.0.0.1"]
        place += ["--data-parallel-rpc-port", str(free_port())]
        command = [*OPTIONS, *place, "--headless", "--data-parallel-start-rank", "1", *second]
        with contextlib.ExitStack() as stack:
            stack.enter_context(headless(folder, command, scratch / "second.log"))
            first = [*OPTIONS, *place, "--deterministic", "--api-server-count", "1"]
            yield stack.enter_context(serve(folder, *first, env=ENVIRONMENT, log=scratch / "first.log"))

    def test_they_answer_as_one(self, servers: Any, alone: Any, model: Any, tmp_path: Path) -> None:
        servers.stop()
        with self.nodes(model("bfloat16"), tmp_path, ("--deterministic",)) as server:
            assert promised(server)["fingerprint"] == alone["promise"]["fingerprint"]
            want = find_receipt(alone["answer"].model_dump_json())
            assert [find_receipt(asked(server, rank).model_dump_json()) for rank in range(2)] == [want, want]

    @pytest.mark.parametrize(
        ("second", "named"),
        [
            (("--deterministic", "--seed", "5"), r"rank 1 differs in settings\.seed"),
            ((), "Start every data parallel rank with --deterministic"),
        ],
        ids=["another seed", "no flag"],
    )
    def test_a_rank_that_differs_is_refused(
        self, servers: Any, model: Any, tmp_path: Path, second: tuple[str, ...], named: str
    ) -> None:
        servers.stop()
        with pytest.raises(ServerError), self.nodes(model("bfloat16"), tmp_path, second):
            pass
        assert re.search(named, (tmp_path / "first.log").read_text(errors="replace"))


@contextlib.contextmanager
def headless(folder: Path, options: list[str], log: Path) -> Iterator[None]:
    """`vllm serve --headless`: engines without a server, ended as one process group."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), *options]
    with log.open("wb") as output:
        environment = {**os.environ, "PYTHONSAFEPATH": "1", **ENVIRONMENT}
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_on_each_node(servers: Any, alone: Any, model: Any, tmp_path: Path) -> None:
    """`--data-parallel-hybrid-lb`: a server for each node's ranks, and a load balancer of the user's before them."""
    servers.stop()
    place = ["--data-parallel-size", "4", "--data-parallel-size-local", "2", "--data-parallel-hybrid-lb"]
    place += ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(free_port())]
    want = find_receipt(alone["answer"].model_dump_json())
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(2) as pool:

        def start(first: int) -> Server:
            options = [*OPTIONS, "--deterministic", "--api-server-count", "1", *place]
            options += ["--data-parallel-start-rank", str(first)]
            log = tmp_path / f"{first}.log"
            return stack.enter_context(serve(model("bfloat16"), *options, env=ENVIRONMENT, log=log, timeout=600))

        for server in pool.map(start, (0, 2)):
            there = promised(server)
            assert (there["engines"], there["fingerprint"]) == (2, alone["promise"]["fingerprint"])
            assert [find_receipt(asked(server, rank).model_dump_json()) for rank in range(2)] == [want, want]
