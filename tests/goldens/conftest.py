"""The script that makes the goldens computes them for the tests too."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    pytest.importorskip("vllm", reason="golden bits are those of vLLM's CPU build")
    spec = spec_from_file_location("goldens", Path(__file__).parents[2] / "scripts" / "goldens.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["goldens"] = module
    spec.loader.exec_module(module)
    return module
