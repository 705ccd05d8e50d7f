"""The GitHub Action of examples/regression-team, its steps run one by one as a runner would, against real servers.

Not GitHub's own: the checkout is a copy, the interpreter this one, the upload a look at what would be uploaded, and
pip finds this tree's wheel. What `run:` holds is run as it stands, by `bash -e`, in the job's environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
pytestmark = [pytest.mark.serving, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "regression-team"
DETERMINISTIC = "det-bf16-eager-2048"
PLAIN = "plain-bf16-eager-2048"


class Job:
    """A job of a workflow file in its workspace; `env` is what its steps see."""

    def __init__(self, steps: list[dict[str, Any]], workspace: Path, env: dict[str, str]) -> None:
        self.steps, self.workspace, self.env = steps, workspace, env
        self.said = ""
        self.uploaded: list[str] = []

    def run(self) -> list[str]:
        """Each step's outcome: "success", "failure" or "skipped"."""
        outcomes: list[str] = []
        for step in self.steps:
            if "failure" in outcomes and step.get("if") != "always()":
                outcomes.append("skipped")
            elif "uses" in step:
                outcomes.append(self._use(step["uses"].split("@")[0], step.get("with", {})))
            else:
                outcomes.append(self._shell(step["run"]))
        return outcomes

    def _use(self, action: str, inputs: dict[str, str]) -> str:
        if action == "actions/checkout":
            assert (self.workspace / "test_answers.py").exists()
        elif action == "actions/setup-python":
            folder = self.workspace.parent / "python"
            if not folder.exists():
                venv.create(folder, with_pip=True)
            self.env["PATH"] = f"{folder / 'bin'}{os.pathsep}{self.env['PATH']}"
        elif action == "actions/upload-artifact":
            self.uploaded = sorted(file.name for file in (self.workspace / inputs["path"]).glob("*"))
            return "success" if self.uploaded else "failure"
        else:
            pytest.fail(f"a step that this test does not know: {action}")
        return "success"

    def _shell(self, script: str) -> str:
        done = subprocess.run(
            ["bash", "-e", "-c", script], cwd=self.workspace, env=self.env, capture_output=True, text=True, check=False
        )
        self.said += done.stdout + done.stderr
        return "failure" if done.returncode else "success"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, capture_output=True, check=True)
    return next(out.glob("*.whl"))


@pytest.fixture
def job(tmp_path: Path, wheel: Path):
    """(URL of the endpoint) -> the job of answers.yml for it; one workspace and one interpreter for a test."""
    workspace = tmp_path / "workspace"
    shutil.copytree(EXAMPLE, workspace)
    (workflow,) = workspace.glob(".github/workflows/*.yml")
    (described,) = yaml.safe_load(workflow.read_text())["jobs"].values()
    constraint = tmp_path / "constraint.txt"
    constraint.write_text(f"vllm-deterministic @ {wheel.as_uri()}\n")

    def made(url: str) -> Job:
        contexts = {"vars.ENDPOINT_URL": url, "secrets.ENDPOINT_KEY": "a key"}
        env = {
            name: re.sub(r"\$\{\{ *(.+?) *\}\}", lambda found: contexts[found[1]], value)
            for name, value in described["env"].items()
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
        offline = {"PIP_CONSTRAINT": str(constraint), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return Job(described["steps"], workspace, {**kept, **offline, **env})

    return made


@pytest.mark.parametrize("config", [DETERMINISTIC])
def test_the_action_passes_and_tells_a_changed_answer(servers, config, job) -> None:
    here = job(servers.get(config).base_url)
    assert here.run() == ["success"] * 4 + ["failure", "success"], here.said
    assert "run once with UPDATE_GOLDEN=1" in here.said  # the team's first run: nothing to compare with

    here.env["UPDATE_GOLDEN"] = "1"  # done once, by hand, and committed
    assert here.run() == ["success"] * 6, here.said
    del here.env["UPDATE_GOLDEN"]
    assert here.run() == ["success"] * 6, here.said
    assert here.uploaded == ["junit.xml", "report.html", "report.json"]

    golden = here.workspace / "golden.json"
    kept = json.loads(golden.read_text())
    golden.write_text(json.dumps({**kept, "story": {**kept["story"], "digest": "of another answer"}}))
    assert here.run() == ["success"] * 4 + ["failure", "success"], here.said


@pytest.mark.parametrize("config", [PLAIN])
def test_the_action_stops_at_an_endpoint_that_differs(servers, config, job) -> None:
    """The negative control: no answer is compared, the report is kept."""
    here = job(servers.get(config).base_url)
    assert here.run() == ["success"] * 3 + ["failure", "skipped", "success"], here.said
    assert "differs" in (here.workspace / "report" / "report.json").read_text()
