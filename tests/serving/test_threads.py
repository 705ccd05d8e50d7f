"""The model's threads are a schedule: with 1, 2, 5 or 7 of them the server is on the same trees.

PyTorch deals a loop out in equal shares. Five and seven shares end within a row, and eager SiLU computes the ends with
other code: the control leaves the plugin's cure of that out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "verify"))
import planted_faults

pytestmark = [pytest.mark.serving, pytest.mark.slow]

configs = pytest.mark.parametrize("config", ["det-f32-eager-2048", "det-bf16-compiled-2048"])
odd = pytest.mark.parametrize("threads", [5, 7])


def unbound(threads: int) -> dict[str, str]:
    """Environment of a server whose model runs with this many threads on whatever cores there are."""
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    # Else PyTorch takes MKL's number, which is never above the cores'; and threads that outnumber them must not spin.
    return {**bound, "MKL_DYNAMIC": "FALSE", "OMP_WAIT_POLICY": "PASSIVE"}


def questions(axes, server, probe):
    """One probe alone, among neighbours and from the cache: many numbers of rows."""
    return axes.batch(server.endpoint, probe, repeats=2, neighbours=12) + axes.prefix(server.endpoint, probe)


@configs
@pytest.mark.skipif(not {0, 1} <= os.sched_getaffinity(0), reason="needs the first two cores")
def test_two_threads(servers, axes, probes, said, config):
    """vLLM leaves a core to its front end; given both, the model runs with two threads."""
    references = {kind: servers.reference(config, probe) for kind, probe in probes.items()}
    server = servers.get(config, VLLM_CPU_OMP_THREADS_BIND="0,1")
    assert "2 threads)" in server.log.read_text()
    for kind, probe in probes.items():
        answers = questions(axes, server, probe)
        assert said(config, "two threads", kind, references[kind] + answers).identical
    servers.stop()


@odd
@configs
def test_odd_threads(servers, axes, probes, said, config, threads):
    references = {kind: servers.reference(config, probe) for kind, probe in probes.items()}
    server = servers.get(config, **unbound(threads))
    assert f"{threads} threads)" in server.log.read_text()
    for kind, probe in probes.items():
        answers = questions(axes, server, probe)
        assert said(config, f"{threads} threads", kind, references[kind] + answers).identical
        if kind != "seeded":
            scored = axes.scored(server.endpoint, probe)
            assert said(config, f"{threads} threads, as prompt", kind, scored).identical
    servers.stop()


@odd
@pytest.mark.parametrize("config", ["det-f32-eager-2048"])
def test_uncut_activation_sees_the_rows(servers, axes, probes, said, config, threads, tmp_path):
    """The control: the same questions, of a server that cuts everything but the activation."""
    fault = {"PYTHONPATH": planted_faults.server_path(tmp_path), planted_faults.VARIABLE: "uncut-activation"}
    server = servers.get(config, **unbound(threads), **fault)
    answers = questions(axes, server, probes["greedy"])
    servers.stop()
    assert not said(config, f"{threads} threads, uncut", "greedy", answers).identical
