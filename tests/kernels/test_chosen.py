"""The chosen tokens' logprobs have the bits of those that are computed with the whole vocabulary's."""

from __future__ import annotations

import pickle

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.kernels.sampling import chosen  # noqa: E402
from vllm_deterministic.kernels.sampling.chosen import chosen_logprobs, likeliest  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
# Fewer than a vector, whole vectors and what is left of them, a model's vocabulary.
WIDTHS = [2, 15, 64, 1001, 49152]


def hard(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of other spreads, with masked tokens, ties, an infinity and a NaN; and a token of each."""
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(rows, width, generator=generator) * torch.logspace(-2, 2, rows).unsqueeze(-1)
    logits[1, : width // 2] = float("-inf")
    logits[2, ::2] = logits[2, 0]
    logits[3, width // 3], logits[4, width // 3] = float("inf"), float("nan")
    return logits.to(dtype), torch.randint(width, (rows,), generator=generator)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_bits_are_log_softmaxs(width: int, dtype: torch.dtype) -> None:
    logits, tokens = hard(19, width, dtype)
    logprobs, ranks = chosen_logprobs(logits, tokens)
    everything = logits.log_softmax(-1, dtype=torch.float32)
    expected = everything.gather(-1, tokens.unsqueeze(-1))
    numbers = ~expected.isnan().squeeze(-1)
    assert numbers.sum() >= 15
    assert same_bits(logprobs[numbers], expected.squeeze(-1)[numbers])
    assert logprobs[~numbers].isnan().all()
    assert torch.equal(ranks, (everything >= expected).sum(-1))
    # The control: another order of the sum is seen.
    other = (logits.double() - logits.double().logsumexp(-1, keepdim=True)).gather(-1, tokens.unsqueeze(-1)).float()
    assert width < 1000 or not same_bits(other.squeeze(-1)[numbers], logprobs[numbers])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_likeliest_is_the_first_of_the_largest(width: int, dtype: torch.dtype) -> None:
    logits = hard(19, width, dtype)[0]
    assert likeliest(logits) is None  # rows 3 and 4 are no numbers
    logits = torch.cat((logits[:3], logits[5:], -logits[5:].abs(), torch.zeros(1, width, dtype=dtype)))
    logits[-1, ::3] *= -1.0  # both zeros are as large
    logits[5, [width // 2, width - 1]] = logits[5].max() + 1
    logits[7] *= 1e-30  # all of them as likely, once rounded
    found = likeliest(logits)
    assert found is not None
    tokens, logprobs, ranks = found
    assert torch.equal(tokens, logits.argmax(-1))
    everything = logits.log_softmax(-1, dtype=torch.float32)
    expected = everything.gather(-1, tokens.unsqueeze(-1))
    assert same_bits(logprobs, expected.squeeze(-1))
    assert torch.equal(ranks, (everything >= expected).sum(-1))
    assert len(set(ranks.tolist())) > 2 or width == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_the_row_in_a_batch(dtype: torch.dtype) -> None:
    logits, tokens = hard(19, 5003, dtype)
    logprobs, ranks = chosen_logprobs(logits, tokens)
    for row in {*range(19)} - {3, 4}:  # those are NaN
        alone = chosen_logprobs(logits[row : row + 1], tokens[row : row + 1])
        assert same_bits(alone[0], logprobs[row : row + 1])
        assert torch.equal(alone[1], ranks[row : row + 1])


def test_other_bits_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check at the start is for: a C++ operator that adds up in another order is left alone."""

    def operator(logprobs: torch.Tensor, tokens: torch.Tensor) -> tuple[chosen.Scores, bool]:
        tokens[tokens < 0] = logprobs.argmax(-1)[tokens < 0]
        values = logprobs.gather(-1, tokens.unsqueeze(-1))
        return (values.squeeze(-1), (logprobs >= values).sum(-1)), not bool(values.isnan().any())

    assert chosen.agrees(lambda logits, tokens: operator(logits.log_softmax(-1, torch.float32), tokens))
    assert not chosen.agrees(lambda logits, tokens: operator(logits.double().log_softmax(-1).float(), tokens))
    native = chosen.compiled()
    assert native is not None
    assert chosen.agrees(native)
    monkeypatch.setattr(chosen, "compiled", lambda: None)
    logits, tokens = hard(19, 1001, torch.bfloat16)
    by_pytorch = chosen_logprobs(logits, tokens)
    assert likeliest(logits[:3]) is None
    monkeypatch.undo()
    numbers = ~by_pytorch[0].isnan()
    assert same_bits(chosen_logprobs(logits, tokens)[0][numbers], by_pytorch[0][numbers])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_vllms_sampler_gives_the_same_for_less(dtype: torch.dtype, temperature: float) -> None:
    """Tokens, logprobs and ranks of vLLM's sampler, as it is and with the seam; it overwrites f32 logits."""
    sampling = pytest.importorskip("vllm.v1.sample.sampler")
    if not pytest.importorskip("vllm.platforms").current_platform.is_cpu():
        pytest.skip("the CPU runner's sampler")
    from vllm.platforms import current_platform
    from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    from vllm_deterministic.integration import sampler

    current_platform.import_kernels()
    logits = hard(5, 1001, dtype)[0][:3]
    logits[0, [7, 900]] = logits[0].max()  # a tie
    greedy, nothing = temperature == 0, torch.empty(0)
    metadata = SamplingMetadata(
        temperature=None if greedy else torch.full((3,), temperature), all_greedy=greedy, all_random=not greedy,
        top_p=None, top_k=None, generators={}, max_num_logprobs=0, no_penalties=True, prompt_token_ids=None,
        frequency_penalties=nothing, presence_penalties=nothing, repetition_penalties=nothing,
        output_token_ids=[[]] * 3, allowed_token_ids_mask=None, bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )  # fmt: skip
    theirs = sampling.Sampler()
    theirs.topk_topp_sampler.forward = lambda *args: sampler._sample(theirs.topk_topp_sampler, *args)
    mine = theirs(logits.clone(), metadata)
    forward = sampler._no_others(sampling.Sampler.forward)
    ours = forward(theirs, logits.clone(), metadata)
    assert torch.equal(ours.sampled_token_ids, mine.sampled_token_ids)
    for name in ("logprob_token_ids", "logprobs", "selected_token_ranks"):
        one, other = (getattr(output.logprobs_tensors, name) for output in (ours, mine))
        assert one.dtype == other.dtype, name
        assert one.shape == other.shape, name
        assert torch.equal(one, other), name
    # And as they reach the engine's process.
    read = pickle.loads(pickle.dumps(ours.logprobs_tensors.tolists()))
    assert type(read) is type(mine.logprobs_tensors.tolists())
    for one, other in zip(read[:3], mine.logprobs_tensors.tolists()[:3], strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    # A processor that changes what is likeliest, or may: vLLM's sampler sees to it.
    assert sampler._takes_the_likeliest(metadata) == greedy
    bias = LogitBiasLogitsProcessor(None, torch.device("cpu"), False)
    metadata.logitsprocs = LogitsProcessors([bias])
    assert sampler._takes_the_likeliest(metadata) == greedy
    bias.biases = {0: {5: 100.0}}
    bias.bias_tensor, bias.logits_slice = torch.tensor([100.0]), (torch.tensor([0]), torch.tensor([5]))
    assert not sampler._takes_the_likeliest(metadata)
    if greedy:
        assert forward(theirs, logits.clone(), metadata).sampled_token_ids[0, 0] == 5
