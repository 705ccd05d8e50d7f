"""The trainer's forward pass: one row's bits, however the batch is put together. Whether they are the server's is
asked of a server in test_served.py."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

pytest.importorskip("vllm")
from vllm_deterministic.errors import ConfigurationError, UnsupportedError
from vllm_deterministic.train import deterministic_forward, logprobs
from vllm_deterministic.train.patch import decoder_of

pytestmark = pytest.mark.usefixtures("one_thread")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def padded(sequences, left):
    width = max(map(len, sequences))
    ids, mask = torch.zeros(2, len(sequences), width, dtype=torch.long)
    for row, each in enumerate(sequences):
        place = slice(width - len(each), width) if left else slice(0, len(each))
        ids[row, place], mask[row, place] = torch.tensor(each), 1
    return ids, mask


@dtypes
@torch.no_grad()
def test_any_batch_gives_the_same_bits(family, dtype, sequences, make):
    with deterministic_forward(make(family, dtype)) as model:
        alone = [logprobs(model, [ids])[0] for ids in sequences]
        for size in (2, 3, len(sequences)):
            for start in range(0, len(sequences), size):
                together = logprobs(model, sequences[start : start + size])
                assert all(map(torch.equal, together, alone[start : start + size]))


@dtypes
@torch.no_grad()
def test_padded_and_packed_batches_give_the_same_bits(family, dtype, sequences, make):
    with deterministic_forward(make(family, dtype)) as model:
        expected = [model(torch.tensor([ids])).logits[0] for ids in sequences]
        for left in (True, False):
            ids, mask = padded(sequences, left)
            logits = model(ids, attention_mask=mask).logits
            assert all(
                torch.equal(row[real.bool()], one) for row, real, one in zip(logits, mask, expected, strict=True)
            )
        flat = torch.tensor([[token for ids in sequences for token in ids]])
        positions = torch.cat([torch.arange(len(ids)) for ids in sequences])[None]
        packed = model(flat, position_ids=positions).logits[0]
        assert torch.equal(packed, torch.cat(expected))


@torch.no_grad()
def test_threads_change_no_bit(sequences, make):
    with deterministic_forward(make("Llama")) as model:
        expected = logprobs(model, sequences)
        torch.set_num_threads(2)
        try:
            assert all(map(torch.equal, logprobs(model, sequences), expected))
        finally:
            torch.set_num_threads(1)


@torch.no_grad()
def test_without_the_cure_the_batch_matters(sequences, make):
    """The negative control: transformers' own forward of the same rows."""
    model = make("Llama", torch.bfloat16)
    ids, mask = padded(sequences, left=False)
    together = model(ids, attention_mask=mask).logits
    alone = [model(torch.tensor([each])).logits[0] for each in sequences]
    assert not all(torch.equal(row[: len(one)], one) for row, one in zip(together, alone, strict=True))


@torch.no_grad()
def test_the_model_is_the_model(family, sequences, make, plain_logprobs):
    """Against transformers in f64: in the mean of all logprobs no further away than twice transformers' own f32."""
    model = make(family)
    double = copy.deepcopy(model).double()
    exact, theirs = (torch.cat([plain_logprobs(each, ids) for ids in sequences]) for each in (double, model))
    with deterministic_forward(model):
        ours = torch.cat(logprobs(model, sequences))
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@torch.no_grad()
def test_scores_begin_where_asked_and_know_the_temperature(sequences, make):
    with deterministic_forward(make("Llama")) as model:
        whole = logprobs(model, sequences)
        firsts = [len(ids) - 1 for ids in sequences]
        assert all(torch.equal(a[-1:], b) for a, b in zip(whole, logprobs(model, sequences, firsts), strict=True))
        (hot,) = logprobs(model, [sequences[0]], temperature=2.0)
        logits = model(torch.tensor([sequences[0]])).logits[0, :-1] / 2
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(sequences[0][1:])[:, None]).squeeze(1)
        assert torch.equal(hot, expected)


def test_afterwards_the_model_is_as_before(sequences, make, plain_logprobs):
    model = make("Llama")
    before = plain_logprobs(model, sequences[1])
    with deterministic_forward(model), pytest.raises(ConfigurationError, match="already"), deterministic_forward(model):
        pass
    assert torch.equal(plain_logprobs(model, sequences[1]), before)
    with pytest.raises(ConfigurationError, match="inside"):
        logprobs(model, sequences)


def test_nothing_of_it_stays_in_memory(sequences, make):
    """Packed weights are as large as the model: they must not wait for the garbage collector."""
    model = make("Llama")
    gc.disable()
    try:
        with deterministic_forward(model):
            kept = weakref.ref(decoder_of(model))
            sum(each.sum() for each in logprobs(model, sequences)).backward()
        assert kept() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_new_weights_are_seen(sequences, make):
    model = make("Llama")
    with deterministic_forward(model):
        (before,) = logprobs(model, sequences[1:2])
        model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)  # which raises no version
        (after,) = logprobs(model, sequences[1:2])
    with deterministic_forward(copy.deepcopy(model)) as fresh:
        assert torch.equal(after, logprobs(fresh, sequences[1:2])[0])
    assert not torch.equal(after, before)


def test_what_is_not_proved_is_refused(sequences, make):
    model = make("Llama")
    with deterministic_forward(model):
        ids = torch.tensor([sequences[0]])
        for wrong in (
            {"inputs_embeds": torch.zeros(1, 2, 128)},
            {"input_ids": ids, "attention_mask": torch.tensor([[1, 0, 1, 1, 1]])},
            {"input_ids": ids, "position_ids": torch.tensor([[3, 4, 5, 6, 7]])},
            {"input_ids": ids, "output_hidden_states": True},
        ):
            with pytest.raises(UnsupportedError):
                model(**wrong)
        for wrong_ids, first in (([[]], 1), ([[1]], 1), ([[1, 2]], 0), ([[1, 2]], 2)):
            with pytest.raises(UnsupportedError):
                logprobs(model, wrong_ids, first)
        with pytest.raises(UnsupportedError, match="temperature"):
            logprobs(model, [[1, 2]], temperature=0)
    model.config.hidden_act = "gelu"
    with pytest.raises(UnsupportedError, match="gelu"), deterministic_forward(model):
        pass
    with pytest.raises(UnsupportedError, match="float16"), deterministic_forward(make("Llama", torch.float16)):
        pass
    with pytest.raises(UnsupportedError, match="Linear"), deterministic_forward(torch.nn.Linear(2, 2)):
        pass
