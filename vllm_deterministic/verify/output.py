"""Writes a report's files: whole or not at all, so that whoever reads them never finds half a file."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from vllm_deterministic.errors import DeterministicError
from vllm_deterministic.verify import page
from vllm_deterministic.verify.report import Report

__all__ = ["FILES", "OutputError", "junit", "prepare", "write", "write_file"]

FILES = ("report.json", "report.html", "junit.xml")


class OutputError(DeterministicError, OSError):
    """A file could not be written; the message says where and why. Nothing half-written is left."""


def prepare(folder: Path) -> None:
    """Makes the folder and tries to write into it: better now than after an hour of requests. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"x")
            trial.flush()
    except OSError as error:
        raise OutputError(f"the report's folder {folder} cannot be written: {error.strerror or error}") from error


def write(report: Report, folder: Path) -> None:
    """Writes report.json, report.html and junit.xml. Raises OutputError for a full disk and the like."""
    write_file(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    write_file(folder / "report.html", page.render(report))
    write_file(folder / "junit.xml", junit(report))


def write_file(path: Path, text: str) -> None:
    """Replaces `path` in one step; an older file stays until the new one is whole. Raises OutputError."""
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)  # mkstemp makes a private file
        os.replace(scratch, path)
    except OSError as error:
        if scratch is not None:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
        raise OutputError(f"{path} could not be written: {error.strerror or error}") from error


# What XML 1.0 cannot carry, not even escaped; models do emit control characters.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report) -> str:
    """JUnit XML: a test per case; what differs is a failure, what could not be told is skipped."""
    suites = ElementTree.Element("testsuites", name="vllm-deterministic verify", time=f"{report.seconds:.3f}")
    for family in report.families:
        names = [case.name for case in family.cases]
        suite = ElementTree.SubElement(suites, "testsuite", name=family.name, time=f"{family.seconds:.3f}")
        skipped = failures = 0
        for number, case in enumerate(family.cases):
            # A later round asks the same of another prompt.
            name = case.name if names.count(case.name) == 1 else f"{case.name} ({names[:number].count(case.name) + 1})"
            test = ElementTree.SubElement(
                suite, "testcase", classname=f"verify.{family.name}", name=_xml(name), time="0"
            )
            if case.verdict == "differs":
                failures += 1
                message = f"{case.runs} answers, {case.distinct_answers} distinct, {case.distinct_texts} distinct texts"
                failure = ElementTree.SubElement(test, "failure", message=message, type="differs")
                if (parted := case.first_divergence) is not None:
                    failure.text = _xml(
                        f"{parted.field} at {parted.position}: {parted.reference_value} "
                        f"({parted.reference_condition}), {parted.other_value} ({parted.other_condition})"
                    )
            elif case.verdict == "could not tell" or family.verdict == "could not tell":
                skipped += 1
                ElementTree.SubElement(test, "skipped", message=_xml(family.reason or "one answer only"))
        if not family.cases:
            skipped = 1
            test = ElementTree.SubElement(suite, "testcase", classname=f"verify.{family.name}", name="all", time="0")
            ElementTree.SubElement(test, "skipped", message=_xml(family.reason))
        counts = {"tests": max(1, len(family.cases)), "failures": failures, "errors": 0, "skipped": skipped}
        for key, value in counts.items():
            suite.set(key, str(value))
    for key in ("tests", "failures", "errors", "skipped"):
        suites.set(key, str(sum(int(suite.get(key, "0")) for suite in suites)))
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
