"""What a result on a card says of its machine, and how its file is laid out."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm_deterministic.kernels import certificates

__all__ = ["machine", "write"]


def machine(*packages: str) -> dict[str, Any]:
    """The first card, its driver, and the packages' versions; without a card "CPU"."""
    here = Path(__file__).parent
    facts = certificates.card(0, here) if torch.cuda.is_available() else {"card": "CPU", "driver": ""}
    versions = {name: importlib.import_module(name).__version__ for name in packages}
    return {"card": facts["card"], "driver": facts["driver"], "versions": versions}


def write(path: Path, report: Mapping[str, Any]) -> None:
    """JSON with an entry a line, and of a list each item."""
    entries = (f" {json.dumps(name)}: {_laid_out(value)}" for name, value in report.items())
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def _laid_out(value: Any) -> str:
    return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if isinstance(value, list) else json.dumps(value)
