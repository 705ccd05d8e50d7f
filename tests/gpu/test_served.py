"""Real servers on a card, examined by `verify` over HTTP: the one with the flag, and the one without as a control.

GPU_VERIFY_LEVEL and GPU_VERIFY_SECONDS ask for more than `standard` in 200 s; GPU_VERIFY_REPORT names a file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm_deterministic.verify import Report, verify
from vllm_deterministic.verify.server import serve

HERE = Path(__file__).parent
OPTIONS = ("--load-format", "dummy", "--max-model-len", "4096", "--gpu-memory-utilization", "0.05")
SIDES = {"ours": ("--deterministic",), "default": ()}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Report]:
    folder = tmp_path_factory.mktemp("served")
    subprocess.run([sys.executable, HERE / "made_up.py", folder], check=True)
    sys.path.insert(0, str(HERE))
    import made_up

    path = made_up.door(folder)

    def examined(side: str) -> Report:
        options = (*OPTIONS, "--kv-cache-memory-bytes", str(3 << 30), *SIDES[side])
        environment = {
            "PYTHONPATH": path,
            "VLLM_CACHE_ROOT": str(folder / f"cache-{side}"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with serve(folder / "qwen3", *options, env=environment, timeout=300) as server:
            level = os.environ.get("GPU_VERIFY_LEVEL", "standard")
            seconds = float(os.environ.get("GPU_VERIFY_SECONDS", "200"))
            return verify(server.base_url, level=level, max_seconds=seconds)

    with ThreadPoolExecutor(len(SIDES)) as pool:
        return dict(zip(SIDES, pool.map(examined, SIDES), strict=True))


def test_every_family_sees_the_same_bits(reports: Mapping[str, Report]) -> None:
    found = reports["ours"]
    if path := os.environ.get("GPU_VERIFY_REPORT"):
        Path(path).write_text(found.model_dump_json(indent=1))
    told = {family.name: family.verdict for family in found.families if family.name != "against"}
    assert set(told.values()) == {"same"}, (found.headline, told)
    assert found.most_in_flight > 20
    assert found.tokens > 5000


def test_control_the_server_without_the_flag_differs(reports: Mapping[str, Report]) -> None:
    assert reports["default"].verdict == "differs", reports["default"].headline
