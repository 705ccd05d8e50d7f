"""The documentation: it builds strictly, its links lead somewhere, and what it tells people to type exists."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from vllm_deterministic import cli, policy

ROOT = Path(__file__).parents[2]
if not (ROOT / "mkdocs.yml").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
# Words that stand for something of the reader's.
PLACEHOLDERS = {"MODEL": "model", "URL": "http://127.0.0.1:8000", "URL2": "http://127.0.0.1:8001", "FILE": "file"}


def build(root: Path, target: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mkdocs", reason="scripts/install docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(root / "mkdocs.yml")]
    environ = {**os.environ, "PYTHONSAFEPATH": "1", "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([*command, "--site-dir", str(target)], capture_output=True, text=True, env=environ)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(ROOT, target)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


class _Page(HTMLParser):
    """What a page links to and loads, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.update(value for name in ("id", "name") if (value := given.get(name)))
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        for name in ("src", "href"):
            if tag in ("img", "script", "link") and given.get(name) and given.get("rel") != "canonical":
                self.loads.append(str(given[name]))


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {file: _Page(file.read_text()) for file in site.rglob("*.html") if "reports" not in file.parts}
    assert len(pages) > 15
    for file, page in pages.items():
        if file.name == "404.html":
            continue
        for link in page.loads + page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link not in page.loads, f"{file}: loads {link}"
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{file.relative_to(site)}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors | {"__top"}, f"{file}: {link}"


def test_no_table_or_list_is_left_as_text(site: Path) -> None:
    """A table right below a code block is a paragraph of bars, which no strict build minds."""
    for file in site.rglob("*.html"):
        if "reports" not in file.parts:
            assert not re.findall(r"<p>(?:\||- |\d+\. ).*", file.read_text()), file


def test_every_page_can_be_reached(site: Path) -> None:
    links = {link.rstrip("/").split("/")[-1] for link in _Page((site / "index.html").read_text()).links}
    assert {page.stem for page in (ROOT / "docs").glob("*.md") if page.stem != "index"} <= links


def test_tables_are_made_from_the_program(site: Path) -> None:
    """What the policy serves and refuses is on the page; no marker is left unfilled."""
    text = (site / "support" / "index.html").read_text()
    for names in (*policy.ARCHITECTURES.values(), *policy.DTYPES.values(), policy.refused_features()):
        for name in names:
            assert name in text
    assert not [file for file in site.rglob("*.html") if "<!-- from:" in file.read_text()]


@pytest.mark.parametrize(
    "line",
    [
        "[dead](no-such-page.md)",
        "[dead](index.md#no-such-part)",
        "<!-- from: nowhere -->",
        "[dead](../no/such/file.py)",
    ],
)
def test_the_control_a_broken_page_does_not_build(tmp_path: Path, line: str) -> None:
    for part in ("docs", "configs", "scripts"):
        ignore = shutil.ignore_patterns("reports", "plots")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignore)
    shutil.copy(ROOT / "README.md", tmp_path)
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(
        settings[: settings.index("\nnav:")] + "\nnav: [{Understanding it: [index.md]}]\n"
    )
    for page in (tmp_path / "docs").glob("*.md"):
        page.unlink()
    index = tmp_path / "docs" / "index.md"
    index.write_text("# Home\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    index.write_text(f"# Home\n{line}\n")
    assert build(tmp_path, tmp_path / "site").returncode != 0


def blocks() -> Iterator[tuple[Path, str, str]]:
    """Page, language and text of every code block."""
    for page in PAGES:
        for language, text in re.findall(r"^```(\w+)[^\n]*\n(.*?)^```$", page.read_text(), flags=re.M | re.S):
            yield page, language, text


def commands() -> list[tuple[str, str]]:
    """(page, command) for each line after a prompt, comments and continuations joined."""
    found = []
    for page, language, text in blocks():
        if language == "console":
            for line in text.replace("\\\n", " ").splitlines():
                if line.startswith("$ "):
                    found.append((page.name, line[2:]))
    return found


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_commands_exist(page: str, command: str) -> None:
    """The shell reads it; programs, scripts, files, extras and options that it names exist."""
    assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0
    bare = re.sub(r'"\$\(vllm-deterministic preset (\w+)\)"', _preset, command)
    for part in re.split(r" && ", bare):
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(part, comments=True)]
        CHECKS.get(words[0], _script)(words)


def _preset(match: re.Match[str]) -> str:
    assert cli.main(["preset", match[1]]) == 0
    return str(ROOT / "configs/serve" / f"{match[1]}.yaml")


def _ours(words: list[str]) -> None:
    if words == ["vllm-deterministic", "doctor"]:
        return
    cli.argument_parser().parse_args(words[1:])


def _vllm(words: list[str]) -> None:
    pytest.importorskip("vllm", reason="vLLM's own parser reads its options")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    if "--deterministic-signing-key" in words:  # the parser reads the key at once
        at = words.index("--deterministic-signing-key")
        words = words[:at] + words[at + 2 :]
    assert parser.parse_args(words[1:]).deterministic


def _python(words: list[str]) -> None:
    assert (ROOT / words[1]).exists(), words[1]


def _pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[1] == "install"
    assert words[2].startswith((".", "vllm-deterministic"))
    for named in re.findall(r"(?:vllm-deterministic|\.)\[([\w,]+)\]", " ".join(words)):
        assert set(named.split(",")) <= set(extras)


def _files(words: list[str]) -> None:
    """docker and kubectl: the files after -f exist."""
    named = [value for option, value in itertools.pairwise(words) if option == "-f"]
    assert named or words[1] == "run"
    assert all((ROOT / name).exists() for name in named), named


def _script(words: list[str]) -> None:
    path = ROOT / words[0]
    assert "/" in words[0], f"unknown command {words[0]}"
    assert path.exists(), words[0]
    assert os.access(path, os.X_OK), words[0]


def _pytest(words: list[str]) -> None:
    assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests/"))


def _installed(words: list[str]) -> None:
    """A program of the system or of a package that the page names; nothing of ours to check."""


CHECKS = {
    "vllm-deterministic": _ours,
    "vllm": _vllm,
    "python": _python,
    "pip": _pip,
    "docker": _files,
    "kubectl": _files,
    "pytest": _pytest,
    "curl": _installed,
    "openssl": _installed,
    "vllm-router": _installed,
}


@pytest.mark.parametrize(
    "command",
    [
        "vllm-deterministic verify --no-such-option URL",
        "scripts/none",
        "nonsense -x",
        "pip install '.[none]'",
        "docker build -f docker/None .",
    ],
)
def test_the_control_commands_that_do_not_exist_are_found(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        test_commands_exist("", command)


def test_python_blocks_compile_and_import_what_exists() -> None:
    seen = 0
    for page, language, text in blocks():
        if language == "python":
            seen += 1
            for node in ast.parse(text.replace("...", "None"), page.name).body:
                for module, names in _imports(node):
                    if module.startswith("vllm_deterministic"):
                        there = importlib.import_module(module)
                        assert all(hasattr(there, name) for name in names), (page.name, module, names)
    assert seen > 4


def _imports(node: ast.stmt) -> Iterator[tuple[str, list[str]]]:
    if isinstance(node, ast.ImportFrom) and node.module:
        yield node.module, [alias.name for alias in node.names]
    elif isinstance(node, ast.Import):
        yield from ((alias.name, []) for alias in node.names)


def test_data_blocks_parse() -> None:
    for page, language, text in blocks():
        if language == "json":
            json.loads(text)
        elif language == "yaml":
            assert yaml.safe_load(text), page
