"""The trainer on a card against real engines in its own process: every family's bits, and gradients that repeat.

TRAIN_PROOF_REPORTS names a folder for what every process says, as it says it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("transformers")

HERE = Path(__file__).parent
SECONDS = 240  # for each process; they run side by side
RUNS = {"qwen3": ("qwen3",), "qwen2": ("qwen2", "processed"), "llama": ("llama",), "llama again": ("llama",)}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("models")
    said = Path(os.environ.get("TRAIN_PROOF_REPORTS") or tmp_path_factory.mktemp("reports"))
    subprocess.run([sys.executable, HERE / "made_up.py", folder], check=True)

    def run(name: str) -> dict[str, Any]:
        model, *options = RUNS[name]
        own = folder / f"of {name}"  # where the process writes its weights
        shutil.copytree(folder / model, own)
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }
        command = ["timeout", str(SECONDS), sys.executable, str(HERE / "train_proof.py"), str(own), *options]
        out, log = said / f"{name}.out", said / f"{name}.log"
        with out.open("w") as stdout, log.open("w") as stderr:
            status = subprocess.run(command, env=environment, stdout=stdout, stderr=stderr).returncode
        lines = [line for line in out.read_text().splitlines() if line.startswith("REPORT ")]
        last: dict[str, Any] = json.loads(lines[-1].removeprefix("REPORT ")) if lines else {"errors": {}}
        if status:
            last["errors"]["process"] = f"exit {status}: {log.read_text()[-3000:]}"
        return last

    with ThreadPoolExecutor(len(RUNS)) as pool:
        return dict(zip(RUNS, pool.map(run, RUNS), strict=True))


def part(reports: Mapping[str, dict[str, Any]], name: str, of: str) -> dict[str, Any]:
    errors = {which: text for which, text in reports[name]["errors"].items() if which in (of, "process")}
    assert not errors, "\n".join(errors.values())
    found: dict[str, Any] = reports[name][of]
    return found


runs = pytest.mark.parametrize("name", RUNS)


@runs
def test_the_engines_logprobs_are_the_trainers(reports: Mapping[str, dict[str, Any]], name: str) -> None:
    found = part(reports, name, "forward")
    assert {what: count for what, count in found.items() if what.startswith("unequal") and count} == {}
    assert found["tokens"] == 18 * 40
    assert found["distinct_tokens"] > 100


@runs
def test_control_transformers_own_forward_differs(reports: Mapping[str, dict[str, Any]], name: str) -> None:
    assert part(reports, name, "forward")["control: unequal in transformers' own"] > 0


@runs
def test_micro_batches_order_and_checkpointing_change_no_bit(reports: Mapping[str, dict[str, Any]], name: str) -> None:
    assert len(set(part(reports, name, "backward")["accumulated"].values())) == 1


@runs
def test_a_backward_pass_repeats(reports: Mapping[str, dict[str, Any]], name: str) -> None:
    found = part(reports, name, "backward")
    assert len(set(found["autograd, twice"])) == 1
    # The control: without the fold, micro-batches matter.
    assert found["control: autograd, by 4"] not in found["autograd, twice"]


def test_another_process_has_the_same_gradients(reports: Mapping[str, dict[str, Any]]) -> None:
    assert part(reports, "llama", "backward") == part(reports, "llama again", "backward")


@runs
def test_the_gradient_is_the_gradient(reports: Mapping[str, dict[str, Any]], name: str) -> None:
    """No further from f64 than twice transformers' own gradient in bfloat16, every parameter."""
    assert all(worst <= 2 for _, worst in part(reports, name, "accuracy").values())


@runs
def test_new_weights_reach_the_running_engine(reports: Mapping[str, dict[str, Any]], name: str) -> None:
    found = part(reports, name, "update")
    assert found["unequal"] == 0
    assert found["answers changed"] > 0
    assert found["fingerprint changed"]
