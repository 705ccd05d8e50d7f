"""What the documentation shows is done as it stands there, against a real server where it needs one.

Addresses become the server's, MODEL its model; what takes long on a CPU gets the limits of SHORTENED behind it. What is
not done here is named in ELSEWHERE, with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from vllm_deterministic.verify.server import free_port, serve

pytestmark = pytest.mark.serving

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
MAIN = pytest.mark.parametrize("config", ["det-bf16-compiled-2048"])
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# Beginnings of commands and of Python blocks.
HERE = ("openssl genpkey", "python benchmarks/plots.py", "scripts/readme-figures")
ASKED = (
    "curl -s http", "vllm-deterministic replay", "from openai import OpenAI", "client.chat.completions.create(...",
    'extra_body = {"deterministic": {"require": "vd1-',
)  # fmt: skip
SLOW = (
    "vllm-deterministic verify",
    "vllm-deterministic demo",
    "from langchain_openai",
    "from vllm_deterministic.verify",
)
STARTED = ("vllm serve MODEL",)
ALONE = (
    "import vllm_deterministic\nfrom vllm import LLM",
    "vllm-deterministic bisect",
    "vllm-deterministic doctor",
    "vllm-deterministic model",
)
ELSEWHERE = {
    "pip install": "changes this environment; scripts/release installs the wheel, scripts/install this tree",
    "scripts/quickstart": "installs everything anew; docs/reports/quickstart-cpu.txt",
    "scripts/check": "what CI runs",
    "scripts/test": "what CI runs",
    "scripts/rl_demo": "trains for minutes; benchmarks/results/rl_demo.json",
    "python benchmarks/cpu.py": "a benchmark; benchmarks/results/cpu.json",
    "python benchmarks/gemm.py": "needs a card; benchmarks/results/gemm.json",
    "vllm-deterministic certify": "needs a card; tests/gpu/test_gemm.py",
    "vllm-deterministic tune": "needs a card; tests/gpu/test_gemm.py",
    "pytest --import-mode=importlib tests/gpu": "needs a card",
    "docker ": "needs a container engine; docker/prove.py carries out the image's instructions",
    "kubectl ": "needs a cluster; tests/unit/test_docker.py",
    "vllm-router": "tests/serving/test_scale_out.py",
    "python examples/": "tests/serving/test_examples.py",
    "examples/": "tests/serving/test_examples.py",
    "from vllm_deterministic.train": "parts of a trainer; tests/train runs all of it",
    "with deterministic_forward(model)": "parts of a trainer; tests/train runs all of it",
    'os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"\nllm': "parts of a trainer; tests/train runs all of it",
}
SHORTENED = {
    "vllm-deterministic verify": "--level quick",
    "vllm-deterministic demo": "--n 24 --tokens 32",
}


def shown() -> Iterator[tuple[str, str, str]]:
    """(page, language, text) of each command with the output that is shown for it, and of each Python block."""
    for page in PAGES:
        for language, text in re.findall(r"^```(\w+)[^\n]*\n(.*?)^```$", page.read_text(), flags=re.M | re.S):
            if language == "python":
                yield page.name, language, text
            elif language == "console":
                text = re.sub(r"  +#.*", "", text.replace("\\\n", " "))
                for command in re.findall(r"^\$ (.*\n(?:(?!\$ ).*\n)*)", text, flags=re.M):
                    yield page.name, language, command


# What several pages show is done once.
SHOWN = list({text: (page, language, text) for page, language, text in shown()}.values())


def of(*beginnings: str) -> pytest.MarkDecorator:
    some = [one for one in SHOWN if one[2].startswith(beginnings)]
    return pytest.mark.parametrize(("page", "language", "text"), some, ids=[f"{p}: {t[:40]}" for p, _, t in some])


def test_everything_that_is_shown_is_done_somewhere() -> None:
    groups = {"here": HERE, "asked": ASKED, "slow": SLOW, "started": STARTED, "alone": ALONE, "elsewhere": ELSEWHERE}
    for page, _, text in SHOWN:
        found = [name for name, beginnings in groups.items() if text.startswith(tuple(beginnings))]
        assert len(found) == 1, f"{page}: {text!r} is done in {found}"
    for beginnings in groups.values():
        for beginning in beginnings:
            assert any(text.startswith(beginning) for _, _, text in SHOWN), f"nothing begins with {beginning!r}"


def run(text: str, folder: Path, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PATH": PATH, "PYTHONSAFEPATH": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    command = ["bash", "-euo", "pipefail", "-c", text]
    return subprocess.run(
        command, cwd=folder, env={**environ, **more}, capture_output=True, text=True, timeout=timeout, check=False
    )


def compare(said: str, wanted: str) -> None:
    """Every line that the page shows came, but for numbers and what it leaves out."""
    for line in wanted.splitlines():
        pattern = re.sub(r"\\?…", ".*", re.sub(r"\d+", r"\\d+", re.escape(line)))
        assert re.search(f"^{pattern}$", said, flags=re.M), f"{line!r} is not in {said!r}"


def do(text: str, url: str, model: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command and compares what it prints with what is shown below it."""
    command, _, output = text.partition("\n")
    more = next((limits for beginning, limits in SHORTENED.items() if command.startswith(beginning)), "")
    command = re.sub(r"http://127\.0\.0\.1:800\d", url, command).replace("MODEL", model)
    done = run(f"{command} {more}", folder)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
    compare(done.stdout, output)
    return done


