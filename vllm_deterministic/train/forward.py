"""The server's forward pass on the weights of a transformers model, layer by layer as vLLM's model files have it.

vLLM adds a layer's output to the residual and normalises the sum before it is rounded; transformers rounds first. So
the model's layers cannot be replaced one by one: the whole decoder is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.vocab_parallel_embedding import DEFAULT_VOCAB_PADDING_SIZE, pad_vocab_size
from vllm.platforms import current_platform

from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.train.attention import Attention
from vllm_deterministic.train.device import device_of
from vllm_deterministic.train.linear import Linear
from vllm_deterministic.train.rows import RMSNorm, rotate, silu_and_mul
from vllm_deterministic.train.sequences import Packed
from vllm_deterministic.train.vocabulary import Embedding

__all__ = ["MODELS", "Decoder"]

# transformers' class of the causal model -> whether its attention normalises q and k.
MODELS = {"LlamaForCausalLM": False, "Qwen2ForCausalLM": False, "Qwen3ForCausalLM": True}


class Decoder:
    """The operators of one model. dtype: the server's; the parameters may be wider (f32 weights, a bf16 server)."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        check(model, dtype)
        config, base = model.config, model.model
        self.dtype, self.config, self.base, self.place = dtype, config, base, model.lm_head.weight.device
        self.device = device_of(self.place.type)
        self.vocabulary = config.vocab_size
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.embedding = Embedding(base.embed_tokens, self.device, dtype)
        self.cos_sin = _cos_sin(self.size, config, dtype, self.place)
        normed = MODELS[type(model).__name__]
        self.layers = [_Layer(layer, self, normed) for layer in base.layers]
        self.norm = RMSNorm(base.norm, config.rms_norm_eps, self.device, dtype)
        padded = pad_vocab_size(self.vocabulary, DEFAULT_VOCAB_PADDING_SIZE) - self.vocabulary
        self.head = Linear([model.lm_head], self.device, dtype, padded)

    def __call__(self, ids: torch.Tensor, packed: Packed) -> torch.Tensor:
        """ids: [rows] i64 of the packed sequences; returns the hidden states before the head, [rows, H]."""
        longest = max(packed.lengths)
        if longest > len(self.cos_sin):
            raise UnsupportedError(f"a sequence of {longest} tokens: the model has {len(self.cos_sin)} positions")
        attention = self.device.attention(
            packed, self.config.num_attention_heads, self.config.num_key_value_heads, self.size, self.dtype
        )
        hidden: torch.Tensor = self.embedding(ids, packed)
        residual: Any = None
        for layer in self.layers:
            if self.checkpointing:
                hidden, residual = checkpoint(layer, hidden, residual, attention, use_reentrant=False)
            else:
                hidden, residual = layer(hidden, residual, attention)
        return self.norm.after_adding(hidden, residual, packed)[0]

    @property
    def checkpointing(self) -> bool:
        """Whether a backward pass is to compute activations again instead of keeping them."""
        marked = (self.base, *self.base.layers)
        asked = any(getattr(module, "gradient_checkpointing", False) for module in marked)
        return bool(asked and self.base.training and torch.is_grad_enabled())


def _cos_sin(size: int, config: Any, dtype: torch.dtype, place: torch.device) -> torch.Tensor:
    """vLLM's table of a rotary embedding, [positions, size].

    vLLM keeps the modules that it makes, by their parameters. One made here must not stay: an engine in this process
    would find it, and rotate by the operator of the configuration that it was made under.
    """
    kept = dict(rotary_embedding._ROPE_DICT)
    try:
        with set_current_vllm_config(VllmConfig()), place:  # the server computes it on its own device
            rope = rotary_embedding.get_rope(
                size, config.max_position_embeddings, rope_parameters=config.rope_parameters, dtype=dtype
            )
        return rope.cos_sin_cache.to(dtype)
    finally:
        rotary_embedding._ROPE_DICT.clear()
        rotary_embedding._ROPE_DICT.update(kept)


