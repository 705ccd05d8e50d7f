"""Real servers on a card, examined by `verify` over HTTP: the one with the flag, and the one without as a control.

GPU_VERIFY_LEVEL and GPU_VERIFY_SECONDS ask for more than `standard` in 200 s; GPU_VERIFY_REPORT names a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from side_by_side import serve_all

from vllm_deterministic.verify import Report, verify
from vllm_deterministic.verify.server import Server

SIDES = {"ours": ("--deterministic",), "default": ()}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Report]:
    level = os.environ.get("GPU_VERIFY_LEVEL", "standard")
    seconds = float(os.environ.get("GPU_VERIFY_SECONDS", "200"))

    def examined(server: Server) -> Report:
        return verify(server.base_url, level=level, max_seconds=seconds)

    with (
        serve_all(tmp_path_factory.mktemp("served"), SIDES, model="qwen3") as servers,
        ThreadPoolExecutor(len(SIDES)) as pool,
    ):
        return dict(zip(servers, pool.map(examined, servers.values()), strict=True))


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
