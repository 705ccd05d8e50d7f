"""The audit names every product that bypasses our operators, however it is written, and nothing else."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.errors import UnsupportedError  # noqa: E402
from vllm_deterministic.integration.audit import NoBareProducts, bare_products, uncertain  # noqa: E402

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


def lowered(function) -> list[str]:
    """What the audit finds in the graph that Inductor would compile for any number of rows."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    found: list[str] = []

    class Audit(CustomGraphPass):
        def __call__(self, graph):
            found.extend(uncertain(graph))
            raise RuntimeError("nothing needs to be compiled")

        def uuid(self):
            return None

    torch.compiler.reset()
    settings = config.patch(post_grad_custom_post_pass=Audit(), force_disable_caches=True)
    with settings, pytest.raises(Exception, match="nothing needs to be compiled"):
        torch.compile(function, dynamic=True)(torch.ones(6, 4), torch.arange(6))
    return found


ADDING = {
    "sum": (lambda x, i: x.sum(-1), "aten.sum"),
    "mean": (lambda x, i: x.mean(-1), "aten.mean"),
    "softmax": (lambda x, i: x.softmax(-1), "aten.sum"),
    "layer norm": (lambda x, i: torch.nn.functional.layer_norm(x, (4,)), "aten.var_mean"),
    "rms norm": (lambda x, i: torch.nn.functional.rms_norm(x, (4,)), "aten.mean"),
    "cumsum": (lambda x, i: x.cumsum(-1), "aten.cumsum"),
    "vector norm": (lambda x, i: torch.linalg.vector_norm(x, dim=-1), "aten.sum"),
    "scatter_add": (lambda x, i: torch.zeros(4).scatter_add(0, i % 4, x[:, 0]), "aten.scatter_add"),
    "index_add": (lambda x, i: torch.zeros(4).index_add(0, i % 4, x[:, 0]), "aten.index_put"),
    "topk": (lambda x, i: torch.topk(x, 2).indices, "aten.topk"),
    "product": (lambda x, i: x @ WEIGHT, "aten.mm"),
    "foreign operator": (
        lambda x, i: torch.ops.vllm_deterministic_test.anything(x),
        "vllm_deterministic_test.anything",
    ),
}


@pytest.fixture
def _foreign():
    library = torch.library.Library("vllm_deterministic_test", "FRAGMENT")
    library.define("anything(Tensor x) -> Tensor")
    library.impl("anything", torch.clone, "CPU")
    torch.library.register_fake("vllm_deterministic_test::anything", torch.empty_like, lib=library)
    yield
    library._destroy()


@pytest.mark.usefixtures("_foreign")
@pytest.mark.parametrize("name", ADDING)
def test_what_may_add_in_a_lowered_graph_is_found(name: str) -> None:
    function, operation = ADDING[name]
    (found,) = [one for one in lowered(lambda x, i: function(x, i) * 1.5) if operation in one]
    assert "(s" in found  # the shape, with its symbol


def test_a_layer_without_sums_of_its_own_passes() -> None:
    def layer(x, positions):
        """Embedding, rotary embedding, activations, residual, masks: as vLLM's layers write them."""
        table = torch.ones(8, 4)
        x = x + torch.nn.functional.embedding(positions, table)
        cos, sin = table.index_select(0, positions).chunk(2, dim=-1)
        left, right = x.chunk(2, dim=-1)
        x = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).view(-1, 2, 2).reshape(-1, 4)
        gate, up = x.to(torch.bfloat16).split([2, 2], dim=-1)
        y = torch.nn.functional.silu(gate) * up + torch.nn.functional.gelu(gate, approximate="tanh")
        y = torch.where(positions[:, None] > 2, y, 0).masked_fill(positions[:, None] == 3, 1).clamp(-3, 3)
        return y.float().tanh() * 30, x.amax(-1), x.repeat(1, 2)

    assert lowered(layer) == []