class _Layer:
    def __init__(self, layer: Any, decoder: Decoder, normed: bool) -> None:
        attention, mlp, eps = layer.self_attn, layer.mlp, decoder.config.rms_norm_eps
        # Not the decoder itself: a cycle would keep its packed weights alive until Python looks for cycles.
        self.cos_sin, self.device, how = decoder.cos_sin, decoder.device, (decoder.device, decoder.dtype)
        self.before = RMSNorm(layer.input_layernorm, eps, *how)
        self.between = RMSNorm(layer.post_attention_layernorm, eps, *how)
        self.qkv = Linear([attention.q_proj, attention.k_proj, attention.v_proj], *how)
        self.norms = [RMSNorm(norm, eps, *how) for norm in (attention.q_norm, attention.k_norm)] if normed else []
        self.out = Linear([attention.o_proj], *how)
        self.gate_up = Linear([mlp.gate_proj, mlp.up_proj], *how)
        self.down = Linear([mlp.down_proj], *how)

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, attention: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed = attention.packed
        if residual is None:
            residual, hidden = hidden, self.before(hidden, packed)
        else:
            hidden, residual = self.before.after_adding(hidden, residual, packed)
        q, k, v = self.qkv(hidden, packed)
        if self.norms:
            q, k = (
                norm(part.view(packed.rows, -1, attention.size), packed).view(packed.rows, -1)
                for norm, part in zip(self.norms, (q, k), strict=True)
            )
        q, k = rotate(q, k, packed.positions, self.cos_sin, attention.size)
        (hidden,) = self.out(attention(q, k, v), packed)
        hidden, residual = self.between.after_adding(hidden, residual, packed)
        gate, up = self.gate_up(hidden, packed)
        (hidden,) = self.down(silu_and_mul(gate, up, self.device), packed)
        return hidden, residual


def check(model: Any, dtype: torch.dtype) -> None:
    """Raises UnsupportedError for a model whose forward pass the server's operators are not known to give."""
    name = type(model).__name__
    if name not in MODELS:
        raise UnsupportedError(
            f"{name}: the trainer has the forward pass of {', '.join(MODELS)} (adapters: merge them)"
        )
    places = {parameter.device for parameter in model.parameters()}
    kind = current_platform.device_type
    if len(places) != 1 or next(iter(places)).type != kind:
        have = ", ".join(sorted(map(str, places)))
        raise UnsupportedError(
            f"{name}: all parameters must be on one {kind} device, as this vLLM is; they are on {have}"
        )
    proved = device_of(kind).DTYPES
    if dtype not in proved:
        raise UnsupportedError(f"dtype {dtype}: proved are {', '.join(map(str, proved))}")
    config = model.config
    wrong = [
        (getattr(config, "hidden_act", "silu") != "silu", f"hidden_act {getattr(config, 'hidden_act', None)!r}"),
        ("sliding_attention" in (getattr(config, "layer_types", None) or ()), "sliding-window attention"),
        (bool(getattr(config, "attention_dropout", 0)) and model.training, "attention_dropout: set it to 0"),
        (any(type(p.data) is not torch.Tensor for p in model.parameters()), "sharded or wrapped parameters"),
        (
            any(m.weight.dtype not in (dtype, torch.float32) for m in model.modules() if hasattr(m, "weight")),
            f"parameters that are neither {dtype} nor float32",
        ),
    ]
    for found, what in wrong:
        if found:
            raise UnsupportedError(f"{name}: the server's bits are not proved with {what}")
    odd = [
        name
        for name, module in model.model.layers.named_modules()
        if hasattr(module, "weight") and type(module) is not torch.nn.Linear and not name.endswith("norm")
    ]
    if odd:
        raise UnsupportedError(f"layers.{odd[0]} is no plain linear layer: merge adapters, undo quantisation")
