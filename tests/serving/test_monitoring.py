"""A real Prometheus with our configuration watches a real server: every panel of the dashboard has data to draw."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from vllm_deterministic.verify.server import free_port

pytestmark = [pytest.mark.serving, pytest.mark.slow, pytest.mark.parametrize("config", ["det-bf16-compiled-2048"])]

DOCKER = Path(__file__).parents[2] / "docker"
# What Grafana fills in.
VARIABLES = {"$__rate_interval": "20s", "$__range": "1m"}


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **parameters: str) -> object:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as response:
            return json.load(response)["data"]

    def values(self, expression: str) -> list[float]:
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        found = self.ask("query", query=expression)
        return [float(one["value"][1]) for one in found["result"]]  # type: ignore[index]


@contextlib.contextmanager
def watching(target: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus as compose starts it, but for the target's name and a scrape each second."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    shutil.copytree(DOCKER / "prometheus", folder / "etc")
    file = folder / "etc/prometheus.yml"
    settings = yaml.safe_load(file.read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    settings["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    file.write_text(yaml.safe_dump(settings))
    address = f"127.0.0.1:{free_port()}"
    options = [f"--config.file={file}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, *options], stdout=log, stderr=log, start_new_session=True)
    try:
        yield Prometheus(f"http://{address}")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def until(found: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if found():  # type: ignore[operator]
                return
        assert time.monotonic() < deadline
        time.sleep(1)


def test_every_panel_draws_what_happened(servers, config, tmp_path) -> None:
    server = servers.get(config)
    http = openai.DefaultHttpxClient(trust_env=False)
    client = openai.OpenAI(base_url=server.base_url, api_key="EMPTY", http_client=http, max_retries=0)

    def visit() -> None:
        """One request of each kind that the dashboard counts."""
        said = {"model": server.endpoint.model, "prompt": "The sea is wide. " * 60, "max_tokens": 8}
        client.completions.create(**said, temperature=0.7, extra_body={"deterministic": {"receipt": True}})
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**said, extra_body={"deterministic": "no such demand"})

    with watching(f"127.0.0.1:{server.port}", tmp_path) as prometheus:
        until(lambda: prometheus.values("up"))
        assert prometheus.values('up{job="vllm"}') == [1.0]
        for _ in range(6):
            visit()
            time.sleep(2)
        panels = json.loads((DOCKER / "grafana/deterministic.json").read_text())["panels"]
        nothing = {"Preemptions", "Requests running and waiting"}  # none happened, none is left
        for panel in panels:
            for target in panel["targets"]:
                values = prometheus.values(target["expr"])
                assert values, f"{panel['title']}: {target['expr']} draws nothing"
                assert any(value > 0 for value in values) or panel["title"] in nothing, (panel["title"], values)
        assert prometheus.values("vllm_deterministic_certified_shapes")[0] > 0
        rules = prometheus.ask("rules")["groups"][0]["rules"]  # type: ignore[index]
        assert {rule["state"] for rule in rules} == {"inactive"}
        assert not [rule for rule in rules if rule.get("lastError")]
