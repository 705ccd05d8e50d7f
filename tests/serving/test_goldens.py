"""Whole answers of a real server are those of the numerics version, where this machine has goldens."""

from __future__ import annotations

import dataclasses
import json
import urllib.request
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def golden():
    spec = spec_from_file_location("goldens", Path(__file__).parents[2] / "scripts" / "goldens.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts_of(server):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{server.url}/deterministic") as response:
        return json.load(response)["parts"]


@pytest.mark.parametrize(
    "config", ["det-bf16-compiled-2048", pytest.param("det-f32-eager-2048", marks=pytest.mark.slow)]
)
def test_answers_have_the_golden_bits(servers, config, golden, monkeypatch) -> None:
    server = servers.get(config)
    parts = parts_of(server)
    recorded = golden.goldens(parts["numerics.version"])
    assert recorded, f"numerics {parts['numerics.version']} has no goldens"
    here, missing = golden.place(parts), []
    for made in recorded:
        for entry in made["answers"]:
            if entry["where"] == here:
                if reason := golden.outdated(made):
                    pytest.skip(reason)
                found = golden.answers(server.endpoint)
                assert found == entry["digests"], "other bits need a new numerics version"
                # The control: another seed is another answer.
                other = dataclasses.replace(golden.PROBES[2], seed=1)
                monkeypatch.setattr(golden, "PROBES", (other,))
                assert golden.answers(server.endpoint)[other.name] != entry["digests"][other.name]
                return
            missing.append(sorted(name for name in here if here[name] != entry["where"].get(name)))
    pytest.skip(f"no goldens for this server: it differs from those recorded in {missing}")
