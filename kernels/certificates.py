"""Certificates: which schedules of an operator gave the bits of its tree, on which machine, for which row counts.

A certificate is data: written to a cache, shipped, compared. It holds for one machine (card, driver, library versions)
and one tree; anything else is a reason to certify again. A cache that cannot be read or written costs time, never bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Certificate", "cache_dir", "card", "digest", "intervals", "load", "store"]

logger = logging.getLogger("vllm.deterministic")

Shape = Mapping[str, int | str | bool]


@dataclass(frozen=True)
class Certificate:
    """The outcome of one certification.

    operator: "linear", "attention" … . tree: digest of its reduction tree. shape: what the tree is keyed by (for a
    linear layer N, K, dtype, bias). machine: what the bits of a schedule may depend on.
    schedules: name -> the row counts found on the tree, as inclusive intervals. dropped: name -> the first difference.
    seconds: what the certification took.
    """

    operator: str
    tree: str
    shape: Shape
    machine: Mapping[str, str]
    schedules: Mapping[str, list[tuple[int, int]]]
    dropped: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """What the certificate is about; not its outcome."""
        return digest({"operator": self.operator, "tree": self.tree, "shape": self.shape, "machine": self.machine})


def digest(content: object) -> str:
    """sha256 of a value's canonical JSON, in hex."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


_SOURCES = (".py", ".cu", ".cuh")


def card(device: Any, sources: Path) -> dict[str, str]:
    """What a CUDA schedule's bits may depend on: the card, its driver, what compiles for it, and the sources in a
    folder."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "card": properties.name,
        "uuid": str(properties.uuid),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": digest([path.read_text() for path in sorted(sources.iterdir()) if path.suffix in _SOURCES]),
    }


def _driver() -> str:
    """The kernel driver's own line; where a container hides it, the CUDA version that the driver speaks."""
    path = Path("/proc/driver/nvidia/version")
    if path.exists():
        return path.read_text().splitlines()[0]
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"CUDA {version.value}"


def intervals(counts: Iterable[int]) -> list[tuple[int, int]]:
    """Inclusive intervals that cover exactly these numbers: 1, 2, 3, 7 -> (1, 3), (7, 7)."""
    found: list[tuple[int, int]] = []
    for count in sorted(set(counts)):
        if found and found[-1][1] == count - 1:
            found[-1] = (found[-1][0], count)
        else:
            found.append((count, count))
    return found


def cache_dir() -> Path:
    """Where certificates and tuned tables are kept: $VLLM_DETERMINISTIC_CACHE, else below the user's cache folder."""
    if chosen := os.environ.get("VLLM_DETERMINISTIC_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-deterministic"


def load(key: str) -> Certificate | None:
    """The cached certificate of this key; None where there is none or it cannot be read."""
    path = cache_dir() / "certificates" / f"{key}.json"
    try:
        raw = json.loads(path.read_text())
        certificate = Certificate(**raw)
        spans = {name: [(int(first), int(last)) for first, last in s] for name, s in certificate.schedules.items()}
        certificate = dataclasses.replace(certificate, schedules=spans)
        return certificate if certificate.key == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as reason:
        logger.warning("the certificate %s cannot be read (%s): certifying again", path, reason)
        return None


def store(certificate: Certificate) -> None:
    """Caches a certificate, whole or not at all. A cache that cannot be written is said once and costs time only."""
    folder = cache_dir() / "certificates"
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            temporary = file.name
            json.dump(dataclasses.asdict(certificate), file, indent=1)
        os.replace(temporary, folder / f"{certificate.key}.json")
    except OSError as reason:
        logger.warning("certificates are not kept: %s cannot be written (%s)", folder, reason)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
