"""The audit names every product that bypasses our operators, however it is written, and nothing else."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.errors import UnsupportedError  # noqa: E402
from vllm_deterministic.integration.audit import NoBareProducts, bare_products  # noqa: E402

WEIGHT = torch.ones(4, 4)
PRODUCTS = {
    "F.linear": lambda x: torch.nn.functional.linear(x, WEIGHT),
    "@": lambda x: x @ WEIGHT,
    "torch.mm": lambda x: torch.mm(x, WEIGHT),
    "method mm": lambda x: x.mm(WEIGHT),
    "matmul": lambda x: x.matmul(WEIGHT),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, WEIGHT),
    "bmm": lambda x: torch.bmm(x[None], WEIGHT[None]),
    "addmm": lambda x: torch.addmm(WEIGHT, x, WEIGHT),
    "nn.Linear": torch.nn.Linear(4, 4),
}


def traced(function) -> list[str]:
    """What the audit finds in the graph that Dynamo hands to a backend."""
    found: list[str] = []

    def backend(graph, example_inputs):
        found.extend(bare_products(graph))
        return graph.forward

    torch.compiler.reset()
    torch.compile(function, backend=backend)(torch.ones(4, 4))
    return found


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_in_a_graph_is_found(name: str) -> None:
    assert traced(lambda x: PRODUCTS[name](x) + 1)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_in_an_eager_run_is_found(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)outside of its linear layers.*aten"), NoBareProducts():
        PRODUCTS[name](torch.ones(4, 4))


def test_the_line_that_asked_is_named() -> None:
    assert "test_audit.py" in traced(lambda x: x @ WEIGHT)[0]


def test_what_is_no_product_passes() -> None:
    def harmless(x):
        return torch.nn.functional.silu(x * WEIGHT).sum(-1, keepdim=True) + torch.nn.functional.embedding(
            torch.zeros(4, dtype=torch.long), WEIGHT
        )

    assert traced(harmless) == []
    with NoBareProducts():
        harmless(torch.ones(4, 4))
