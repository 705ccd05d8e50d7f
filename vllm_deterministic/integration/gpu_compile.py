"""torch.compile of the GPU engine: where a fused kernel rounds, and whose cached graphs may be loaded."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import vllm_deterministic
import vllm_deterministic.kernels as kernels

__all__ = ["arm", "sources"]

# A name of vLLM's kind: its variables are part of every compile cache's key.
_FACTOR = "VLLM_DETERMINISTIC_SOURCES"


def arm(vllm_config: Any) -> None:
    """Fixes rounding points and the cache's key in this worker process, before the model is compiled. Idempotent.

    Inductor keeps bf16 intermediates of a fused kernel in f32, and contracts products and sums: what is fused with what
    would decide a bit, and fusion follows size hints. With its precision-cast emulation every operation rounds where
    the eager one does, whatever it is fused with, and nothing is contracted. What is left is elementwise (audit.py), so
    neither tuning nor the number of tokens can reach a bit.
    """
    vllm_config.compilation_config.inductor_compile_config["emulate_precision_casts"] = True
    # A graph compiled under other sources of ours was audited by other rules.
    from vllm import envs

    envs.environment_variables[_FACTOR] = sources


@functools.cache
def sources() -> str:
    """Digest of this package's own source files."""
    digest = hashlib.sha256()
    for package in (vllm_deterministic, kernels):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
