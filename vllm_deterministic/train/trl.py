"""trl's GRPOTrainer on a deterministic sampler: answers from the sampler, scores with the sampler's arithmetic.

    trainer = GRPOTrainer(model, rollout_func=rollout(LiveServer(url)), ...)  # or rollout(LocalEngine(llm))
    with scoring(model):
        trainer.train()

`rollout_func` is trl's extension point for generation; for scores trl calls `model(..., fused_lm_head=True)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.train.patch import deterministic_forward, logprobs
from vllm_deterministic.train.sampler import Sampler
from vllm_deterministic.verify.probes import Probe

__all__ = ["rollout", "scoring"]


def rollout(sampler: Sampler) -> Callable[[list[Any], Any], dict[str, list[Any]]]:
    """A `rollout_func`: sends the weights where they have changed since the last time, then samples.

    The k-th answer to the same prompt in one step gets the k-th seed of that step: eight answers are eight, and a
    second run gets the same. trl's temperature, top_p, top_k, min_p and max_completion_length are used; raises
    UnsupportedError where the trainer asks for what a rollout does not pass on.
    """
    sent: list[int] = []

    def generate(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        args = trainer.args
        if args.repetition_penalty != 1.0 or args.generation_kwargs:
            raise UnsupportedError("rollout passes on temperature, top_p, top_k, min_p and max_completion_length alone")
        model = trainer.accelerator.unwrap_model(trainer.model)
        if sent != [trainer.state.global_step]:
            sampler.send_weights(model)
            sent[:] = [trainer.state.global_step]
        ids = [_ids(prompt, trainer.processing_class) for prompt in prompts]
        first = 10_000 * trainer.state.global_step + args.seed
        extra = {name: value for name in ("top_k", "min_p") if (value := getattr(args, name)) not in (None, 0, 0.0)}
        probes = [
            Probe(
                name=str(index),
                prompt=each,
                max_tokens=args.max_completion_length,
                temperature=args.temperature,
                top_p=args.top_p,
                seed=first + index,
                logprobs=0,
                extra_body=extra,
            )
            for index, each in enumerate(ids)
        ]
        answers = sampler.sample(probes)
        return {
            "prompt_ids": ids,
            "completion_ids": [list(answer.token_ids) for answer in answers],
            "logprobs": [list(answer.logprobs) for answer in answers],
        }

    return generate


def _ids(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


@contextlib.contextmanager
def scoring(model: Any, dtype: torch.dtype | None = None, temperature: float = 1.0) -> Iterator[Any]:
    """`deterministic_forward(model, dtype)` that also answers trl's call for log-probabilities, at this temperature.

    Enter it after the trainer has been made: trl puts a forward of its own into the model.
    """
    with deterministic_forward(model, dtype):
        theirs = model.__dict__.get("forward")
        inner = model.forward

        def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            return _scored(model, temperature, *args, **kwargs) if fused_lm_head else inner(*args, **kwargs)

        model.forward = forward
        try:
            yield model
        finally:
            del model.forward
            if theirs is not None:
                model.forward = theirs


class _Scores:
    """log_probs: [batch, width - 1], 0 where nothing was asked for; entropy: likewise, computed when it is read."""

    def __init__(self, log_probs: torch.Tensor, entropy: Callable[[], torch.Tensor]) -> None:
        self.log_probs, self._entropy = log_probs, entropy

    @property
    def entropy(self) -> torch.Tensor:
        return self._entropy()


def _scored(
    model: Any, temperature: float, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> _Scores:
    """The scores of the tokens whose label is not -100. All [batch, width]; padding may stand on both sides."""
    ids, first, places = [], [], []
    for row in range(len(input_ids)):
        real = attention_mask[row].nonzero().squeeze(1)
        asked = (labels[row] != -100).nonzero().squeeze(1)
        if len(real) == 0 or len(asked) == 0 or real[-1] - real[0] != len(real) - 1 or asked[-1] != real[-1]:
            raise UnsupportedError("each row must be one run of tokens, scored to its end")
        if asked[-1] - asked[0] != len(asked) - 1:
            raise UnsupportedError("each row's scored tokens must stand together")
        ids.append(input_ids[row, real].tolist())
        first.append(int(asked[0] - real[0]))
        places.append(row * (input_ids.shape[1] - 1) + asked - 1)
    index = torch.cat(places)

    def spread(values: torch.Tensor) -> torch.Tensor:
        flat = values.new_zeros(len(input_ids) * (input_ids.shape[1] - 1)).index_copy(0, index, values)
        return flat.view(len(input_ids), -1)

    @torch.no_grad()
    def entropy() -> torch.Tensor:
        logits = model(input_ids, attention_mask=attention_mask).logits[:, :-1]
        scores = (logits.flatten(0, 1)[index].float() / temperature).log_softmax(-1)
        return spread(-(scores.exp() * scores).sum(-1))

    return _Scores(spread(torch.cat(logprobs(model, ids, first, temperature))), entropy)
