"""The backward pass: the same bits whenever it runs and however the batch is cut, and a true gradient."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("vllm")
from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.train import accumulate, deterministic_forward, logprobs

pytestmark = pytest.mark.usefixtures("one_thread")
# A product is one chain over k here; where a library sums in 16 vector lanes, errors are a root of 16 smaller.
A_CHAIN = 4


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def advantage(ids):
    """Something that weighs sequences differently and depends on the sequence alone."""
    return (sum(ids) % 7 - 3.3) / len(ids)


def summed(model, sequences, micro_batch):
    accumulate(model, sequences, lambda i, scores: scores.sum() * advantage(sequences[i]), micro_batch=micro_batch)
    return gradients(model)


@pytest.mark.parametrize(
    ("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, True)], ids=["f32-untied", "bf16-tied"]
)
def test_micro_batches_and_their_order_change_no_bit(family, tied, dtype, sequences, make):
    with deterministic_forward(make(family, dtype, tied)) as model:
        expected = summed(model, sequences, 1)
        for size in (2, 3, len(sequences)):
            assert same(summed(model, sequences, size), expected)
        assert same(summed(model, sequences[::-1], 3), expected)
        assert all(value.abs().sum() > 0 for value in expected.values())


def test_without_the_fold_micro_batches_matter(sequences, make):
    """The negative control: ordinary accumulation adds sums of micro-batches."""
    with deterministic_forward(make("Llama")) as model:
        results = []
        for size in (1, 3):
            for start in range(0, len(sequences), size):
                part = sequences[start : start + size]
                sum(s.sum() * advantage(ids) for s, ids in zip(logprobs(model, part), part, strict=True)).backward()
            results.append(gradients(model))
        assert not same(*results)


def test_checkpointing_changes_no_bit(family, sequences, make):
    model = make(family).train()
    with deterministic_forward(model):
        expected = summed(model, sequences, 3)
        model.gradient_checkpointing_enable()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            assert same(summed(model, sequences, 3), expected)
    kept = sum(saved)
    model.gradient_checkpointing_disable()
    saved.clear()
    with (
        deterministic_forward(model),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
    ):
        summed(model, sequences, 3)
    assert kept < sum(saved)


@pytest.mark.parametrize(
    ("dtype", "tied"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=["untied", "tied", "bf16"],
)
def test_the_gradient_is_the_gradient(family, dtype, tied, sequences, make, plain_logprobs):
    """Against transformers' own in f64: no further away than A_CHAIN times transformers' own in that dtype, every
    parameter."""
    model = make(family, dtype, tied)
    double = copy.deepcopy(model).double()
    for each in (model, double):
        sum(plain_logprobs(each, ids).sum() * advantage(ids) for ids in sequences).backward()
    theirs, exact = gradients(model), gradients(double)
    with deterministic_forward(model):
        ours = summed(model, sequences, 3)
        sum(s.sum() * advantage(ids) for s, ids in zip(logprobs(model, sequences), sequences, strict=True)).backward()
        through_autograd = gradients(model)
    for name, truth in exact.items():

        def error(found, name=name, truth=truth):
            return ((found[name] - truth).norm() / truth.norm()).item()

        assert max(error(ours), error(through_autograd)) <= A_CHAIN * error(theirs) + torch.finfo(dtype).eps / 2, name


def test_gradients_through_the_models_own_call(sequences, make):
    """What a training library does: padded batch, logits, its own loss."""
    model = make("Qwen3")
    ids, mask = torch.tensor([sequences[0] + [0] * 3, sequences[3][:8]]), torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
    labels = ids.masked_fill(mask == 0, -100)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    theirs = gradients(model)
    with deterministic_forward(model):
        runs = []
        for _ in range(2):
            model(ids, attention_mask=mask, labels=labels).loss.backward()
            runs.append(gradients(model))
    assert same(*runs)
    assert all(torch.allclose(runs[0][name], theirs[name], atol=1e-5, rtol=1e-4) for name in theirs)


def test_wide_parameters_behind_a_narrow_server(sequences, make):
    """f32 parameters, a bf16 forward: gradients arrive in f32, unrounded."""
    narrow = make("Llama", torch.bfloat16)
    wide = copy.deepcopy(narrow).float()
    with deterministic_forward(narrow), deterministic_forward(wide, torch.bfloat16), torch.no_grad():
        assert all(map(torch.equal, logprobs(narrow, sequences), logprobs(wide, sequences)))
    with deterministic_forward(narrow), deterministic_forward(wide, torch.bfloat16):
        rounded, full = summed(narrow, sequences, 2), summed(wide, sequences, 2)
    assert all(full[name].dtype == torch.float32 and torch.equal(full[name].bfloat16(), rounded[name]) for name in full)


def test_a_frozen_parameter_gets_no_gradient_and_an_error_adds_none(sequences, make):
    model = make("Llama")
    model.model.embed_tokens.weight.requires_grad_(False)

    def failing(index, scores):
        raise ArithmeticError

    with deterministic_forward(model):
        with pytest.raises(ArithmeticError):
            accumulate(model, sequences, failing)
        assert all(parameter.grad is None for parameter in model.parameters())
        with pytest.raises(UnsupportedError):
            accumulate(model, sequences, failing, micro_batch=0)
        accumulate(model, sequences, lambda i, scores: scores.sum())
    assert model.model.embed_tokens.weight.grad is None
    assert model.lm_head.weight.grad is not None
