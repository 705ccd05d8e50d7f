"""Whole engines on a card, against themselves and each other: every axis of the promise, and the engine without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

HERE = Path(__file__).parent
ROOM = ("gpu_memory_utilization=0.05", "max_model_len=4096")
# Pages for one long request and a little: the crowd of the batches cannot stay, and is preempted.
FEW_PAGES = ("num_gpu_blocks_override=48",)
ENGINES = {
    "default": ("qwen3", "default"),
    "ours": ("qwen3", "ours"),
    "512 tokens a step": ("qwen3", "ours", "max_num_batched_tokens=512"),
    "few pages": ("qwen3", "ours", *FEW_PAGES),
    "eager": ("qwen3", "ours", "enforce_eager=true"),
    "fp16": ("llama", "ours", 'dtype="float16"'),
    "bias and tied": ("qwen2", "ours"),
    "planted": ("qwen2", "planted"),
    "planted, eager": ("qwen2", "planted", "enforce_eager=true"),
}
OURS = [name for name, (_, side, *_) in ENGINES.items() if side == "ours"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every engine once, in processes of their own, side by side."""
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, HERE / "made_up.py", folder], check=True)

    def run(name: str) -> subprocess.CompletedProcess[str]:
        model, side, *options = ENGINES[name]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(folder / f"cache-{name.replace(' ', '-')}"),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }
        room = ROOM if FEW_PAGES[0] in options else (*ROOM, f"kv_cache_memory_bytes={3 << 30}")
        command = [sys.executable, HERE / "engine_proof.py", folder / model, side, "bulk=128", *room, *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)

    with ThreadPoolExecutor(len(ENGINES)) as pool:
        return dict(zip(ENGINES, pool.map(run, ENGINES), strict=True))


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert done.returncode == 0, done.stderr[-3000:]
    print(lines[0][:3000])
    return json.loads(lines[0].removeprefix("REPORT "))


@pytest.mark.parametrize("name", OURS)
def test_nothing_differs_on_any_axis(runs: dict, name: str) -> None:
    found = report(runs[name])
    assert found["differing"] == 0, {axis: tally for axis, tally in found["axes"].items() if tally["differing"]}
    assert found["prefix_hits"] > 0
    assert found["distinct_tokens"] > 100  # not a text that could not have differed


def test_control_the_engine_without_it_differs_on_every_axis(runs: dict) -> None:
    axes = report(runs["default"])["axes"]
    # Two rows may take the path of one.
    same = {axis for axis, tally in axes.items() if not tally["differing"]}
    assert same <= {"in a batch of 2", "in a batch of 9"}


def test_a_small_step_and_preemption_change_nothing(runs: dict) -> None:
    reference = report(runs["ours"])
    assert report(runs["512 tokens a step"])["answers"] == reference["answers"]
    crowded = report(runs["few pages"])
    assert crowded["preemptions"] > 0
    assert crowded["answers"] == reference["answers"]


def test_every_layer_is_ours(runs: dict) -> None:
    shapes = {
        "ours": {(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (32000, 4096)},
        "bias and tied": {(1536, 1024), (1024, 1024), (6144, 1024), (1024, 3072), (32000, 1024)},
    }
    for name, expected in shapes.items():
        layers = [layer for layer in report(runs[name])["certified"] if layer["operator"] == "linear"]
        assert {(layer["n"], layer["k"]) for layer in layers} == expected


@pytest.mark.parametrize("name", ["planted", "planted, eager"])
def test_a_bare_product_stops_the_server_and_is_named(runs: dict, name: str) -> None:
    done = runs[name]
    assert done.returncode != 0
    said = done.stderr + done.stdout
    assert "multiplies matrices outside of its linear layers" in said
    assert "linear" in said.split("outside of its linear layers", 1)[1][:600]
