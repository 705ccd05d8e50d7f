"""MkDocs hooks: what the program or a measurement knows is put into the pages from there, never written by hand.

`<!-- from: NAME -->` in a page becomes the table NAME below. A link out of docs/ becomes the path in code type,
and the build fails where the path does not exist.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from vllm_deterministic.configs import numerics, serve_presets

from vllm_deterministic import compat, policy
from vllm_deterministic.contract import NUMERICS_VERSIONS
from vllm_deterministic.flag import add_arguments

ROOT = Path(__file__).resolve().parents[1]


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(names: Iterable[object]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def served() -> str:
    """What is served, by device."""
    rows = [
        (
            device,
            _code(f"{release}.x" for release in compat.SUPPORTED.get(device, ())),
            _code(sorted(policy.ARCHITECTURES[device])),
            _code(sorted(policy.DTYPES[device])),
            _code(policy.KV_CACHES[device]),
        )
        for device in policy.ARCHITECTURES
    ]
    previews = "".join(f"\n\n**{device} is a preview**: {why}." for device, why in policy.PREVIEWS.items())
    return _table(("device", "vLLM", "model architectures", "dtypes", "KV caches"), rows) + previews


def refused() -> str:
    """Well-known features that nobody has proved yet."""
    return "\n".join(f"- {feature}" for feature in policy.refused_features())


def environment() -> str:
    """Environment variables that stop the server."""
    rows = [
        (device, f"`{name}`", _code(sorted(filter(None, allowed))), why)
        for device, variables in policy.ENVIRONMENT.items()
        for name, (allowed, why) in variables.items()
    ]
    return _table(("device", "variable", "may be set to", "why"), rows)


def cards() -> str:
    """The cards that are proved."""
    known = (f"{name} (compute capability {major}.{minor})" for (major, minor), name in policy.CARDS.items())
    return f"CUDA cards: {', '.join(known)}."


def engine_options() -> str:
    """Every option of the engine that may be given."""
    free = sorted(name for name, values in policy.ENGINE_OPTIONS.items() if values is None and name[0] != "_")
    bound = {name: values for name, values in policy.ENGINE_OPTIONS.items() if values is not None}
    rows = [
        (f"`{policy.flag(name)}`", _code(v for v in values if v is not None)) for name, values in sorted(bound.items())
    ]
    return (
        f"{_table(('option', 'values'), rows)}\n\n"
        f'??? note "{len(free)} options that may have any value"\n    {_code(policy.flag(name) for name in free)}'
    )


def request_fields() -> str:
    """Every field of a request that may be set."""
    return _code(sorted(policy.REQUEST_FIELDS))


def options() -> str:
    """The plugin's own options of `vllm serve`."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    rows = [
        (f"`{action.option_strings[0]}{f' {action.metavar}' if action.metavar else ''}`", action.help)
        for action in parser._actions
    ]
    return _table(("option of `vllm serve`", "meaning"), rows)


def presets() -> str:
    """The presets, each with its own first sentence and its lines."""
    parts = []
    for name, file in serve_presets().items():
        parts.append(f'### {name}\n```yaml title="configs/serve/{name}.yaml"\n{file.read_text().rstrip()}\n```')
    return "\n\n".join(parts)


def trees() -> str:
    """The trees of every numerics version."""
    rows = [
        (newest, device, operator, "; ".join(f"{name}: {value}" for name, value in tree.items()))
        for newest in NUMERICS_VERSIONS
        for device, operators in numerics(newest).items()
        for operator, tree in operators.items()
    ]
    return _table(("version", "device", "operator", "tree"), rows)


def seams() -> str:
    """Every place in vLLM that is replaced, why, and until when."""
    groups = {"start": "ENTRY", "requests": "REQUEST", "wire": "WIRE", "CPU": "CPU", "GPU": "GPU"}
    rows = [
        (name, f"`{seam.attribute}`", seam.reason, seam.until)
        for name, group in groups.items()
        for seam in getattr(compat, f"{group}_SEAMS").values()
    ]
    return _table(("where", "seam", "why it is replaced", "until"), rows)


def results() -> str:
    """README's sections that hold a table of benchmarks/results, as they are there."""
    sections = re.split(r"^(?=## )", (ROOT / "README.md").read_text(), flags=re.M)
    some = [section for section in sections if re.search(r"^<!-- \w+\.json -->$", section, re.M)]
    text = "\n".join(some).replace("](docs/", "](")
    # README stands a folder higher: what it links to outside of docs/ is a path for this site.
    return re.sub(r"\]\((?!https?:|#)(?P<path>[^)\s]+)\)", _from_the_root, text)


def _from_the_root(match: re.Match[str]) -> str:
    there = (ROOT / "docs" / match["path"]).exists()
    return match[0] if there else f"](../{match['path']})"


def package() -> str:
    """This version."""
    return f"`vllm-deterministic` {version('vllm-deterministic')}, numerics {_code(NUMERICS_VERSIONS)}"


SOURCES = {
    function.__name__: function
    for function in (
        served, cards, refused, environment, engine_options, request_fields, options, presets, trees, seams, results,
        package,
    )
}  # fmt: skip


def on_config(config: Any) -> Any:
    """A page that nobody has put into the navigation stands at its end."""
    named = re.findall(r"[\w-]+\.md", str(config["nav"]))
    config["nav"][-1]["Understanding it"] += sorted(
        file.name for file in Path(config["docs_dir"]).glob("*.md") if file.name not in named
    )
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts the tables in, and turns links out of docs/ into paths. Raises PluginError for what does not exist.

    A picture links to itself, alone and as large as a screen is.
    """

    def fill(match: re.Match[str]) -> str:
        if match[1] not in SOURCES:
            raise PluginError(f"{page.file.src_path}: there is no table {match[1]}; there are {', '.join(SOURCES)}")
        return SOURCES[match[1]]()

    def outside(match: re.Match[str]) -> str:
        path = (ROOT / "docs" / Path(page.file.src_path).parent / match["path"]).resolve()
        if not path.exists():
            raise PluginError(f"{page.file.src_path}: {match['path']} does not exist")
        return f"`{path.relative_to(ROOT)}`"

    markdown = re.sub(r"^<!-- from: (\w+) -->$", fill, markdown, flags=re.M)
    markdown = re.sub(r"\[[^\]]+\]\((?P<path>\.\./[^)]+)\)", outside, markdown)
    return re.sub(r"^(!\[[^\]]*\]\(([^)]+)\))$", r"[\1](\2)", markdown, flags=re.M)
