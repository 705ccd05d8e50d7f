"""Finds what would be added up in an order that is not ours: a server that would run it does not start.

Matrix products are found in the graph as it was traced, with the line that asked for them. Whatever else could add is
found in the graph that Inductor compiles, by an allow-list: elementwise operations, copies, maxima, and operators that
are certified or copy. Between those Inductor may fuse and tune as it likes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_deterministic import compat
from vllm_deterministic.errors import UnsupportedError

__all__ = ["NoBareProducts", "arm", "bare_products", "uncertain"]

_FUNCTIONS = {
    torch.nn.functional.linear, torch.nn.functional.bilinear, torch.mm, torch.bmm, torch.matmul, torch.addmm,
    torch.baddbmm, torch.addbmm, torch.einsum, torch.tensordot, torch.inner, torch.chain_matmul, torch.mv, torch.addmv,
    torch.dot, torch.nn.functional.scaled_dot_product_attention, operator.matmul, operator.imatmul,
}  # fmt: skip
_METHODS = {"mm", "bmm", "matmul", "addmm", "baddbmm", "mv", "dot", "inner", "__matmul__", "__rmatmul__"}
_OVERLOADS = _METHODS | {"addbmm", "linear", "addmv", "_scaled_mm", "einsum"}


# ATen's and prims' operators that are not tagged pointwise, and neither add nor leave an order open.
_COPIES = set(
    "alias arange as_strided cat constant_pad_nd copy copy_ detach embedding empty empty_strided expand flip full "
    "full_like gather index index_select iota lift_fresh_copy new_empty new_full new_zeros ones permute repeat reshape "
    "roll scalar_tensor select select_scatter slice slice_scatter split split_with_sizes squeeze stack "
    "sym_numel sym_size sym_stride sym_storage_offset t transpose unbind unfold unsafe_view unsqueeze view "
    "_unsafe_view _reshape_alias _to_copy zeros zeros_like empty_like ones_like broadcast_in_dim".split()
)
_MAXIMA = {"amax", "amin", "max", "min", "argmax", "argmin", "any", "all"}
# Operators of vLLM that may stand in a model's graph: our attention backend is behind the first two, the others work
# element by element.
_CERTIFIED = {
    "vllm.unified_attention_with_output", "vllm.unified_kv_cache_update", "_C.rotary_embedding", "_C.silu_and_mul",
    "_C.gelu_and_mul", "_C.gelu_tanh_and_mul",
}  # fmt: skip


def _may_add(node: torch.fx.Node) -> bool:
    target: Any = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        # Functionalised: the operator that mutates is the first argument.
        inner = node.args[0] if node.args else None
        return not isinstance(inner, torch._ops.OpOverload) or not _known(inner)
    if isinstance(target, torch._ops.OpOverload):
        if target._opname == "index_put":
            return len(node.args) > 3 and bool(node.args[3])  # accumulating
        return not _known(target)
    # Sizes are worked out with Python's own operators.
    return getattr(target, "__module__", None) not in (
        "_operator",
        "operator",
        "math",
        "builtins",
        "torch.fx.experimental.sym_node",
    )


def _known(overload: torch._ops.OpOverload) -> bool:
    if overload.namespace in ("aten", "prims"):
        return torch.Tag.pointwise in overload.tags or overload._opname in _COPIES | _MAXIMA
    return overload.namespace == "vllm_deterministic" or f"{overload.namespace}.{overload._opname}" in _CERTIFIED


def uncertain(graph: torch.fx.Graph) -> Iterator[str]:
    """The operations of a lowered graph that add, or may add, in an order that nobody has fixed, with their shapes."""
    for node in graph.nodes:
        if node.op == "call_function" and _may_add(node):
            shapes = (
                tuple(arg.meta["val"].shape) for arg in node.all_input_nodes if hasattr(arg.meta.get("val"), "shape")
            )
            yield f"{node.target} of {' and '.join(map(str, shapes)) or 'no tensor'}"


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


_MULTIPLIES = "multiplies matrices outside of its linear layers"
_ADDS = "adds, or may add, outside of its linear layers, norms and attention"


def _refuse(found: list[str], does: str = _MULTIPLIES) -> None:
    if found:
        raise UnsupportedError(
            f"--deterministic: this model {does}, where no reduction tree is fixed yet:"
            + "".join(f"\n  - {operation}" for operation in dict.fromkeys(found))
        )


def arm() -> None:
    """Audits every graph that vLLM compiles in this process. Idempotent. Raises SeamError."""
    compat.install(compat.GPU_SEAMS["graph"], _audited)
    compat.install(compat.GPU_SEAMS["lowered"], _audited_when_lowered)


def _audited(compile_graph: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compile_graph)
    def wrapped(self: Any, graph: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        _refuse(list(bare_products(graph)))
        return compile_graph(self, graph, *args, **kwargs)

    return wrapped


def _audited_when_lowered(passes: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(passes)
    def wrapped(self: Any, graph: torch.fx.Graph) -> None:
        passes(self, graph)
        _refuse(list(uncertain(graph)), _ADDS)

    return wrapped


class NoBareProducts(TorchDispatchMode):
    """Raises UnsupportedError at the first product that PyTorch itself would compute: the audit of an eager model."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_product(func):
            shapes = " and ".join(str(tuple(a.shape)) for a in args if isinstance(a, torch.Tensor))
            _refuse([f"{func} of {shapes}"])
        return func(*args, **(kwargs or {}))
