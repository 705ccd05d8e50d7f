"""Frozen numerics versions, schedule tables per card, and serve presets."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = ["numerics", "serve_presets"]


def numerics(version: str) -> dict[str, Any]:
    """The trees of a numerics version: device -> operator -> what is added to what, in which order, rounded when.

    Raises FileNotFoundError for a version that does not exist.
    """
    return tomllib.loads(files(__name__).joinpath(f"numerics/{version}.toml").read_text())


def serve_presets() -> dict[str, Path]:
    """Name -> file, for `vllm serve --config FILE`. This package is never zipped: vLLM opens the file itself."""
    return {file.stem: file for file in sorted(Path(str(files(__name__))).glob("serve/*.yaml"))}
