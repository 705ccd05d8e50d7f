"""vLLM's attention backend on one tree: prefills, chunks and decodes of one batch, under full CUDA graphs.

Nothing that a captured graph does depends on the host's lengths: grids follow padded sizes, the work lists are
written on the device at every step, before the graph runs, into the memory that it was captured with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers

from vllm_deterministic.errors import CertificationError, SeamError, UnsupportedError
from vllm_deterministic.kernels.attention import certify
from vllm_deterministic.kernels.attention.launch import FEW_MAX, SMALL, Attention, Batch, Cache, Scratch
from vllm_deterministic.kernels.attention.plan import Plan
from vllm_deterministic.kernels.attention.schedules import Decode, Heads, Prefill
from vllm_deterministic.kernels.attention.store import store
from vllm_deterministic.kernels.attention.tree import HEAD_SIZES, Tree, tree_for
from vllm_deterministic.kernels.certificates import Certificate
from vllm_deterministic.serving.fingerprint import digest_of

__all__ = [
    "PAGE", "OneTreeBackend", "OneTreeBuilder", "OneTreeImpl", "OneTreeMetadata", "arm", "certified",
    "certified_context", "certify_model", "trees",
]  # fmt: skip

logger = logging.getLogger("vllm.deterministic")

PAGE = 128  # slots: whole tiles of every head size
_CERTIFIED_CONTEXT = 8192 + 17
# vLLM's name of a KV-cache dtype -> the tree's.
_CACHES = {"auto": "half", "float16": "half", "bfloat16": "half", "fp8": "e4m3", "fp8_e4m3": "e4m3"}
_certified: dict[tuple[Tree, Heads], Certificate] = {}
# Scratch between two kernels of one layer; layers of one shape run one after the other.
_scratch: dict[tuple[torch.device, int, int], Scratch] = {}


def arm() -> None:
    """Registers the backend as vLLM's CUSTOM one, in this process. Idempotent."""
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.OneTreeBackend")


def _shared_scratch(device: torch.device, heads: int, size: int) -> Scratch:
    key = (device, heads, size)
    if key not in _scratch:
        _scratch[key] = Scratch.empty(heads, size, device)
    return _scratch[key]


def _attention(tree: Tree, heads: Heads, device: torch.device) -> Attention:
    """Raises CertificationError on a card whose schedules were not certified for this tree and shape."""
    found = _certified.get((tree, heads))
    if found is None and device.type == "cuda":
        raise CertificationError(f"attention of {tree} with {heads} was not certified before it ran")
    scratch = _shared_scratch(device, heads.query, tree.head_size)
    return Attention(tree, heads, device, scratch, None if found is None else set(found.schedules))


def _of_group(trees: Iterable[Tree], heads: Heads, device: torch.device) -> Attention:
    """For layers that share a step's plan: it may run what all of them may."""
    first, *others = (_attention(tree, heads, device) for tree in dict.fromkeys(trees))
    for other in others:
        if first.allowed is not None:
            first.allowed = set(first.allowed).intersection(other.allowed or ())
    return first


def _layers(model: torch.nn.Module) -> list[tuple[torch.nn.Module, OneTreeImpl]]:
    found = ((module, getattr(module, "impl", None)) for module in model.modules())
    return [(module, impl) for module, impl in found if isinstance(impl, OneTreeImpl)]


def certified_context(tree: Tree, max_model_len: int) -> int:
    """Up to which context schedules are certified: past the key where splits double, some of those. Longer ones repeat
    the same splits."""
    return min(max_model_len, max(_CERTIFIED_CONTEXT, tree.steady + 5 * tree.split + 17))


