"""What every operator of a running eager model made of every row, as digests, so that two runs can be compared."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Call", "Pass", "Recorder"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What lies in fresh memory is nobody's result.
_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")


@dataclass(frozen=True)
class Call:
    """One operator. layer: the module it ran in. shapes: of the tensors it was given. rows: a digest of each row."""

    layer: str
    operator: str
    shapes: tuple[tuple[int, ...], ...]
    rows: Sequence[int]


@dataclass
class Pass:
    """One run of a stage of the model ("layers" or "logits"). keys: what each row is, whatever batch it is in."""

    stage: str
    keys: Sequence[Hashable]
    calls: list[Call] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Records the model that it watches, pass by pass, into `passes`."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[Pass] = []
        self._layers: list[str] = []
        self._open: list[Pass] = []
        self._weights: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._caches: set[int] = set()

    def watch(self, model: Any) -> None:
        """Wraps the stages of vLLM's model, for good."""
        for name, module in model.named_modules():
            module.register_forward_pre_hook(functools.partial(self._enter, name))
            module.register_forward_hook(self._leave, always_call=True)
        self._model = model
        model.forward = self._recorded("layers", model.forward)
        model.compute_logits = self._recorded("logits", model.compute_logits)

    def taken(self) -> list[Pass]:
        """The passes since the last call."""
        found, self.passes = self.passes, []
        return found

    def _enter(self, name: str, *_: Any) -> None:
        self._layers.append(name)

    def _leave(self, *_: Any) -> None:
        self._layers.pop()

    def _recorded(self, stage: str, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def wrapped(*args: Any, **named: Any) -> Any:
            given = inspect.signature(run).bind(*args, **named).arguments
            keys: Sequence[Hashable]
            if stage == "layers":
                keys = list(zip(given["input_ids"].tolist(), given["positions"].tolist(), strict=True))
            else:
                keys = self._digests(given["hidden_states"])
            # A cache is no result of a row. vLLM binds the caches after it has built the model.
            caches = (getattr(module, "kv_cache", None) for module in self._model.modules())
            self._caches = {cache.untyped_storage().data_ptr() for cache in caches if isinstance(cache, torch.Tensor)}
            self._open.append(Pass(stage, keys))
            with self:
                result = run(*args, **named)
            self.passes.append(self._open.pop())
            return result

        return wrapped

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._open or func._opname in _UNWRITTEN:
            return result
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        written = [
            given[argument.name]
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given
        ]
        viewed = not written and any(one.alias_info is not None for one in func._schema.returns)
        made = [] if viewed else [*written, *(result if isinstance(result, (tuple, list)) else [result])]
        for one in made:
            if self._is_rows(one):
                shapes = tuple(tuple(value.shape) for value in given.values() if isinstance(value, torch.Tensor))
                self._open[-1].calls.append(Call(".".join(self._layers[-1:]), str(func), shapes, self._digests(one)))
        return result

    def _is_rows(self, value: Any) -> bool:
        rows = len(self._open[-1].keys)
        fits = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == rows and value.numel() > 0
        return fits and value.untyped_storage().data_ptr() not in self._caches

    def _digests(self, value: torch.Tensor) -> list[int]:
        """An integer for each row: its bits, each times an odd number of its column, added up modulo 2^64. Integers:
        the same in every order."""
        rows = value.detach().reshape(value.shape[0], -1).contiguous()
        bits = rows.view(_BITS[rows.element_size()]).to(torch.int64)
        key = (bits.shape[1], bits.device)
        if key not in self._weights:
            generator = torch.Generator().manual_seed(1)
            weights = torch.randint(-(2**62), 2**62, key[:1], generator=generator) * 2 + 1
            self._weights[key] = weights.to(bits.device)
        found: list[int] = (bits * self._weights[key]).sum(1).tolist()
        return found
