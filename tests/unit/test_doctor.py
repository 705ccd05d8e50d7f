"""The report says what would keep `--deterministic` from starting."""

from __future__ import annotations

import pytest

from vllm_deterministic import cli, doctor


def test_a_refused_variable_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [finding for finding in doctor.findings() if finding.what == "environment"]
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    (finding,) = [finding for finding in doctor.findings() if finding.what == "environment"]
    assert finding.fatal
    assert "Unset VLLM_BATCH_INVARIANT" in finding.value


def test_a_plugin_list_without_us_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert any(finding.fatal and finding.what == "VLLM_PLUGINS" for finding in doctor.findings())


def test_no_compiler_is_fatal_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("torch.compile needs it on CPU")
    assert not [finding for finding in doctor.findings() if finding.what == "C++ compiler"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    (finding,) = [finding for finding in doctor.findings() if finding.what == "C++ compiler"]
    assert finding.fatal
    assert "install g++" in finding.value


def test_an_unknown_vllm_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setattr("vllm_deterministic.compat.vllm_version", lambda: "9.9.9")
    assert any(finding.fatal and "9.9.9" in finding.value for finding in doctor.findings())


def test_what_is_refused_is_listed_with_its_reason() -> None:
    pytest.importorskip("vllm")
    found = {finding.what: finding for finding in doctor.findings()}
    assert "speculative decoding" in found["refused: not proved"].value
    assert "neighbours" in found["refused: VLLM_CPU_ATTN_SPLIT_KV"].value
    assert not found["refused: not proved"].fatal


def test_the_machine_is_named() -> None:
    pytest.importorskip("vllm")
    (named,) = [finding for finding in doctor.findings() if finding.what in ("processor", "card")]
    assert named.value.split(",")[0].strip()


def test_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm")
    assert cli.main(["doctor"]) == 0
    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "1")
    assert cli.main(["doctor"]) == 1
    assert "VLLM_CPU_ATTN_SPLIT_KV" in capsys.readouterr().out