@of(*HERE)
def test_without_a_server(page: str, language: str, text: str, tmp_path: Path) -> None:
    for part in ("benchmarks", "scripts", "docs/plots", "docs/drawings", "README.md"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (tmp_path / part).parent.mkdir(exist_ok=True)
        copy(ROOT / part, tmp_path / part)
    do(text, "", "", tmp_path)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()


class Reader:
    """Somebody who has a server and copies what the pages show."""

    def __init__(self, server, folder: Path) -> None:
        self.url, self.model, self.folder = server.url, server.endpoint.model, folder
        http = openai.DefaultHttpxClient(trust_env=False)
        self.client = openai.OpenAI(base_url=server.base_url, api_key="EMPTY", http_client=http, max_retries=0)

    def block(self, text: str) -> dict[str, object]:
        """The names that a Python block has defined, run with a client and a question at hand."""
        asked = 'model=model, messages=[{"role": "user", "content": "Why?"}], max_tokens=8'
        text = text.replace("(...,", f"({asked},").replace("http://127.0.0.1:8000", self.url)
        names: dict[str, object] = {"client": self.client, "model": self.model}
        exec(compile(text.replace('"MODEL"', "model"), "documentation", "exec"), names)
        return names


@pytest.fixture
def reader(servers, config, tmp_path, monkeypatch) -> Reader:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return Reader(servers.get(config), tmp_path)


@MAIN
@of(*ASKED)
def test_with_a_server(reader, page: str, language: str, text: str) -> None:
    if language == "console":
        answer = reader.client.completions.create(
            model=reader.model, prompt="The sea", max_tokens=12, extra_body={"deterministic": {"receipt": True}}
        )
        (reader.folder / "answer.json").write_text(answer.model_dump_json())
        done = do(text, reader.url, reader.model, reader.folder)
        assert done.stdout.strip()
        return
    names = reader.block(text)
    if "extra_body" in names:  # a demand for a fingerprint that this server does not have
        with pytest.raises(openai.ConflictError):
            reader.client.completions.create(
                model=reader.model, prompt="x", max_tokens=1, extra_body=names["extra_body"]
            )
    if "receipt" in names:
        assert names["receipt"]["fingerprint"] == reader.client.get("/../deterministic", cast_to=object)["fingerprint"]  # type: ignore[index]


@MAIN
@pytest.mark.slow
@of(*SLOW)
def test_with_a_server_for_longer(reader, page: str, language: str, text: str) -> None:
    if language == "console":
        done = do(text, reader.url, reader.model, reader.folder)
        if "--report" in text:
            assert json.loads((reader.folder / "report" / "report.json").read_text())["verdict"] == "same"
        assert done.stdout.strip()
        return
    names = reader.block(text)
    if chat := names.get("chat"):
        assert chat.invoke("Why?").response_metadata["system_fingerprint"].startswith("vd1-")  # type: ignore[attr-defined]


@pytest.mark.slow
@of(*STARTED)
def test_servers_start(servers, model, page: str, language: str, text: str, tmp_path: Path) -> None:
    """Each `vllm serve` of the pages gets ready and promises."""
    servers.stop()
    assert run("openssl genpkey -algorithm ed25519 -out receipts.pem", tmp_path).returncode == 0
    command = text.strip().removeprefix("vllm serve MODEL ")
    words = run(f"printf '%s\\n' {command}", tmp_path).stdout.splitlines()
    words = [str(tmp_path / word) if word == "receipts.pem" else word for word in words]
    if "--port" in words:
        del words[(at := words.index("--port")) : at + 2]
    with serve(model("bfloat16"), *words, "--max-model-len", "2048", timeout=900, port=free_port(),
               env={"VLLM_CPU_KVCACHE_SPACE": "1"}) as server:  # fmt: skip
        http = openai.DefaultHttpxClient(trust_env=False)
        with openai.OpenAI(base_url=server.url, api_key="EMPTY", http_client=http) as client:
            assert client.get("/deterministic", cast_to=object)["fingerprint"].startswith("vd1-")  # type: ignore[index]


@pytest.mark.slow
@of(*ALONE)
def test_engines_of_their_own(servers, model, page: str, language: str, text: str, tmp_path: Path) -> None:
    servers.stop()
    text = text.replace("MODEL", str(model("bfloat16")))
    (tmp_path / "block.py").write_text(text)
    command = f"{sys.executable} block.py" if language == "python" else text
    done = run(command, tmp_path, 900, VLLM_CPU_KVCACHE_SPACE="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip()


def test_the_control_what_does_not_work_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        do("vllm-deterministic replay answer.json --url http://127.0.0.1:8000\n", "http://127.0.0.1:9", "", tmp_path)
    with pytest.raises(AssertionError, match="is not in"):
        do("echo 12 tokens of vd1-5\n12 words of vd1-…\n", "", "", tmp_path)
    do("echo 7 tokens of vd1-5\n12 tokens of vd1-…\n", "", "", tmp_path)
