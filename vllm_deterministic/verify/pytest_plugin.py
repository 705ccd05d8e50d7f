"""pytest plugin: `deterministic_endpoint`, an endpoint that has been verified before the first test uses it."""

from __future__ import annotations

import os
from typing import Any

import pytest

__all__ = ["deterministic_endpoint", "deterministic_report"]

# Option -> (environment variable, default, help)
OPTIONS = {
    "--deterministic-url": ("DETERMINISTIC_URL", None, "OpenAI endpoint that `deterministic_endpoint` verifies"),
    "--deterministic-model": ("DETERMINISTIC_MODEL", None, "its model, where it serves several"),
    "--deterministic-level": ("DETERMINISTIC_LEVEL", "quick", "quick, standard or deep (default quick)"),
    "--deterministic-api-key-env": ("DETERMINISTIC_API_KEY_ENV", None, "environment variable with its API key"),
    "--deterministic-verified": ("DETERMINISTIC_VERIFIED", None, "report.json of a `verify` just run"),
    "--deterministic-report": ("DETERMINISTIC_REPORT", None, "folder for the report"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deterministic", "verified deterministic endpoint")
    for option, (variable, _, text) in OPTIONS.items():
        group.addoption(option, default=None, metavar="VALUE", help=f"{text} (or {variable})")


def _option(config: pytest.Config, option: str) -> str | None:
    variable, default, _ = OPTIONS[option]
    given = config.getoption(option)
    return str(given) if given is not None else os.environ.get(variable) or default


def _key(config: pytest.Config) -> str:
    name = _option(config, "--deterministic-api-key-env")
    return (os.environ.get(name) if name else None) or "EMPTY"


@pytest.fixture(scope="session")
def deterministic_report(pytestconfig: pytest.Config) -> Any:
    """The `Report` of the endpoint named by --deterministic-url; the tests that need it are skipped where none is.

    With --deterministic-verified it is the one that `vllm-deterministic verify --report` has left of that endpoint.
    """
    url = _option(pytestconfig, "--deterministic-url")
    if url is None:
        pytest.skip("no endpoint: give --deterministic-url URL or set DETERMINISTIC_URL")
    from pathlib import Path

    from vllm_deterministic.verify import Report, output, verify
    from vllm_deterministic.verify.discover import base_urls

    verified = _option(pytestconfig, "--deterministic-verified")
    if verified is not None:
        known = Report.model_validate_json(Path(verified).read_text())
        if known.endpoint.url not in base_urls(url):
            pytest.fail(f"{verified} is a report of {known.endpoint.url}, not of {url}", pytrace=False)
        return known
    report = verify(
        url,
        model=_option(pytestconfig, "--deterministic-model"),
        level=_option(pytestconfig, "--deterministic-level"),
        api_key=_key(pytestconfig),
    )
    folder = _option(pytestconfig, "--deterministic-report")
    if folder is not None:
        output.write(report, Path(folder))
    return report


@pytest.fixture(scope="session")
def deterministic_endpoint(pytestconfig: pytest.Config, deterministic_report: Any) -> Any:
    """A verified `Endpoint`, whose answers may be compared with `==`. Fails where it differs or could not be told."""
    if deterministic_report.verdict != "same":
        lines = [f"{family.title}: {family.verdict} {family.reason}" for family in deterministic_report.families]
        pytest.fail(f"{deterministic_report.headline}\n" + "\n".join(lines), pytrace=False)
    from vllm_deterministic.verify.probes import Endpoint

    facts = deterministic_report.endpoint
    return Endpoint(facts.url, facts.model, _key(pytestconfig), token_ids=facts.extensions)
