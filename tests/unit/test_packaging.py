"""The wheel holds what the tree holds, and importing the package costs nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, requires
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Folder of the tree -> where it goes in the wheel.
MAPPED = {
    "vllm_deterministic": "vllm_deterministic",
    "kernels": "vllm_deterministic/kernels",
    "configs": "vllm_deterministic/configs",
}
SHIPPED = {".py", ".json", ".toml", ".yaml", ".cpp", ".cu", ".typed", ".j2", ".css"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("needs the source tree")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_no_file_of_the_tree_is_missing_from_the_wheel(wheel: set[str]) -> None:
    for folder, target in MAPPED.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix in SHIPPED:
                assert f"{target}/{file.relative_to(ROOT / folder)}" in wheel


def test_the_wheel_brings_no_other_top_level_package(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"vllm_deterministic"}


def test_the_plugin_is_registered() -> None:
    assert "vllm_deterministic.plugin:register" in [point.value for point in entry_points(group="vllm.general_plugins")]


def test_the_base_install_brings_no_vllm() -> None:
    """It is put beside the vLLM that somebody has, and must not replace it."""
    base = [need for need in requires("vllm-deterministic") or [] if "extra ==" not in need]
    assert {re.split(r"[^\w-]", need)[0] for need in base} == {"openai", "rich", "pydantic", "jinja2"}


def test_importing_loads_neither_torch_nor_vllm() -> None:
    modules = "vllm_deterministic, vllm_deterministic.plugin, vllm_deterministic.verify.runner"
    program = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "vllm_deterministic" in loaded
    assert not {"torch", "vllm", "triton", "transformers"} & set(loaded)


def test_kernels_is_not_a_top_level_package() -> None:
    spec = find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


def test_kernels_know_nothing_of_vllm() -> None:
    for file in (ROOT / "kernels").rglob("*.py"):
        lines = [line.strip() for line in file.read_text().splitlines()]
        assert not [line for line in lines if line.startswith(("import vllm", "from vllm.", "from vllm "))], file
        assert not [line for line in lines if "vllm_deterministic.integration" in line], file
