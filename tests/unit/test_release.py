"""scripts/release's checks find what they are for: each with a release that passes and one with a planted fault."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "scripts" / "release").exists():
    pytest.skip("needs the source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    spec = spec_from_file_location("release_checks", ROOT / "scripts" / "release_checks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree of our shape, and its sdist and wheel in dist/, written here and not by a build backend."""
    tree, dist = tmp_path / "tree", tmp_path / "dist"
    for name in ("vllm_deterministic/a.py", "kernels/b.py", "configs/serve/c.yaml", "LICENSE", "README.md",
                 "pyproject.toml"):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    dist.mkdir()
    files = [file for file in tree.rglob("*") if file.is_file()]
    with tarfile.open(dist / "x-1.tar.gz", "w:gz") as sdist:
        for file in files:
            sdist.add(file, f"x-1/{file.relative_to(tree)}")
    with zipfile.ZipFile(dist / "x-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("x-1.dist-info/METADATA", "Name: x\n")
        wheel.writestr("vllm_deterministic/a.py", "vllm_deterministic/a.py")
        wheel.writestr("vllm_deterministic/kernels/b.py", "kernels/b.py")
        wheel.writestr("vllm_deterministic/configs/serve/c.yaml", "configs/serve/c.yaml")
    return tmp_path


def test_a_release_that_is_the_tree(checks: ModuleType, tree: Path) -> None:
    checks.contents(str(tree / "dist"), str(tree / "tree"))


def test_a_file_that_the_wheel_lost_or_gained(checks: ModuleType, tree: Path) -> None:
    (tree / "tree/kernels/new.cu").write_text("lost by the wheel")
    with pytest.raises(SystemExit, match=r"kernels/new\.cu"):
        checks.contents(str(tree / "dist"), str(tree / "tree"))
    (tree / "tree/kernels/new.cu").unlink()
    with zipfile.ZipFile(tree / "dist/x-1-py3-none-any.whl", "a") as wheel:
        wheel.writestr("kernels/b.py", "a second top-level package")
    with pytest.raises(SystemExit, match=r"kernels/b\.py"):
        checks.contents(str(tree / "dist"), str(tree / "tree"))


def test_a_file_that_the_sdist_changed(checks: ModuleType, tree: Path) -> None:
    with tarfile.open(tree / "dist/x-1.tar.gz", "r:gz") as old:
        kept = {member.name: old.extractfile(member).read() for member in old if member.isfile()}  # type: ignore[union-attr]
    with tarfile.open(tree / "dist/x-1.tar.gz", "w:gz") as new:
        for name, data in kept.items():
            data = b"changed" if name.endswith("README.md") else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    with pytest.raises(SystemExit, match=r"README\.md"):
        checks.contents(str(tree / "dist"), str(tree / "tree"))


def test_an_sbom_that_lacks_a_need(checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    component = {"name": "vllm-deterministic", "version": "0.1.0"}
    parts = [{"name": name} for name in ("openai", "rich", "pydantic", "Jinja2")]
    bill = {"metadata": {"component": component}, "components": parts}
    (tmp_path / "x.cdx.json").write_text(json.dumps(bill))
    checks.sbom(str(tmp_path))
    (tmp_path / "x.cdx.json").write_text(json.dumps({**bill, "components": parts[1:]}))
    with pytest.raises(SystemExit, match="openai"):
        checks.sbom(str(tmp_path))


def test_an_installation_that_replaced_a_package(checks: ModuleType, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_text("torch==2.13.0+cpu\nopenai==3.57.0\n")
    after.write_text("torch==2.13.0+cpu\nopenai==3.57.0\nrich==15.0.0\n")
    checks.kept(str(before), str(after))
    after.write_text("torch==2.14.0\nopenai==3.57.0\nrich==15.0.0\n")
    with pytest.raises(SystemExit, match="torch"):
        checks.kept(str(before), str(after))


def test_a_tree_with_changes_is_no_release(tmp_path: Path) -> None:
    """On a clone: the script names the reason and builds nothing."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True, capture_output=True)
    shutil.copy(ROOT / "scripts" / "release", tmp_path / "clone" / "scripts" / "release")
    (tmp_path / "clone" / "new").write_text("")
    done = subprocess.run([tmp_path / "clone" / "scripts" / "release"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "not committed" in done.stderr
    assert not (tmp_path / "clone" / "dist").exists()
