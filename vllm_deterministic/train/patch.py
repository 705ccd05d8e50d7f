"""`with deterministic_forward(model)`: a transformers model that computes what the deterministic server computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vllm_deterministic.errors import ConfigurationError, UnsupportedError
from vllm_deterministic.train.forward import Decoder
from vllm_deterministic.train.sequences import Packed
from vllm_deterministic.train.vocabulary import token_logprobs

__all__ = ["decoder_of", "deterministic_forward", "logprobs"]

_ATTRIBUTE = "_vllm_deterministic_decoder"


@contextlib.contextmanager
def deterministic_forward(model: Any, dtype: torch.dtype | None = None) -> Iterator[Any]:
    """Inside, `model` has the server's forward pass, with a deterministic backward pass; it is yielded.

    model: LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM on the device that vLLM is installed for, the CPU or
    one CUDA card. dtype: the server's, by default the parameters'; f32 parameters may stand behind a bf16 server.
    `model(input_ids, attention_mask)` takes padded batches, `model(input_ids[1, rows], position_ids=…)` packed ones;
    logits at padding are meaningless, as ever.
    Gradient checkpointing is used where the model has it on. Raises UnsupportedError for what is not proved.
    """
    if hasattr(model, _ATTRIBUTE):
        raise ConfigurationError("this model is inside deterministic_forward already")
    decoder = Decoder(model, dtype or next(model.parameters()).dtype)
    base, head = model.model, model.lm_head
    setattr(model, _ATTRIBUTE, decoder)
    base.forward = lambda *args, **kwargs: _base_forward(decoder, *args, **kwargs)
    head.forward = lambda x: _head_forward(decoder, x)
    try:
        yield model
    finally:
        del base.forward, head.forward
        delattr(model, _ATTRIBUTE)


def decoder_of(model: Any) -> Decoder:
    """The operators of a model inside `deterministic_forward`. Raises ConfigurationError outside."""
    decoder = getattr(model, _ATTRIBUTE, None)
    if decoder is None:
        raise ConfigurationError("call this inside `with deterministic_forward(model)`")
    return decoder


def logprobs(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    first: int | Sequence[int] = 1,
    temperature: float = 1.0,
) -> list[torch.Tensor]:
    """Log-probabilities of tokens given those before them, as the server gives them while it generates: the same bits.

    token_ids: prompt and answer of each sequence; first: index of the first token to score, at least 1, one for all or
    one for each (the prompt's length). Returns for each sequence its scores, [length - first] f32, with gradients.
    temperature: 1 gives the server's `raw_logprobs`; another its `processed_logprobs` at that temperature, without
    top-k or top-p.
    """
    decoder = decoder_of(model)
    packed = Packed.of_token_ids(token_ids, decoder.place)
    firsts = [first] * len(token_ids) if isinstance(first, int) else list(first)
    if len(firsts) != len(token_ids) or not all(1 <= f < len(ids) for f, ids in zip(firsts, token_ids, strict=True)):
        raise UnsupportedError("first: between 1 and length - 1 for each sequence")
    if not temperature > 0:
        raise UnsupportedError("temperature: must be above 0")
    flat = torch.tensor([token for ids in token_ids for token in ids], device=decoder.place)
    hidden = decoder(flat, packed)
    # Row r of a sequence gives the distribution of its token r + 1.
    kept = [torch.arange(rows.start + f - 1, rows.stop - 1) for rows, f in zip(packed.slices(), firsts, strict=True)]
    index = torch.cat(kept).to(decoder.place)
    scored = Packed(tuple(len(each) for each in kept), decoder.place)
    values = token_logprobs(
        hidden[index],
        decoder.head,
        flat[index + 1],
        scored,
        temperature,
        decoder.vocabulary,
        again=decoder.checkpointing,
    )
    return list(values.split(scored.lengths))


def _base_forward(
    decoder: Decoder,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    del use_cache  # nothing is kept: generation belongs to the server
    asked = [name for name in ("output_attentions", "output_hidden_states") if kwargs.get(name)]
    if input_ids is None or inputs_embeds is not None or past_key_values is not None or asked:
        raise UnsupportedError(
            f"inside deterministic_forward a model takes input_ids alone, without a cache{' or '.join(['', *asked])}"
        )
    batch, width = input_ids.shape
    flat = input_ids.flatten()
    if attention_mask is None and position_ids is not None and batch == 1:
        packed = Packed.of_positions(position_ids.flatten())
        hidden = decoder(flat, packed)
    else:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise UnsupportedError("attention_mask: [batch, width], one number for each token")
        packed, real = Packed.of_mask(mask)
        rows = decoder(flat[real], packed)
        hidden = rows.new_zeros(batch * width, rows.shape[1]).index_copy(0, real, rows)
    last: Any = hidden.view(batch, width, -1)
    return BaseModelOutputWithPast(last_hidden_state=last)


def _head_forward(decoder: Decoder, x: torch.Tensor) -> torch.Tensor:
    width = x.shape[-2] if x.ndim > 2 else x.shape[0]
    rows = x.reshape(-1, x.shape[-1]).to(decoder.dtype)
    (logits,) = decoder.head(rows, Packed((width,) * (len(rows) // width), decoder.place))
    return logits[:, : decoder.vocabulary].view(*x.shape[:-1], -1)
