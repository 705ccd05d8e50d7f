"""A table at the end of the run: which fault was found by which family, after how many requests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vllm_deterministic.verify import Report

_said: list[str] = []


@pytest.fixture
def said_of(told: Callable[[str], None]) -> Callable[[str, Report], None]:
    def say(fault: str, report: Report) -> None:
        found = ", ".join(report.found_by) or "nothing"
        line = (
            f"{fault:26} {report.verdict:8} found by {found:12} {report.requests:4} requests, "
            f"{report.answers:4} answers, {report.seconds:6.1f} s, seed {report.seed}"
        )
        _said.append(line)
        told(line)

    return say


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _said:
        terminalreporter.section("planted faults, and what `verify --level standard` found")
        terminalreporter.write_line("\n".join(_said))
