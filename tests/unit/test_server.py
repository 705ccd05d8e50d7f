"""The server context manager without vLLM: a stand-in command that lives, dies or never gets ready."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from vllm_deterministic.verify import server as module
from vllm_deterministic.verify.server import ServerError, free_port, serve

READY = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(b'vllm:preempted_total{engine="0"} 2.0\\nvllm:preempted_total{engine="1"} 1.0\\nother 5\\n')
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def instead_of_vllm(monkeypatch, tmp_path):
    def install(code: str) -> None:
        script = tmp_path / "stand_in.py"
        script.write_text(code)
        popen = module.subprocess.Popen
        monkeypatch.setattr(
            module.subprocess,
            "Popen",
            lambda command, **options: popen(
                [sys.executable, str(script), *command[3:]] if "serve" in command else command, **options
            ),
        )

    return install


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_serves_and_leaves_no_process_behind(instead_of_vllm, tmp_path):
    instead_of_vllm(READY)
    with serve("model", "--served-model-name", "m", log=tmp_path / "log") as server:
        assert server.healthy()
        assert server.metric("vllm:preempted_total") == 3.0
        assert server.metric("other") == 5.0
        with pytest.raises(KeyError):
            server.metric("vllm:preempted")
        assert server.endpoint.base_url == f"http://127.0.0.1:{server.port}/v1"
        assert server.endpoint.model == "m"
        child = int(server.log.read_text().split()[1])
        assert _alive(server.pid)
        assert _alive(child)
    assert not server.healthy()
    deadline = time.monotonic() + 5
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)
    server.stop()


OWNER = """
import os, sys
from vllm_deterministic.verify import server as module
popen = module.subprocess.Popen
def stand_in(command, **options):
    return popen([sys.executable, sys.argv[1], *command[3:]] if "serve" in command else command, **options)
module.subprocess.Popen = stand_in
with module.serve("model", log=sys.argv[2]) as server:
    print(server.pid, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_killed_owner_takes_its_server_along(tmp_path):
    """kill -9 leaves no chance to clean up."""
    script = tmp_path / "stand_in.py"
    script.write_text(READY)
    command = [sys.executable, "-c", OWNER, str(script), str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    pids = int(done.stdout), int((tmp_path / "log").read_text().split()[1])
    deadline = time.monotonic() + 15
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, pids))


def test_death_at_start_shows_the_log(instead_of_vllm):
    instead_of_vllm("print('the reason'); raise SystemExit(3)")
    with pytest.raises(ServerError, match=r"status 3 while starting:\n(.|\n)*the reason"), serve("model"):
        pass


def test_never_ready(instead_of_vllm):
    instead_of_vllm("import time; print('loading', flush=True); time.sleep(600)")
    begin = time.monotonic()
    with pytest.raises(ServerError, match="not ready after 1 s"), serve("model", timeout=1):
        pass
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_named(instead_of_vllm, address):
    """Whoever listens there may well answer /health, as another vLLM does."""
    instead_of_vllm(READY)
    with socket.create_server((address, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} cannot be used"), serve("model", port=port):
            pass
    with serve("model", port=port) as server:  # the control: free again, it serves
        assert server.port == port


def test_free_port_is_free():
    assert 1024 <= free_port() < 65536
