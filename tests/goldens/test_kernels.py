"""Bits of the kernels on fixed hard data are those of the numerics version, where this machine has goldens."""

from __future__ import annotations

import json

import pytest

from vllm_deterministic.configs import numerics  # isort: skip
from vllm_deterministic.contract import NUMERICS_VERSIONS


def test_every_version_has_goldens(golden) -> None:
    for version in NUMERICS_VERSIONS:
        recorded = golden.goldens(version)
        assert recorded, f"numerics {version} has no goldens: scripts/goldens.py record"
        for made in recorded:
            assert made["numerics"] == version
            device = made["kernels"]["where"]["device"]
            machine = {"cpu": {"processor"}, "cuda": {"card", "driver"}}[device]
            assert {"date", "command", "package", *machine} <= made["provenance"].keys()


def test_a_changed_tree_of_a_frozen_version_is_found(golden, monkeypatch) -> None:
    (made, *_) = golden.goldens(NUMERICS_VERSIONS[0])
    made = {**made, "trees": numerics(made["numerics"])[made["kernels"]["where"]["device"]]}
    other = {**made, "trees": {**made["trees"], "linear": {"definition": "another"}}}
    monkeypatch.setattr(golden, "__version__", "1.0.0")
    assert golden.outdated(made) == ""
    with pytest.raises(SystemExit, match="frozen"):
        golden.outdated(other)
    monkeypatch.setattr(golden, "__version__", "0.9.0")
    assert "record" in golden.outdated(other)


@pytest.fixture(scope="module")
def recorded(golden):
    """The golden digests of this machine."""
    here = json.loads(json.dumps(golden.where()))
    missing = []
    for made in golden.goldens(NUMERICS_VERSIONS[-1]):
        if made["kernels"]["where"] == here:
            if reason := golden.outdated(made):
                pytest.skip(reason)
            return made["kernels"]["digests"]
        there = made["kernels"]["where"]
        missing.append({name: here[name] for name in here if here[name] != there.get(name)})
    pytest.skip(f"no goldens for this machine: it differs from those recorded in {missing}")


def test_kernels_give_the_golden_bits(golden, recorded) -> None:
    found = golden.kernels()
    changed = sorted(name for name in recorded if found.get(name) != recorded[name])
    assert not changed, f"{changed}: other bits need a new numerics version"
    assert found.keys() == recorded.keys()


def test_the_control_another_order_of_addition_has_other_bits(golden, recorded, monkeypatch) -> None:
    """The same products with K halved and added up afterwards: every float32 linear digest changes."""
    from vllm_deterministic.integration import linear

    def halves(weight, bias):
        half = weight.shape[1] // 2
        left, right = (whole(part.contiguous(), None) for part in (weight[:, :half], weight[:, half:]))

        def product(x, y):
            other = y.clone()
            left(x[:, :half].contiguous(), y)
            right(x[:, half:].contiguous(), other)
            y += other

        return product

    whole = linear.packed_product
    monkeypatch.setattr(linear, "packed_product", halves)
    found = golden.kernels()
    linear_float32 = [name for name in recorded if name.startswith("linear") and name.endswith("float32")]
    assert linear_float32
    assert all(found[name] != recorded[name] for name in linear_float32)
    assert found["noise"] == recorded["noise"]
