"""Whole engines on a card, against themselves and each other: every axis of the promise, and the engine without it.

ENGINE_PROOF_REPORT names a folder for what every engine says, as it says it: engine_report.py reads that also of a run
that was cut short, and the next run of the same code asks only the engines that had not ended well.
ENGINE_PROOF_SECONDS is the time for all of them. GPU_MODEL names a checkpoint's folder, asked as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_report import last_report
from vllm_deterministic.kernels import certificates
from vllm_deterministic.kernels.attention.tree import tree_for
from vllm_deterministic.kernels.certificates import digest

import vllm_deterministic

pytest.importorskip("vllm")

HERE = Path(__file__).parent
AT_ONCE = 11  # engines on a card; they share its memory and the host's cores
SECONDS = int(os.environ.get("ENGINE_PROOF_SECONDS", "500"))
ROOM = ("gpu_memory_utilization=0.05", "max_model_len=4096")
# The cache is given in bytes: what vLLM measures is wrong while other engines start on the same card.
CACHE = f"kv_cache_memory_bytes={3 << 30}"
# 48 pages, for one long request and a little: the crowd of the batches cannot stay, and is preempted. Axes that would
# wait there for most of a thousand requests are left to the others.
FEW_PAGES = (
    f"kv_cache_memory_bytes={48 << 20}",
    "only=prefix_cached,prefix_partly_cached,chunks,aborts,scored,choices,many,poisoned",
)
TUNED = 'inductor={"max_autotune_pointwise":true,"coordinate_descent_tuning":true}'
BY_POINTERS = "only=batches,prefix_cached,chunks,scored,many"
GRAPHS = 'compilation_config={"cudagraph_mode":"%s"}'
ENGINES = {
    "ours": ("qwen3", "ours"),
    "few pages": ("qwen3", "ours", *FEW_PAGES),
    "few pages, by priority": ("qwen3", "ours", 'scheduling_policy="priority"', *FEW_PAGES),
    "512 tokens a step, no graphs": ("qwen3", "ours", "max_num_batched_tokens=512", GRAPHS % "NONE"),
    "2048 tokens a step, piecewise graphs": ("qwen3", "ours", "max_num_batched_tokens=2048", GRAPHS % "PIECEWISE"),
    "8192 tokens a step, full graphs": ("qwen3", "ours", "max_num_batched_tokens=8192", GRAPHS % "FULL"),
    "eager": ("qwen3", "ours", "enforce_eager=true"),
    "default": ("qwen3", "default"),
    "fp16": ("llama", "ours", 'dtype="float16"'),
    "bias and tied": ("qwen2", "ours"),
    "32 KV heads": ("qwen3-32", "ours", "only=batches,prefix_cached,chunks,scored,many"),
    "fp8 cache": ("llama", "ours", 'kv_cache_dtype="fp8"', BY_POINTERS),
    "heads of 96": ("llama-96", "ours", BY_POINTERS),
    "asleep in between": ("qwen3", "ours", "enable_sleep_mode=true", "only=many,slept"),
    "pages in the host's memory": ("qwen3", "ours", "kv_offloading_size=4", "only=many,offloaded,chunks"),
    "planted": ("qwen2", "planted"),
    "planted, eager": ("qwen2", "planted", "enforce_eager=true"),
    "otherwise tuned": ("qwen3", "ours", TUNED, "only=many"),
    # The compile cache that the first one left.
    "warm": ("qwen3", "ours", "only=many"),
}
# Weights that were trained, of a folder's: what people serve, beside the shapes made up for this proof.
TRAINED = ('load_format="auto"', "bulk=300", "only=batches,prefix_cached,chunks,scored,many")
if "GPU_MODEL" in os.environ:
    ENGINES |= {
        "trained": (os.environ["GPU_MODEL"], "ours", *TRAINED),
        "trained, default": (os.environ["GPU_MODEL"], "default", *TRAINED, "only=batches,chunks,many"),
    }
OURS = [name for name, (_, side, *_) in ENGINES.items() if side == "ours"]
PREEMPTED = [name for name in OURS if name.startswith("few pages")]
# Of one fingerprint: one answer, whatever the settings.
ALIKE = [name for name in OURS if ENGINES[name][0] == "qwen3" and name not in ("ours", "eager")]
CACHED = {"whole prefix cached", "prefix partly cached", "prefix from the host's memory"}
CROWDED = 512  # the largest graph that vLLM captures itself; below, every number of tokens in a step is met
EDGES = (512, *range(640, 2049, 128), 4096, 8192, 16384)  # graphs, rows of tables, products, steps

TIMED_OUT = 124  # what `timeout` returns then
BULK = "bulk=400"  # the same for all engines that are compared with each other

Runs = Mapping[str, "subprocess.CompletedProcess[str]"]


def sources() -> list[str]:
    """What an engine runs of this project, and what it is asked."""
    package = Path(vllm_deterministic.__file__).parent
    kernels = Path(certificates.__file__).parent
    kinds = (".py", ".cu", ".cuh", ".cpp", ".toml")
    files = [file for at in (package, kernels, HERE) for file in sorted(at.rglob("*")) if file.suffix in kinds]
    return [file.read_text() for file in files]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every engine once, in processes of their own, side by side on all the cards there are."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    cards = listed.split(",")
    said = Path(os.environ.get("ENGINE_PROOF_REPORT") or tmp_path_factory.mktemp("said"))
    folder = said / "models"  # and compile caches: "warm" may be asked by a later run than the engine before it
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, HERE / "made_up.py", folder], check=True)
    end = time.monotonic() + SECONDS
    code = sources()

    def run(name: str) -> subprocess.CompletedProcess[str]:
        model, side, *options = ENGINES[name]
        out, error, ended = (said / f"{name}.{kind}" for kind in ("out", "err", "ended"))
        asked = digest([ENGINES[name], code])
        if ended.exists() and (before := json.loads(ended.read_text()))["asked"] == asked:
            return subprocess.CompletedProcess([], before["returncode"], out.read_text(), error.read_text())
        cache = "ours" if name == "warm" else name
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "CUDA_VISIBLE_DEVICES": cards[list(ENGINES).index(name) % len(cards)],
            "VLLM_CACHE_ROOT": str(folder / f"cache-{cache.replace(' ', '-')}"),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }
        # An option that is given twice is taken as it is given last.
        given = (BULK, *ROOM, CACHE, *options)
        command = [sys.executable, HERE / "engine_proof.py", folder / model, side, *given]
        if name == "warm":
            first.result()
        # Where the time is over, what was found until then is still printed.
        limit = ["timeout", str(max(1, int(end - time.monotonic())))]
        with out.open("w") as told, error.open("w") as complained:
            done = subprocess.run([*limit, *command], env=environment, stdout=told, stderr=complained)
        if done.returncode == 0 or (side == "planted" and done.returncode != TIMED_OUT):
            ended.write_text(json.dumps({"asked": asked, "returncode": done.returncode}))
        return subprocess.CompletedProcess(command, done.returncode, out.read_text(), error.read_text())

    with ThreadPoolExecutor(AT_ONCE * len(cards)) as pool:
        first = pool.submit(run, "ours")
        rest = {name: pool.submit(run, name) for name in ENGINES if name != "ours"}
        found = {"ours": first.result(), **{name: one.result() for name, one in rest.items()}}
    return found


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found = last_report(done.stdout)
    print(json.dumps(found)[:3000])
    assert done.returncode == 0, done.stderr[-3000:]
    assert found is not None
    assert not found["errors"], "\n".join(found["errors"].values())
    return found


@pytest.mark.parametrize("name", OURS)
def test_nothing_differs_on_any_axis(runs: Runs, name: str) -> None:
    found = report(runs[name])
    assert found["differing"] == 0, {axis: tally for axis, tally in found["axes"].items() if tally["differing"]}
    assert found["prefix_hits"] > 0 or not CACHED & set(found["axes"])
    assert found["distinct_tokens"] > 100  # not a text that could not have differed


def test_control_the_engine_without_it_differs_on_every_axis(runs: Runs) -> None:
    axes = report(runs["default"])["axes"]
    # Two rows may take the path of one.
    same = {axis for axis, tally in axes.items() if not tally["differing"]}
    assert same <= {"in a batch of 2", "in a batch of 9"}


@pytest.mark.skipif("trained" not in ENGINES, reason="GPU_MODEL names no checkpoint")
def test_control_trained_weights_differ_without_it(runs: Runs) -> None:
    assert report(runs["trained, default"])["differing"] > 0


@pytest.mark.parametrize("name", ALIKE)
def test_another_schedule_another_process_and_another_cache_give_the_same_answers(runs: Runs, name: str) -> None:
    found, reference = report(runs[name]), report(runs["ours"])
    assert found["answered_tokens"] == reference["answered_tokens"]
    assert found["answers"] == reference["answers"]


@pytest.mark.parametrize("name", PREEMPTED)
def test_requests_were_preempted(runs: Runs, name: str) -> None:
    assert report(runs[name])["preemptions"] > 0


def test_steps_of_every_size_were_made(runs: Runs) -> None:
    """Of the engine with the largest steps: every number of tokens up to the largest graph, and around each edge."""
    found = report(runs["ours"])
    largest = max(found["step_tokens"])
    edges = {m for edge in EDGES for m in (edge - 1, edge, edge + 1) if m <= largest}
    assert largest >= EDGES[-2]
    assert ({*range(1, CROWDED + 1)} | edges) - set(found["step_tokens"]) == set()
    assert found["rows"] > CROWDED
    assert found["aborted"] > 0


def test_enough_was_compared_on_every_axis(runs: Runs) -> None:
    totals: Counter[str] = Counter()
    for name in OURS:
        found = report(runs[name])
        for axis, tally in found["axes"].items():
            totals["batches of 2 to 512" if axis.startswith("in a batch of") else axis] += tally["tokens"]
        if name in ALIKE:  # within it, and with the first engine
            totals[f"engine: {name}"] = found["tokens"] + found["answered_tokens"]
    print(dict(totals))
    assert sum(totals.values()) >= 1_000_000
    assert {axis: tokens for axis, tokens in totals.items() if tokens < 50_000} == {}


def test_every_layer_is_ours(runs: Runs) -> None:
    shapes = {
        "ours": {(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (32000, 4096)},
        "bias and tied": {(1536, 1024), (1024, 1024), (6144, 1024), (1024, 3072), (32000, 1024)},
    }
    for name, expected in shapes.items():
        layers = [layer for layer in report(runs[name])["certified"] if layer["operator"] == "linear"]
        assert {(layer["n"], layer["k"]) for layer in layers} == expected


def test_contexts_reached_double_splits(runs: Runs) -> None:
    (layer,) = [layer for layer in report(runs["32 KV heads"])["certified"] if layer["operator"] == "attention"]
    assert tree_for(layer["head_size"], kv_heads=32).steady <= 2048
    assert {"decode-tma", "prefill-cuda", "prefill-cuda-pieces"} <= set(layer["schedules"])


def test_layers_of_other_trees_run_by_pointers(runs: Runs) -> None:
    for name, size in (("fp8 cache", 64), ("heads of 96", 96)):
        (layer,) = [layer for layer in report(runs[name])["certified"] if layer["operator"] == "attention"]
        assert layer["head_size"] == size
        assert set(layer["schedules"]) == {"decode", "decode-64", "prefill", "prefill-64"}
        assert not layer["dropped"]


@pytest.mark.parametrize("name", ["planted", "planted, eager"])
def test_a_bare_product_stops_the_server_and_is_named(runs: Runs, name: str) -> None:
    done = runs[name]
    assert done.returncode != 0
    said = done.stderr + done.stdout
    assert "multiplies matrices outside of its linear layers" in said
    assert "linear" in said.split("outside of its linear layers", 1)[1][:600]
