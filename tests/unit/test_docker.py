"""Images, compose file, manifests and dashboard: linted, and every name in them is one that exists."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
if not DOCKER.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
PORT = "8000"


def tool(name: str) -> str:
    """A command of this environment, on the path or not."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed: scripts/install test")
    return found


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    parser = pytest.importorskip("dockerfile_parse").DockerfileParser(
        fileobj=io.BytesIO(dockerfile.read_bytes()), env_replace=False
    )
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(dockerfile: Path, tmp_path: Path) -> None:
    done = subprocess.run([tool("hadolint"), str(dockerfile)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    # The control: it does find an unpinned base.
    (tmp_path / "Dockerfile").write_text("FROM debian\n")
    assert subprocess.run([tool("hadolint"), str(tmp_path / "Dockerfile")], capture_output=True).returncode != 0


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)
def test_images_are_deterministic_healthy_and_not_root(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    last = dict(steps)
    assert "--deterministic" in json.loads(last["CMD"])
    assert json.loads(last["ENTRYPOINT"]) == ["vllm", "serve"]
    assert int(last["USER"]) > 0
    assert last["VOLUME"] == "/home/vllm/.cache"
    assert json.loads(last["HEALTHCHECK"].partition(" CMD ")[2]) == ["healthy"]
    assert ("COPY", "docker/healthy /usr/local/bin/healthy") in steps


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)
def test_what_is_copied_exists_and_is_not_ignored(dockerfile: Path) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / path).exists() for path in kept)
    for instruction, value in instructions(dockerfile):
        if instruction == "COPY" and value != ". .":
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == path or source.startswith(path + "/") for path in kept), source


