"""`vllm-deterministic bisect` on whole engines: it names an operator of plain vLLM, and none with the flag."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.serving, pytest.mark.slow]


def bisect(model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = ["bisect", "--tokens", "8", "--neighbours", "15", "--", str(model), "--max-model-len", "1024", *options]
    environ = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vllm_deterministic.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300, check=False)


def test_an_operator_of_plain_vllm_is_named(model: Callable[[str], Path]) -> None:
    done = bisect(model("bfloat16"))
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert "other bits with M =" in done.stdout
    assert "_proj: _C.onednn_mm" in done.stdout, done.stdout


def test_none_is_named_with_the_flag(model: Callable[[str], Path]) -> None:
    done = bisect(model("bfloat16"), "--deterministic")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert sum("the same bits each" in line for line in said) == 6  # alone, with 1, 3, 7 and 15 others, as a prompt
