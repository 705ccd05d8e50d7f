"""Finds matrix products that do not go through our operators: a server that would run one does not start."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_deterministic import compat
from vllm_deterministic.errors import UnsupportedError

__all__ = ["NoBareProducts", "arm", "bare_products"]

_FUNCTIONS = {
    torch.nn.functional.linear, torch.nn.functional.bilinear, torch.mm, torch.bmm, torch.matmul, torch.addmm,
    torch.baddbmm, torch.addbmm, torch.einsum, torch.tensordot, torch.inner, torch.chain_matmul, torch.mv, torch.addmv,
    torch.dot, torch.nn.functional.scaled_dot_product_attention, operator.matmul, operator.imatmul,
}  # fmt: skip
_METHODS = {"mm", "bmm", "matmul", "addmm", "baddbmm", "mv", "dot", "inner", "__matmul__", "__rmatmul__"}
_OVERLOADS = _METHODS | {"addbmm", "linear", "addmv", "_scaled_mm", "einsum"}


def _is_product(target: Any) -> bool:
    if isinstance(target, str):
        return target in _METHODS
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten" and target._opname in _OVERLOADS
    return target in _FUNCTIONS


def bare_products(graph: torch.fx.GraphModule) -> Iterator[str]:
    """The products in a traced graph and its subgraphs that are not ours, each with the line that asked for it."""
    for module in graph.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op in ("call_function", "call_method") and _is_product(node.target):
                lines = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
                yield f"{getattr(node.target, '__name__', node.target)} ({' '.join(lines[-2:]) or 'no source line'})"


def _refuse(found: list[str]) -> None:
    if found:
        raise UnsupportedError(
            "--deterministic: this model multiplies matrices outside of its linear layers, where no reduction tree is "
            "fixed yet:" + "".join(f"\n  - {product}" for product in dict.fromkeys(found))
        )


def arm() -> None:
    """Audits every graph that vLLM compiles in this process. Idempotent. Raises SeamError."""
    compat.install(compat.GPU_SEAMS["graph"], _audited)


def _audited(compile_graph: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compile_graph)
    def wrapped(self: Any, graph: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        _refuse(list(bare_products(graph)))
        return compile_graph(self, graph, *args, **kwargs)

    return wrapped


class NoBareProducts(TorchDispatchMode):
    """Raises UnsupportedError at the first product that PyTorch itself would compute: the audit of an eager model."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_product(func):
            shapes = " and ".join(str(tuple(a.shape)) for a in args if isinstance(a, torch.Tensor))
            _refuse([f"{func} of {shapes}"])
        return func(*args, **(kwargs or {}))
