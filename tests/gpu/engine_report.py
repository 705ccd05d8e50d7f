"""The tables of docs/reports/engine-gpu.txt, from what test_engine.py wrote.

usage: engine_report.py FOLDER     (the one that ENGINE_PROOF_REPORT named)
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BATCHES = "in a batch of "
COUNTED = ("requests", "tokens", "differing")


def last_report(said: str) -> dict[str, Any] | None:
    """The last report in what an engine printed: of all the axes, where its process ended well."""
    reports = [line for line in said.splitlines() if line.startswith("REPORT ") and line.endswith("}")]
    return json.loads(reports[-1].removeprefix("REPORT ")) if reports else None


def by_axis(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """What the engines counted on each axis, together; batches of every size are one axis."""
    totals: dict[str, Counter[str]] = {}
    for found in reports.values():
        for axis, tally in found["axes"].items():
            name = "in batches of 2 to 512" if axis.startswith(BATCHES) else axis
            totals.setdefault(name, Counter()).update({what: tally[what] for what in COUNTED})
    return totals


def lines(said: Mapping[str, dict[str, Any] | None]) -> Iterator[str]:
    """said: engine -> its last report."""
    reports = {name: report for name, report in said.items() if report}
    plain = by_axis({name: found for name, found in reports.items() if name.endswith("default")})
    ours = by_axis({name: found for name, found in reports.items() if not name.endswith("default")})
    yield f"{'axis':<56} {'requests':>8} {'tokens':>9} {'differing':>9}   without the flag, differing"
    for axis, tally in ours.items():
        control = plain.get(axis)
        asked = f"{control['differing']} of {control['requests']}" if control else "not asked"
        yield f"{axis:<56} {tally['requests']:>8} {tally['tokens']:>9} {tally['differing']:>9}   {asked}"
    every = sum(ours.values(), Counter[str]())
    yield f"{'all':<56} {every['requests']:>8} {every['tokens']:>9} {every['differing']:>9}"
    yield ""
    columns = ("compared", "hits", "preempted", "aborted", "steps", "rows", "sizes", "start s")
    yield f"{'engine':<38} " + " ".join(f"{column:>9}" for column in columns) + "   digest of the answers"
    for name, found in reports.items():
        numbers = (
            found["tokens"], found["prefix_hits"], found["preemptions"], found["aborted"], found["steps"],
            found["rows"], len(found["step_tokens"]), found["start_seconds"],
        )  # fmt: skip
        yield f"{name:<38} " + " ".join(f"{number:>9}" for number in numbers) + f"   {found['answers'][:12]}"
    for name in said.keys() - reports.keys():
        yield f"{name}: did not start"


if __name__ == "__main__":
    files = sorted(Path(sys.argv[1]).glob("*.out"), key=lambda file: file.stat().st_mtime)
    print("\n".join(lines({file.stem: last_report(file.read_text()) for file in files})))
