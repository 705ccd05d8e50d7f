"""Shared by every test: fixed seeds, nothing else."""

from __future__ import annotations

import random

import pytest


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