class _Server(BaseHTTPRequestHandler):
    """Answers /health always, /deterministic where it promises, and wants the key where it has one."""

    promises, key = True, ""

    def do_GET(self) -> None:
        there = self.path == "/health" or (self.path == "/deterministic" and self.promises)
        allowed = self.path == "/health" or self.key in ("", self.headers.get("Authorization", "")[len("Bearer ") :])
        self.send_response(200 if there and allowed else 401 if there else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("promises", "key", "given", "healthy"),
    [(True, "", "", True), (True, "secret", "secret", True), (True, "secret", "other", False), (False, "", "", False)],
)
def test_the_health_check_asks_for_the_promise(promises: bool, key: str, given: str, healthy: bool) -> None:
    tool("curl")
    server = HTTPServer(("127.0.0.1", 0), type("Server", (_Server,), {"promises": promises, "key": key}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environ = {**os.environ, "VLLM_API_KEY": given, "PORT": str(server.server_port), "no_proxy": "*"}
    try:
        assert (subprocess.run([str(DOCKER / "healthy")], env=environ, capture_output=True).returncode == 0) == healthy
    finally:
        server.shutdown()
        server.server_close()
    gone = subprocess.run([str(DOCKER / "healthy")], env=environ, capture_output=True)
    assert gone.returncode != 0


def test_compose_names_files_that_exist() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    over = yaml.safe_load((DOCKER / "compose.cuda.yaml").read_text())["services"]
    assert set(over) <= set(services)
    for service in (*services.values(), *over.values()):
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).exists()
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DOCKER / source).exists(), source
    prometheus = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == [f"server:{PORT}"]
    (source,) = yaml.safe_load((DOCKER / "grafana/datasource.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"


def compose(*files: Path) -> subprocess.CompletedProcess[str]:
    """`docker compose config`: the files read, merged and validated. It needs no engine."""
    named = [word for file in files for word in ("-f", str(file))]
    return subprocess.run([tool("docker-compose"), *named, "config"], capture_output=True, text=True, check=False)


def test_compose_itself_takes_the_files(tmp_path: Path) -> None:
    done = compose(DOCKER / "compose.yaml")
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == {"server", "prometheus", "grafana"}
    merged = compose(DOCKER / "compose.yaml", DOCKER / "compose.cuda.yaml")
    assert merged.returncode == 0, merged.stderr
    server = yaml.safe_load(merged.stdout)["services"]["server"]
    assert server["build"]["dockerfile"] == "docker/Dockerfile.cuda"
    assert server["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert [port["target"] for port in server["ports"]] == [int(PORT)]
    # The control: a misspelt key is found.
    (tmp_path / "compose.yaml").write_text((DOCKER / "compose.yaml").read_text().replace("restart:", "restrat:"))
    assert "restrat" in compose(tmp_path / "compose.yaml").stderr


@pytest.mark.parametrize(
    ("what", "file"), [("config", "prometheus/prometheus.yml"), ("rules", "prometheus/deterministic.rules.yml")]
)
def test_prometheus_itself_takes_the_files(tmp_path: Path, what: str, file: str) -> None:
    done = subprocess.run([tool("promtool"), "check", what, DOCKER / file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # The control: an expression that does not parse, a key that does not exist.
    broken = tmp_path / Path(file).name
    broken.write_text((DOCKER / file).read_text().replace("== 0", "=== 0").replace("targets:", "tragets:"))
    assert subprocess.run([tool("promtool"), "check", what, broken], capture_output=True).returncode != 0


# Forty minutes of a server, `refused` requests a minute among them, and what the alerts say at the thirtieth.
ALERTS = """
rule_files: [{rules}]
tests:
  - interval: 1m
    input_series:
      - series: 'up{{job="vllm", instance="a"}}'
        values: '1x40'
      - series: 'vllm_deterministic_certified_shapes{{instance="a"}}'
        values: '{shapes}'
      - series: 'vllm_deterministic_self_checks_total{{instance="a", result="differs"}}'
        values: '{differs}'
      - series: 'vllm_deterministic_refused_requests_total{{instance="a", reason="field", field="best_of"}}'
        values: '0+{refused}x40'
    alert_rule_test:
{expected}
"""


@pytest.mark.parametrize(
    ("shapes", "differs", "refused", "alert"),
    [
        ("5x40", "0x40", 0, None),
        ("0x40", "0x40", 0, "NothingCertified"),
        ("_x40", "0x40", 0, "PromiseGone"),
        ("5x40", "0x10 1x30", 0, "SelfCheckDiffers"),
        ("5x40", "0x40", 60, "PromiseRefused"),
    ],
)
def test_each_alert_fires_when_it_should_and_at_no_other_time(
    tmp_path: Path, shapes: str, differs: str, refused: int, alert: str | None
) -> None:
    """Prometheus' own unit tests of rules."""
    rules = yaml.safe_load((DOCKER / "prometheus/deterministic.rules.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        del rule["annotations"]  # words for people
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "deterministic", "rules": rules}]}))
    names = [rule["alert"] for rule in rules]
    assert alert is None or alert in names

    def check(fires: str | None) -> int:
        labels = {
            "SelfCheckDiffers": {"instance": "a", "result": "differs"},
            "NothingCertified": {"instance": "a"},
            "PromiseGone": {"instance": "a", "job": "vllm"},
            "PromiseRefused": {"reason": "field", "field": "best_of"},
        }
        expected = [
            {
                "eval_time": "30m",
                "alertname": name,
                "exp_alerts": [{"exp_labels": labels[name]}] if name == fires else [],
            }
            for name in names
        ]
        text = ALERTS.format(
            rules=tmp_path / "rules.yml", shapes=shapes, differs=differs, refused=refused,
            expected="\n".join("      " + line for line in yaml.safe_dump(expected).splitlines()),
        )  # fmt: skip
        (tmp_path / "test.yml").write_text(text)
        return subprocess.run(
            [tool("promtool"), "test", "rules", tmp_path / "test.yml"], capture_output=True
        ).returncode

    assert check(alert) == 0
    assert check("SelfCheckDiffers" if alert is None else None) != 0


def expressions() -> list[str]:
    """Every PromQL expression of the dashboard and of the alerts."""
    dashboard = json.loads((DOCKER / "grafana/deterministic.json").read_text())
    groups = yaml.safe_load((DOCKER / "prometheus/deterministic.rules.yml").read_text())["groups"]
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return found + [rule["expr"] for group in groups for rule in group["rules"]]


def names_in_sources() -> set[str]:
    """The metrics that our modules and vLLM's define, as Prometheus calls their samples."""
    vllm = find_spec("vllm")
    if vllm is None:
        pytest.skip("vLLM's metrics are read from its source")
    sources = [*(ROOT / "vllm_deterministic").rglob("*.py"), Path(str(vllm.origin)).parent / "v1/metrics/loggers.py"]
    text = "\n".join(file.read_text() for file in sources)
    bare = set(re.findall(r'"(vllm(?::|_deterministic_)\w+)"', text))
    return bare | {name + suffix for name in bare for suffix in ("_total", "_bucket", "_sum", "_count")}


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist() -> None:
    known = names_in_sources()
    asked = {name for expression in expressions() for name in re.findall(r"vllm(?::|_deterministic_)\w+", expression)}
    assert asked <= known
    ours = {name for name in known if re.fullmatch(r"vllm_deterministic_\w+_total|\w+_certified_shapes", name)}
    assert {"vllm_deterministic_receipts_total", "vllm_deterministic_certified_shapes"} <= asked & ours
    assert "vllm:num_requests_walking" not in known


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((DOCKER / "grafana/deterministic.json").read_text())["panels"]:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert not cells & taken
        assert x + w <= 24
        taken |= cells


def test_the_helm_values_ask_for_the_promise() -> None:
    engine = yaml.safe_load((DOCKER / "kubernetes/production-stack.yaml").read_text())["servingEngineSpec"]
    assert all("--deterministic" in model["vllmConfig"]["extraArgs"] for model in engine["modelSpec"])
    decode = yaml.safe_load((DOCKER / "kubernetes/llm-d.yaml").read_text())["decode"]
    (container,) = decode["containers"]
    assert "--deterministic" in container["args"]
    for probed in (engine, container):
        assert {probed[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe")} == {"/deterministic"}
    # The user is the image's.
    user = int(dict(instructions(DOCKER / "Dockerfile.cuda"))["USER"])
    assert engine["securityContext"]["runAsUser"] == decode["podSecurityContext"]["runAsUser"] == user


def test_the_manifest_follows_kubernetes_schema() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    documents = list(yaml.safe_load_all((DOCKER / "kubernetes/deterministic.yaml").read_text()))
    for document in documents:
        validate.validate(document, "1.30", strict=True)
    _, stateful, service = documents
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    assert {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe")} == {"/deterministic"}
    assert "nvidia.com/gpu" in container["resources"]["limits"]
    assert service["spec"]["selector"].items() <= stateful["spec"]["template"]["metadata"]["labels"].items()
    # The control: a misspelt field is found.
    stateful["spec"]["replica"] = 1
    with pytest.raises(validate.ValidationError):
        validate.validate(stateful, "1.30", strict=True)
