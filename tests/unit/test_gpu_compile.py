"""The compile cache's key names our sources, and Inductor rounds where the eager model does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
envs = pytest.importorskip("vllm.envs")

from vllm_deterministic.integration import gpu_compile  # noqa: E402


def test_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "environment_variables", dict(envs.environment_variables))
    before = envs.compile_factors()
    config = SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config={"combo_kernels": True}))
    for _ in range(2):
        gpu_compile.arm(config)
    assert config.compilation_config.inductor_compile_config == {"combo_kernels": True, "emulate_precision_casts": True}
    added = {name: value for name, value in envs.compile_factors().items() if before.get(name) != value}
    assert added == {"VLLM_DETERMINISTIC_SOURCES": gpu_compile.sources()}


def test_sources_are_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    digests = []
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (tmp_path / "__init__.py").write_text(text)
        monkeypatch.setattr(gpu_compile.kernels, "__file__", str(tmp_path / "__init__.py"))
        digests.append(gpu_compile.sources.__wrapped__())
    assert digests[0] == digests[2] != digests[1]


def test_inductor_knows_the_setting() -> None:
    from torch._inductor import config

    assert config.emulate_precision_casts in (True, False)
