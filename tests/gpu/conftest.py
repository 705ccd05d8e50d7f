"""Tests that need a CUDA card. Without one they are skipped: nothing else in the suite depends on them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for made_up and the other modules that tests share


def _cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    skip = None if _cuda() else pytest.mark.skip(reason="no CUDA card here")
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if skip is not None:
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Certificates of the tests do not touch the user's."""
    import os

    os.environ["VLLM_DETERMINISTIC_CACHE"] = str(tmp_path_factory.mktemp("cache"))
