"""The GPU sampler's adapter, called as vLLM's V2 runner calls it, its kernels through Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("vllm.v1.worker.gpu.sample.sampler")

from vllm.v1.worker.gpu.sample import prompt_logprob, sampler  # noqa: E402
from vllm_deterministic.kernels.sampling.reference import kept  # noqa: E402

from vllm_deterministic.errors import UnsupportedError  # noqa: E402
from vllm_deterministic.integration import gpu_sampler  # noqa: E402

ROWS, VOCAB = 3, 300
LIMITS = [(VOCAB, 1.0), (20, 1.0), (VOCAB, 0.9)]


@pytest.fixture(autouse=True)
def _armed(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        (sampler.Sampler, "_sample_random"),
        (sampler, "compute_topk_scores"),
        (prompt_logprob, "compute_topk_scores"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    monkeypatch.setattr(gpu_sampler, "_warmed", set())
    config = SimpleNamespace(use_v2_model_runner=True, model_config=SimpleNamespace(dtype=torch.bfloat16))
    for _ in range(2):
        gpu_sampler.arm(config)


def vllms_sampler(mode: str, temperatures: list[float]) -> sampler.Sampler:
    """vLLM's sampler with the state of `temperatures` requests, which its constructor would put on a card."""
    one = object.__new__(sampler.Sampler)
    one.logprobs_mode, one.return_sampling_mask = mode, False
    states = SimpleNamespace(gpu=torch.tensor(temperatures)), SimpleNamespace(gpu=torch.arange(len(temperatures)))
    one.sampling_states = SimpleNamespace(temperature=states[0], seeds=states[1])
    return one


@pytest.mark.parametrize("arguments", [(True,), (False, False)], ids=["0.32", "0.33"])
def test_draw(arguments: tuple[bool, ...]) -> None:
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    k = torch.tensor([k for k, _ in LIMITS], dtype=torch.int32)
    p = torch.tensor([p for _, p in LIMITS])
    rows = torch.arange(ROWS, dtype=torch.int32)
    for mode in ("raw_logprobs", "processed_logprobs"):
        work = logits.clone()
        call = vllms_sampler(mode, [0.0, 1.0, 1.0])._sample_random
        tokens, processed = call(work, rows, rows.numpy(), torch.arange(ROWS), k, p, *arguments)
        for row, (limit, _) in enumerate(LIMITS):
            keeps = kept(logits[row], limit, float(p[row]))
            assert keeps[tokens[row]]
            if mode == "processed_logprobs":
                assert torch.equal(processed[row] > float("-inf"), keeps)
        assert tokens[0] == logits[0].argmax()
        if mode == "raw_logprobs":
            assert torch.equal(processed, logits)
            # Without limits, and in the model's dtype: the draw of a row that has none is the same.
            alone = call(logits[:1].half(), rows[:1], rows[:1].numpy(), torch.arange(1), None, None, *arguments)[0]
            assert alone == logits[0].half().argmax()


@pytest.mark.parametrize("module", [sampler, prompt_logprob])
def test_scores(module: object) -> None:
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1))
    sampled = torch.tensor([5, 6, 7])
    found = module.compute_topk_scores(logits, 4, sampled)  # type: ignore[attr-defined]
    want = logits.log_softmax(-1)
    assert torch.equal(found.logprob_token_ids[:, 0], sampled)
    assert torch.equal(found.logprob_token_ids[:, 1:], logits.topk(4).indices)
    assert (found.logprobs - want.gather(1, found.logprob_token_ids)).abs().max() < 2e-6
    assert torch.equal(found.selected_token_ranks, (logits >= logits.gather(1, sampled[:, None])).sum(1))
    raw = module.compute_topk_scores(logits, 4, sampled, logits_mode=True)  # type: ignore[attr-defined]
    assert torch.equal(raw.logprobs, logits.gather(1, raw.logprob_token_ids))


def test_the_v1_runner_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="VLLM_USE_V2_MODEL_RUNNER"):
        gpu_sampler.arm(SimpleNamespace(use_v2_model_runner=False))


def test_only_before_requests_are_served_is_anything_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, torch.dtype, bool]] = []
    draw = gpu_sampler.ahead.draw

    def counted(x: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
        drawn.append((len(x), x.dtype, len(state) > 4 and state[4] is not None))
        return draw(x, *state)

    monkeypatch.setattr(gpu_sampler.ahead, "draw", counted)
    logits, rows = torch.randn(ROWS, VOCAB), torch.arange(ROWS, dtype=torch.int32)
    sample = vllms_sampler("raw_logprobs", [0.0, 1.0, 1.0])._sample_random
    arguments = (logits, rows, rows.numpy(), torch.arange(ROWS), None, None, True)
    tokens = [sample(*arguments)[0] for _ in range(2)]
    limits = [(torch.float32, False), *[(torch.float32, True)] * 3, (torch.bfloat16, False)]
    assert drawn == [(rows, *limit) for rows in (1, 9) for limit in limits]
    gpu_sampler.serve()
    tokens.append(sample(arguments[0].half(), *arguments[1:])[0])
    assert len(drawn) == 10
    assert torch.equal(tokens[0], tokens[1])
