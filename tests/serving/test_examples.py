"""The files of examples/ run against a real server, and fail where the server promises nothing."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.serving

EXAMPLES = Path(__file__).parents[2] / "examples"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
MAIN = "det-bf16-compiled-2048"
main = pytest.mark.parametrize("config", [MAIN])
PLAIN = "plain-bf16-eager-2048"
plain = pytest.mark.parametrize("config", [PLAIN])


def run(*command: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PATH": PATH, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    environ |= {"TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    argv = [str(word) for word in command]
    return subprocess.run(argv, capture_output=True, text=True, env=environ, timeout=timeout, check=False)


def needs(program: str) -> None:
    if shutil.which(program, path=PATH) is None:
        pytest.skip(f"{program} is not installed: pip install 'vllm-deterministic[examples]'")


@main
def test_openai_sdk(servers, config) -> None:
    done = run(sys.executable, EXAMPLES / "openai_sdk.py", servers.get(config).base_url)
    assert done.returncode == 0, done.stderr
    assert "the same three times" in done.stdout


@plain
def test_the_control_without_the_flag_nothing_is_promised(servers, config) -> None:
    server = servers.get(config)
    done = run(sys.executable, EXAMPLES / "openai_sdk.py", server.base_url)
    assert done.returncode != 0
    assert "400" in done.stderr
    needs("curl")
    assert run(EXAMPLES / "ask.sh", server.base_url).returncode != 0


@main
def test_curl(servers, config) -> None:
    needs("curl")
    done = run(EXAMPLES / "ask.sh", servers.get(config).base_url)
    assert done.returncode == 0, done.stderr
    fingerprint, first, second = done.stdout.split()
    assert fingerprint.startswith("vd1-")
    assert first == second


@main
@pytest.mark.slow
def test_langchain(servers, config) -> None:
    pytest.importorskip("langchain_openai", reason="pip install 'vllm-deterministic[examples]'")
    done = run(sys.executable, EXAMPLES / "langchain_chat.py", servers.get(config).base_url)
    assert done.returncode == 0, done.stderr
    assert "the same three times" in done.stdout


@main
@pytest.mark.slow
def test_vllm_bench_serve(servers, config) -> None:
    needs("vllm")
    done = run(EXAMPLES / "bench.sh", servers.get(config).base_url, "--num-prompts", 8)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Output token throughput" in done.stdout


@main
@pytest.mark.slow
def test_lm_evaluation_harness(servers, config, model) -> None:
    """Every sample, one request at a time and sixteen at a time, has the same bits."""
    needs("lm_eval")
    done = run(EXAMPLES / "lm-eval" / "run.sh", servers.get(config).base_url, model("bfloat16"), timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert "requests at a time: 0 differ" in done.stdout
    # The score is vLLM's without the flag, within three standard errors of both.
    score, error = accuracy(done.stdout)
    default = run(EXAMPLES / "lm-eval" / "run.sh", servers.get(PLAIN).base_url, model("bfloat16"), timeout=600)
    other, other_error = accuracy(default.stdout)
    assert abs(score - other) <= 3 * (error**2 + other_error**2) ** 0.5


def accuracy(said: str) -> tuple[float, float]:
    """Score and standard error of the task `capitals`."""
    line = next(line for line in said.splitlines() if line.startswith("capitals "))
    scores = ast.literal_eval(line.removeprefix("capitals "))
    return scores["acc,none"], scores["acc_stderr,none"]
