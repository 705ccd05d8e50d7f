"""Certificates survive the trip to disk, and a cache that is broken, foreign or full costs time only."""

import logging
from pathlib import Path

import pytest
from vllm_deterministic.kernels import certificates
from vllm_deterministic.kernels.certificates import Certificate, intervals, load, store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_DETERMINISTIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def certificate() -> Certificate:
    return Certificate(
        operator="linear",
        tree="t",
        shape={"n": 8, "k": 16, "dtype": "bfloat16", "bias": False},
        machine={"card": "c", "torch": "2"},
        schedules={"a": [(1, 1024), (1152, 1152)]},
        dropped={"b": "M = 3: 7 of 24 elements differ"},
        seconds=1.5,
    )


def test_intervals() -> None:
    assert intervals([7, 1, 2, 3, 3]) == [(1, 3), (7, 7)]
    assert intervals([]) == []


def test_stored_and_loaded(certificate: Certificate) -> None:
    assert load(certificate.key) is None
    store(certificate)
    assert load(certificate.key) == certificate


@pytest.mark.parametrize("part", ["operator", "tree", "shape", "machine"])
def test_another_subject_is_another_key(certificate: Certificate, part: str) -> None:
    import dataclasses

    other = {"x": "y"} if part in ("shape", "machine") else "other"
    assert dataclasses.replace(certificate, **{part: other}).key != certificate.key
    assert dataclasses.replace(certificate, seconds=9.0, dropped={}).key == certificate.key


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"operator": 1}'])
def test_broken_file_is_no_certificate(
    certificate: Certificate, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store(certificate)
    (file,) = (cache / "certificates").glob("*.json")
    file.write_text(damage)
    with caplog.at_level(logging.WARNING, "vllm.deterministic"):
        assert load(certificate.key) is None
    assert "certifying again" in caplog.text


def test_a_certificate_under_a_foreign_name_is_none(certificate: Certificate, cache: Path) -> None:
    store(certificate)
    (file,) = (cache / "certificates").glob("*.json")
    file.rename(file.with_name("0" * 64 + ".json"))
    assert load("0" * 64) is None


def test_full_disk_is_said_and_survived(
    certificate: Certificate, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(certificates.json, "dump", full)
    with caplog.at_level(logging.WARNING, "vllm.deterministic"):
        store(certificate)
    assert "not kept" in caplog.text
    assert list((cache / "certificates").iterdir()) == []