def certify_model(model: torch.nn.Module, dtype: torch.dtype, max_model_len: int, device: torch.device) -> None:
    """Certifies every attention layer's tree and shape on this card, once its weights are loaded. Raises
    CertificationError: then no server starts."""
    shapes = set()
    for layer, impl in _layers(model):
        impl.fix_scales(layer)
        shapes.add((impl.tree, Heads(impl.num_heads, impl.num_kv_heads, PAGE)))
    for tree, heads in shapes:
        attention = Attention(tree, heads, device, _shared_scratch(device, heads.query, tree.head_size))
        found = _certified[tree, heads] = certify.prepare(attention, dtype, certified_context(tree, max_model_len))
        logger.info("attention %s: certified %s, dropped %s", heads, sorted(found.schedules), sorted(found.dropped))
    torch.cuda.empty_cache()  # what certification used must not count against the KV cache


def trees(model: torch.nn.Module) -> dict[str, str]:
    """What the numerics id names besides the version's trees: those of a model with other head sizes, ALiBi or an e4m3
    cache, by their digests, layer by layer. The cache's scales are in them."""
    found = [impl.tree for _, impl in _layers(model)]
    return {} if all(tree.plain for tree in found) else {"attention_layers": digest_of([tree.digest for tree in found])}


def certified() -> list[dict[str, Any]]:
    """What this worker certified: layer shapes, schedules, and what was dropped."""
    return [
        {
            "operator": "attention", "head_size": tree.head_size, "window": tree.window, "query_heads": heads.query,
            "kv_heads": heads.kv, "page": heads.page, "tree": tree.digest, "schedules": sorted(found.schedules),
            "dropped": dict(found.dropped),
        }
        for (tree, heads), found in _certified.items()
    ]  # fmt: skip


@dataclass
class OneTreeMetadata(AttentionMetadata):
    """One step's batch, for all layers of a group. Tensors are vLLM's persistent ones, padded."""

    num_actual_tokens: int
    page_table: torch.Tensor
    plan: Plan
    decode: Decode
    prefill: Prefill | None


class OneTreeBackend(AttentionBackend):
    """Pages of 128 slots; bf16 and fp16, over a cache of the same type or e4m3; causal, with sliding window, sinks,
    softcap and ALiBi."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(_CACHES)
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [PAGE]

    @staticmethod
    def get_impl_cls() -> type[OneTreeImpl]:
        return OneTreeImpl

    @staticmethod
    def get_builder_cls() -> type[OneTreeBuilder]:
        return OneTreeBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool(capability.major >= 8)


class OneTreeBuilder(AttentionMetadataBuilder[OneTreeMetadata]):
    """Writes each step's work lists on the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        query_heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        if query_heads is None:
            query_heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        heads = Heads(query_heads, kv_cache_spec.num_kv_heads, kv_cache_spec.block_size)
        context = vllm_config.compilation_config.static_forward_context
        # A plan reads the tree's sizes only, which a group's layers share.
        self.attention = _of_group((context[name].impl.tree for name in layer_names), heads, device)
        scheduler = vllm_config.scheduler_config
        largest, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        # One plan for graphs of every kind: few, block and memory do not depend on the batch; the largest batch's
        # schedule cuts it into the most pieces, a small step's cuts blocks.
        chosen = self.attention.schedules(largest, min(tokens, SMALL), FEW_MAX + 1)
        self.plan = self.attention.plan(largest, tokens, FEW_MAX + 1, *chosen)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> OneTreeMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise UnsupportedError("attention that is not causal is not covered by --deterministic")
        batch, tokens = common.num_reqs, common.num_actual_tokens
        decode, prefill = self.attention.schedules(batch, tokens, FEW_MAX + 1)
        slots = min(self.attention.slots(decode), self.plan.slots)
        plan = self.plan.part(batch, tokens, slots, self.attention.block_slots(prefill))
        tree = self.attention.tree
        plan.fill(common.query_start_loc, common.seq_lens, tree)
        # A graph captured for one token a sequence is replayed for such batches alone.
        only_decodes = common.max_query_len <= plan.few
        chosen = None if only_decodes else prefill
        return OneTreeMetadata(tokens, common.block_table_tensor, plan, decode, chosen)


