"""A row's noise and truncation depend on that row alone."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from vllm_deterministic.kernels.sampling.noise import derive_seed, noise_seed  # noqa: E402
from vllm_deterministic.kernels.sampling.top import top_logprobs  # noqa: E402
from vllm_deterministic.kernels.sampling.truncate import top_k_top_p_by_row  # noqa: E402

VOCAB = 1000
# (k, p): none, each alone, both, and the edges k = 1 and a nucleus of one token.
LIMITS = [(VOCAB, 1.0), (20, 1.0), (VOCAB, 0.9), (50, 0.8), (1, 1.0), (VOCAB, 1e-6), (3, 0.999)]


def logits() -> torch.Tensor:
    rows = torch.randn(len(LIMITS), VOCAB, generator=torch.Generator().manual_seed(0)) * 4
    rows[:, 10] = rows[:, 11] = rows.max() + 1  # a tie at the top
    return rows


def test_a_row_alone_is_the_row_in_a_batch() -> None:
    k = torch.tensor([k for k, _ in LIMITS], dtype=torch.int32)
    p = torch.tensor([p for _, p in LIMITS])
    batch = top_k_top_p_by_row(logits(), k, p)
    for row in range(len(LIMITS)):
        alone = top_k_top_p_by_row(logits()[row : row + 1], k[row : row + 1], p[row : row + 1])
        assert torch.equal(alone[0], batch[row])


def test_vllms_own_truncation_depends_on_the_neighbours() -> None:
    """The control: the same check fails on the algorithm that is replaced."""
    ops = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    rows = torch.full((2, VOCAB), -200.0)
    rows[:, 0] = 0.0  # every other probability underflows
    k = torch.tensor([20, VOCAB], dtype=torch.int32)
    alone = ops.apply_top_k_top_p_pytorch(rows[:1].clone(), k[:1], None, allow_cpu_sync=True)
    p = torch.tensor([1.0, 0.9])
    among = ops.apply_top_k_top_p_pytorch(rows.clone(), k, p, allow_cpu_sync=True)
    assert not torch.equal(alone[0], among[0])


def test_truncation_keeps_what_it_says() -> None:
    row = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    kept = lambda k, p: (top_k_top_p_by_row(row.clone(), torch.tensor([k]), torch.tensor([p])) > -1e30)[0].tolist()  # noqa: E731
    assert kept(4, 0.7) == [True, True, False, False]
    assert kept(4, 0.4) == [True, False, False, False]
    assert kept(1, 0.99) == [True, False, False, False]
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(4, 1.0) == [True, True, True, True]


@pytest.mark.parametrize("k", [1, 2, 5, VOCAB - 1])
def test_ties_at_the_kth_logit_go_to_the_lower_token_ids(k: int) -> None:
    """Exactly k tokens stay, those that top_logprobs names, whatever the others are."""
    rows = logits().to(torch.bfloat16).float()  # bf16 makes many equal values
    rows[1] = 0.0
    rows[2, ::2] = -0.0
    rows[2, 1::2] = 0.0
    limits = torch.full((len(rows),), k)
    kept = top_k_top_p_by_row(rows.clone(), limits, None) > float("-inf")
    expected = torch.zeros_like(kept).scatter_(1, top_logprobs(rows, k)[1], True)
    assert torch.equal(kept, expected)
    # The nucleus' path: of k equal tokens each is needed for nearly all of their mass.
    nucleus = top_k_top_p_by_row(rows[1:2].clone(), limits[:1], torch.tensor([1 - 1e-6]))
    assert torch.equal(nucleus > float("-inf"), expected[1:2])
    # The control: what is kept by comparing with the k-th logit alone, as vLLM does, is more.
    compared = rows >= rows.topk(k).values[:, -1:]
    assert not torch.equal(compared, expected)


def test_masked_tokens_stay_masked() -> None:
    row = torch.tensor([[float("-inf"), 1.0, float("-inf"), 1.0, 1.0]])
    kept = [(top_k_top_p_by_row(row.clone(), torch.tensor([k]), None) > -1e30)[0].tolist() for k in (1, 2, 4)]
    assert [[at for at, stays in enumerate(one) if stays] for one in kept] == [[1], [1, 3], [1, 3, 4]]


def test_ties_in_the_nucleus_go_to_the_lower_token_id() -> None:
    row = torch.zeros(1, 8)
    kept = top_k_top_p_by_row(row, None, torch.tensor([0.5]))[0] > -1e30
    assert kept.tolist() == [True] * 4 + [False] * 4


def test_top_logprobs_of_a_smaller_k_are_the_head_of_a_larger_one() -> None:
    rows = logits().to(torch.bfloat16).float()  # bf16 makes many equal values
    rows[0, 5] = float("-inf")
    values, indices = top_logprobs(rows, 20)
    for k in (0, 1, 2, 7, 19):
        fewer = top_logprobs(rows, k)
        assert torch.equal(fewer[0], values[:, :k])
        assert torch.equal(fewer[1], indices[:, :k])
    assert torch.equal(values, torch.topk(rows, 20).values)
    assert indices[:, :2].tolist() == [[10, 11]] * len(rows)
    # The control: torch.topk promises no order among equals, and does not keep the one asserted here.
    assert not torch.equal(torch.topk(torch.zeros(1, VOCAB), 20).indices, top_logprobs(torch.zeros(1, VOCAB), 20)[1])


def test_noise_is_a_function_of_seed_and_position() -> None:
    seeds = {(seed, position): noise_seed(seed, position) for seed in (0, 1, 2, -5, 2**62) for position in range(200)}
    assert seeds[1, 7] == noise_seed(1, 7)
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= value < 2**63 for value in seeds.values())


def test_derived_seeds() -> None:
    assert derive_seed(0, b"a") == derive_seed(0, b"a")
    assert len({derive_seed(0, b"a"), derive_seed(1, b"a"), derive_seed(0, b"b")}) == 3
    assert 0 <= derive_seed(0, b"a") < 2**31


def test_gumbel_draw_of_a_row_does_not_see_the_batch() -> None:
    """vLLM's own kernel, which expands a row's seed into noise per token."""
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("the CPU kernel is in the CPU build only")
    platforms.current_platform.import_kernels()
    rows = logits()
    seeds = torch.arange(len(LIMITS)) + 5
    batch = torch.ops._C.fused_gumbel_argmax(rows, seeds)
    alone = torch.cat([torch.ops._C.fused_gumbel_argmax(rows[i : i + 1], seeds[i : i + 1]) for i in range(len(rows))])
    assert torch.equal(batch, alone)
    assert torch.ops._C.greedy_argmax(rows).tolist() == [10] * len(rows)
    assert len({int(torch.ops._C.fused_gumbel_argmax(rows[:1] * 0, torch.tensor([s]))) for s in range(50)}) > 25
