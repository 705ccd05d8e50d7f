"""A card's bits are those of the numerics version, where its family and libraries have goldens."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("vllm")

from vllm_deterministic.contract import NUMERICS_VERSIONS  # noqa: E402

CARD = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    """The script that makes the goldens computes them for the tests too."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import goldens_cuda

    return goldens_cuda


@pytest.fixture(scope="module")
def recorded(golden: ModuleType) -> dict[str, Any]:
    """The golden of this card's family and libraries."""
    import goldens

    here, missing = json.loads(json.dumps(golden.where(CARD))), []
    for made in goldens.goldens(NUMERICS_VERSIONS[-1]):
        there = made["kernels"]["where"]
        if there == here:
            if reason := goldens.outdated(made):
                pytest.skip(reason)
            return made
        missing.append({name: there[name] for name in there if here.get(name) != there[name]})
    pytest.skip(f"no goldens for {here}; there are some for {missing}")


def changed(found: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    assert found.keys() == want.keys()
    return sorted(name for name in want if found[name] != want[name])


def test_kernels_give_the_golden_bits(golden: ModuleType, recorded: dict[str, Any]) -> None:
    assert changed(golden.kernels(CARD), recorded["kernels"]["digests"]) == [], "other bits need a new numerics version"


def test_the_control_other_orders_of_addition_have_other_bits(
    golden: ModuleType, recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products with K halved and added afterwards, norms' rows in another order, splits of half the keys, other seeds:
    the digests of the four operators change, those of the rest do not."""
    product, attend, norm, draw = golden.bit_reference, golden.attend, golden.rms_norm, golden.draw

    def halves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.dtype | None = None):  # type: ignore[no-untyped-def]
        half = x.shape[1] // 2
        left = product(x[:, :half], weight[:, :half], None, torch.float32)
        right = product(x[:, half:], weight[:, half:], None, torch.float32)
        total = left + right if bias is None else left + right + bias.float()
        return total.to(out or x.dtype)

    def other_splits(tree: Any, *rest: Any) -> torch.Tensor:
        return attend(dataclasses.replace(tree, split=tree.split // 2), *rest)

    def shuffled(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1)).to(x.device)
        return norm(x[:, order], weight[order], epsilon)[:, order.argsort()]

    monkeypatch.setattr(golden, "bit_reference", halves)
    monkeypatch.setattr(golden, "attend", other_splits)
    monkeypatch.setattr(golden, "rms_norm", shuffled)
    monkeypatch.setattr(golden, "draw", lambda x, r, t, seeds, *rest: draw(x, r, t, seeds + 1, *rest))
    want = recorded["kernels"]["digests"]
    found = set(changed(golden.kernels(CARD), want))
    touched = {name for name in want if name.startswith(("linear", "attention", "drawn"))}
    touched |= {f"norm {size} float32" for size in (128, 1024, 4096)}
    assert touched <= found
    assert not [name for name in found if name.startswith(("top-k", "scores"))]


def test_whole_engines_give_the_golden_bits(golden: ModuleType, recorded: dict[str, Any]) -> None:
    if not recorded["answers"]:
        pytest.skip("no whole engine is recorded for this card's family: scripts/goldens_cuda.py record")
    compared = 0
    for entry in golden.ask_all():
        for known in recorded["answers"]:
            if (known["name"], known["where"]) == (entry["name"], entry["where"]):  # vLLM's version is a part of it
                compared += 1
                found = changed(entry["digests"], known["digests"])
                assert found == [], f"{entry['name']}: other bits need a new numerics version"
    if not compared:
        pytest.skip("the recorded engines are of another vLLM")


def test_answers_of_a_golden_differ_from_each_other(recorded: dict[str, Any]) -> None:
    """The control: a model that says one thing to everything would have one digest."""
    for entry in recorded["answers"]:
        said = [(digests["token_ids"], digests["logprobs"]) for digests in entry["digests"].values()]
        assert len(set(said)) == len(said) > 3
    models = [json.dumps(entry["digests"], sort_keys=True) for entry in recorded["answers"]]
    assert len(set(models)) == len(models)