class OneTreeImpl(AttentionImpl[OneTreeMetadata]):
    """One layer.

    Raises UnsupportedError, by its name, for what has no tree."""

    supports_quant_query_input = False  # vLLM quantises the queries of an e4m3 cache's backend that says otherwise

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        unknown = sorted(name for name, value in others.items() if value not in (None, False, -1))
        if attn_type != AttentionType.DECODER or unknown:
            raise UnsupportedError(f"attention of type {attn_type} with {unknown} is not covered by --deterministic")
        if kv_cache_dtype not in _CACHES:
            raise UnsupportedError(
                f"--kv-cache-dtype {kv_cache_dtype} is not covered by --deterministic: leave it out, or take fp8 (e4m3 "
                "with fixed scales)"
            )
        if alibi_slopes is not None and len(alibi_slopes) != num_heads:
            raise UnsupportedError(f"{len(alibi_slopes)} alibi_slopes for {num_heads} heads are not covered")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.tree = tree_for(
            head_size, scale, kv_heads=self.num_kv_heads, softcap=logits_soft_cap or 0.0, window=sliding_window or 0,
            sink=sinks is not None, alibi=alibi_slopes is not None, cache=_CACHES[kv_cache_dtype],
        )  # fmt: skip
        self._attention: Attention | None = None
        self._bound: tuple[torch.Tensor, Cache] | None = None

    def fix_scales(self, layer: Any) -> None:
        """Takes the e4m3 cache's scales of a loaded layer into the tree; before it is certified, and for good.

        Raises SeamError where a layer does not say them, UnsupportedError for scales that are not fixed."""
        if not self.tree.e4m3:
            return
        if getattr(layer, "calculate_kv_scales", False):
            raise UnsupportedError("scales of an fp8 KV cache that traffic sets are not covered: leave out "
                                   "--calculate-kv-scales")  # fmt: skip
        scales = (getattr(layer, "_k_scale_float", None), getattr(layer, "_v_scale_float", None))
        if not all(isinstance(scale, float) for scale in scales):
            raise SeamError(f"this vLLM's attention layer says {scales} of its KV cache's scales: it is not supported")
        tree = self.tree
        self.tree = tree_for(
            tree.head_size, tree.scale, kv_heads=self.num_kv_heads, softcap=tree.softcap, window=tree.window,
            sink=tree.sink, alibi=tree.alibi, cache=tree.cache, k_scale=scales[0], v_scale=scales[1],
        )  # fmt: skip

    def _cache(self, kv_cache: torch.Tensor) -> Cache:
        # Outside of CUDA graphs the host prepares every layer of every step: views are made once per cache.
        if self._bound is None or self._bound[0] is not kv_cache:
            self._bound = (kv_cache, self._views(kv_cache))
        return self._bound[1]

    def _views(self, kv_cache: torch.Tensor) -> Cache:
        if self.tree.e4m3:  # vLLM hands over bytes
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
        pages = kv_cache.transpose(1, 2)
        return Cache(pages[..., : self.head_size], pages[..., self.head_size :])

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        tokens = slot_mapping.shape[0]
        scales = self.tree.k_scale, self.tree.v_scale
        store(key[:tokens], value[:tokens], self._cache(kv_cache), slot_mapping, *scales)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: OneTreeMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query: [tokens, heads, head size]. kv_cache: [pages, kv heads, slots, 2 * head size], of any strides."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("quantised attention output is not covered by --deterministic")
        if attn_metadata is None:  # profiling
            return output.fill_(0)
        if self._attention is None:
            heads = Heads(self.num_heads, self.num_kv_heads, kv_cache.shape[2])
            self._attention = _attention(self.tree, heads, query.device)
            self.slopes = None if self.slopes is None else self.slopes.to(query.device)
        step, shape = attn_metadata, (attn_metadata.num_actual_tokens, self.num_heads, self.head_size)
        q, out = query[: shape[0]].view(shape), output[: shape[0]].view(shape)
        batch = Batch(q, out, step.page_table, step.plan, self.sinks, self.slopes)
        self._attention.run(batch, self._cache(kv_cache), step.decode, step.prefill)
        return output
