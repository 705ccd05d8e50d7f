"""A real `vllm serve` as a context manager: free port, readiness by polling, never left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_deterministic.errors import DeterministicError
from vllm_deterministic.verify.probes import Endpoint

__all__ = ["Server", "ServerError", "free_port", "serve"]

# The server is on this machine: a proxy that the environment names must not be asked for it.
_local = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(DeterministicError, RuntimeError):
    """The server did not start, or died while it was starting. The message ends with the tail of its log."""


@dataclass(frozen=True)
class Server:
    """A running server. `url` is its root, `base_url` what an OpenAI client is given."""

    process: subprocess.Popen[bytes]
    port: int
    model: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.base_url, self.model)

    def healthy(self) -> bool:
        """Whether /health answers 200: it does not before the start is complete, nor after the engine died."""
        try:
            with _local.open(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a Prometheus metric over the labels that are left open, for example "vllm:num_preemptions_total"."""
        with _local.open(f"{self.url}/metrics", timeout=10) as response:
            text = response.read().decode()
        samples = re.findall(rf"^{re.escape(name)}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
        asked = [f'{label}="{value}"' for label, value in labels.items()]
        found = [float(value) for given, value in samples if set(asked) <= set(given.split(","))]
        if not found:
            raise KeyError(name)
        return sum(found)

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, grace: float = 20.0) -> None:
        """Ends the server and every process it started: politely first, by force after `grace` seconds. Idempotent."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        # The engine and its workers share the server's process group; one that outlived it ends here.
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _require_free(port: int) -> None:
    """Raises ServerError where somebody listens: what answers there would be taken for the server started here."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerError(f"port {port} cannot be used ({error.strerror}): name another one, or none") from error


@contextlib.contextmanager
def serve(
    model: str | Path,
    *cli_args: str,
    env: Mapping[str, str] | None = None,
    log: str | Path | None = None,
    timeout: float = 300.0,
    port: int | None = None,
) -> Iterator[Server]:
    """Runs `vllm serve MODEL CLI_ARGS` of this Python environment and yields it once it is ready.

    env: variables added to this process's own. log: where the server's output goes (a temporary file by default).
    Raises ServerError where the port is taken; with the end of the log, where the server dies or is not ready after
    `timeout` seconds.
    """
    port = free_port() if port is None else port
    _require_free(port)
    if log is None:
        handle, name = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
        os.close(handle)
        log = name
    path = Path(log)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *cli_args]
    # PYTHONSAFEPATH: a folder named like a package in the current directory must not hide the installed one.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **(env or {})}
    with path.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, _served_name(str(model), cli_args), path)
    try:
        with _watchdog(process.pid):
            _wait_until_ready(server, timeout)
            yield server
    finally:
        server.stop()


# Reads until the other end of its pipe is gone, however that came about, and then ends the server's process group.
_WATCHDOG = """
import os, signal, sys, time
sys.stdin.buffer.read()
for number, grace in ((signal.SIGTERM, 20), (signal.SIGKILL, 0)):
    try:
        os.killpg(int(sys.argv[1]), number)
    except ProcessLookupError:
        break
    time.sleep(grace)
"""


@contextlib.contextmanager
def _watchdog(group: int) -> Iterator[None]:
    """Ends the process group if this process dies inside the block without a chance to do it itself (kill -9)."""
    command = [sys.executable, "-I", "-S", "-c", _WATCHDOG, str(group)]
    dog = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        dog.kill()  # before its pipe is closed: from here on this process ends the server
        dog.wait()
        if dog.stdin is not None:
            dog.stdin.close()


def _served_name(model: str, cli_args: tuple[str, ...]) -> str:
    for position, argument in enumerate(cli_args):
        option, equals, value = argument.partition("=")
        if option in ("--served-model-name", "--served_model_name"):
            return value if equals else cli_args[position + 1]
    return model


def _wait_until_ready(server: Server, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not server.healthy():
        if (status := server.process.poll()) is not None:
            raise ServerError(f"vllm serve ended with status {status} while starting:\n{server.log_tail()}")
        if time.monotonic() > deadline:
            raise ServerError(f"vllm serve was not ready after {timeout:g} s:\n{server.log_tail()}")
        time.sleep(0.25)
