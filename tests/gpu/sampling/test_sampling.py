"""Sampling on a real card: a row's threshold, token and scores do not see the batch; vLLM's own do."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.kernels.sampling import ahead, select  # noqa: E402
from vllm_deterministic.kernels.sampling.draw import draw  # noqa: E402
from vllm_deterministic.kernels.sampling.reference import gumbel, kept  # noqa: E402
from vllm_deterministic.kernels.sampling.scores import Scores  # noqa: E402

VOCAB = 151936  # Qwen3
LIMITS = [(VOCAB, 1.0), (20, 1.0), (VOCAB, 0.95), (50, 0.9), (1, 1.0), (VOCAB, 1e-6), (1000, 0.999), (VOCAB, 0.9999)]
KINDS = ["flat", "normal", "peaked", "ties", "masked", "equal"]
INF, NAN = float("inf"), float("nan")


def logits(kind: str, rows: int, vocab: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(11)
    normal = torch.randn(rows, vocab, generator=generator, device="cuda")
    return {
        "flat": normal * 0.01,
        "normal": normal,
        "peaked": normal * 6,
        "ties": (normal * 3).bfloat16().float(),
        "masked": torch.where(normal > 4.0, normal, -INF),
        "equal": torch.zeros_like(normal),
    }[kind]


def limits(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [LIMITS[row % len(LIMITS)] for row in range(rows)]
    k = torch.tensor([k for k, _ in pairs], dtype=torch.int32, device="cuda")
    return k, torch.tensor([p for _, p in pairs], device="cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept(kind: str) -> None:
    x, (k, p) = logits(kind, len(LIMITS)), limits(len(LIMITS))
    marked = torch.where(x == -INF, -1e30, x)
    found = (select.drop_below(marked, select.thresholds(x, k, p)) != -INF).cpu()
    for row, (limit, nucleus) in enumerate(LIMITS):
        alive = (x[row] > -INF).cpu()
        want = kept(x[row].cpu(), limit, float(p[row])) & alive
        found[row] &= alive
        if nucleus < 1.0:
            # The card's exp is good to 2 ulp: the nucleus may end a few tokens of that much mass earlier or later.
            mass = (x[row].double() - x[row].double().max()).exp().cpu()
            moved = float(mass[found[row] != want].sum() / mass[kept(x[row].cpu(), limit, 1.0)].sum())
            assert moved < 1e-5, (LIMITS[row], int(found[row].sum()), int(want.sum()))
        else:
            assert torch.equal(found[row], want), (LIMITS[row], int(found[row].sum()), int(want.sum()))


@pytest.mark.parametrize("kind", ["flat", "peaked", "ties"])
def test_thresholds_do_not_see_the_batch(kind: str) -> None:
    rows = 512
    x, (k, p) = logits(kind, rows), limits(rows)
    x[100], x[200, 7], x[300, 9] = NAN, NAN, INF
    among = select.thresholds(x, k, p)
    for size in (1, 2, 3, 31, 64, 65, 132, 133, 257):
        for start in (0, 96, 196, rows - size):
            part = slice(start, start + size)
            assert torch.equal(select.thresholds(x[part], k[part], p[part]), among[part]), (size, start)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).cuda()
    for _ in range(3):  # atomics arrive in another order every time
        assert torch.equal(select.thresholds(x[order], k[order], p[order]), among[order])
    # Other schedules of the same definition.
    for name, value in (("TILE", 2048), ("TILE", 8192), ("CAPACITY", 256)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(select, name, value)
            assert torch.equal(select.thresholds(x[:24], k[:24], p[:24]), among[:24]), name


def test_vllms_own_truncation_sees_the_batch() -> None:
    """The control: the same rows, 64 or 65 of them, by what is replaced."""
    ops = pytest.importorskip("vllm.v1.sample.ops.topk_topp_triton")
    x = logits("peaked", 65) / 6 * 2
    p = torch.full((65,), 0.9, device="cuda")
    few = ops.apply_top_k_top_p_triton(x[:64].clone(), None, p[:64])
    many = ops.apply_top_k_top_p_triton(x.clone(), None, p)
    moved = int(((few > -INF) != (many[:64] > -INF)).any(1).sum())
    print(f"vLLM: {moved} of 64 rows keep other tokens when a 65th joins")
    assert moved > 0


def state(rows: int) -> tuple[torch.Tensor, ...]:
    request = torch.arange(rows, device="cuda", dtype=torch.int32)
    temperature = torch.where(request % 5 == 0, 0.0, 0.8)
    seed = torch.arange(rows, device="cuda", dtype=torch.int64) * 2**33 - 12345
    return request, temperature, seed, torch.arange(rows, device="cuda") * 977


@pytest.mark.parametrize("kind", ["flat", "peaked", "ties"])
def test_draws_do_not_see_the_batch_or_the_dtype(kind: str) -> None:
    rows = 512
    x, (k, p) = logits(kind, rows).bfloat16(), limits(rows)
    request, temperature, seed, position = state(rows)
    x[100], x[200, 7], x[300, 9] = NAN, NAN, INF
    ranks = select.thresholds(x, k, p)
    among = draw(x, request, temperature, seed, position, ranks)
    assert torch.equal(draw(x.float(), request, temperature, seed, position, ranks), among)
    dropped = select.drop_below(x.float(), ranks)
    assert torch.equal(draw(dropped, request, temperature, seed, position), among)
    for size in (1, 7, 64, 65, 200):
        for start in (0, 97, rows - size):
            part = slice(start, start + size)
            mapped = request[part]  # the request's slot stays, its row moves
            assert torch.equal(draw(x[part], mapped, temperature, seed, position[part], ranks[part]), among[part])
    other = draw(x, request, temperature, seed + 1, position, ranks)  # the control: another seed
    assert not torch.equal(other, among)


def test_noise_is_the_references() -> None:
    rows = 64
    x = logits("normal", rows)
    request, temperature, seed, position = state(rows)
    tokens = draw(x, request, temperature, seed, position)
    for row in range(rows):
        noise = gumbel(int(seed[row]), int(position[row]), VOCAB) if temperature[row] else 0.0
        score = x[row].double().cpu() + noise
        # f32 noise: the winner may be beaten by less than its error.
        assert float(score.max() - score[tokens[row]]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "masked", "equal"])
def test_scores(kind: str, dtype: torch.dtype) -> None:
    rows = 130
    x = logits(kind, rows).to(dtype)
    x[100] = NAN
    sampled = (torch.arange(rows, device="cuda") * 1009) % VOCAB
    scores = Scores(x, sampled, 20)
    clean = x.float().nan_to_num(nan=-INF, posinf=INF, neginf=-INF)
    assert torch.equal(scores.best, clean.sort(descending=True, stable=True).indices[:, :20])
    assert torch.equal(scores.ranks, (clean >= clean.gather(1, sampled[:, None])).sum(1))
    ids = torch.cat((sampled[:, None], scores.best), dim=1)
    found = scores.logprobs(ids)
    exact = clean.double().log_softmax(-1).gather(1, ids)
    exact[(clean == -INF).all(1)] = -torch.tensor(float(VOCAB), dtype=torch.float64).log()  # nothing is left: all alike
    finite = exact > -INF
    assert ((found - exact).abs() <= 2e-6 * (1 + exact.abs()))[finite].all()
    assert torch.equal(found > -INF, finite)
    for size, n in ((1, 20), (1, 5), (64, 1), (129, 3)):
        alone = Scores(x[:size], sampled[:size], n)
        assert torch.equal(alone.best, scores.best[:size, :n])
        assert torch.equal(alone.logprobs(ids[:size, :n]), found[:size, :n])
        assert torch.equal(alone.ranks, scores.ranks[:size])
    # A neighbour that turns the logits into f32 changes no bit.
    assert torch.equal(Scores(x.float(), sampled, 20).logprobs(ids), found)
    assert torch.equal(Scores(x, sampled, 0).logprobs(ids), found)


def test_vllms_own_ties_and_sums_see_the_batch() -> None:
    """The control for scores: torch.topk's ties move with k, vLLM's sum with the logits' dtype."""
    logprob = pytest.importorskip("vllm.v1.worker.gpu.sample.logprob")
    x = logits("ties", 64)
    heads = [torch.topk(x, n).indices[:, :2] for n in (2, 3, 5, 8, 16, 20, 33)]
    sampled = torch.zeros(64, dtype=torch.int64, device="cuda")
    wide, narrow = (logprob.compute_topk_scores(y, 0, sampled).logprobs for y in (x, x.bfloat16()))
    ties, sums = sum(not torch.equal(head, heads[0]) for head in heads), int((wide != narrow).sum())
    print(
        f"vLLM: {ties} of 6 other k name other tokens first; {sums} of 64 logprobs differ between f32 and bf16 logits"
    )
    assert ties or sums


def test_what_was_compiled_ahead_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **said: compiled.append(str(said["repr"])))
    x = logits("normal", 40).half()  # which no other test samples from
    requests = torch.arange(40, dtype=torch.int32, device="cuda")
    state = (requests, torch.ones(40, device="cuda"), requests.long(), requests.long())
    ahead.draws(x[:2], *(of[:2] for of in state), greedy=torch.float16)
    ahead.scores(x[:2], state[2][:2])
    assert compiled
    compiled.clear()
    for rows in (1, 2, 8, 9, 40):
        k, p = limits(rows)
        for some in ((None, None), (k, None), (None, p), (k, p)):
            draw(x[:rows], requests[:rows], *state[1:3], state[3][:rows], select.thresholds(x[:rows], *some))
        for n in (0, 1, 5, 20):
            found = Scores(x[:rows], state[2][:rows], n)
            found.logprobs(torch.cat((state[2][:rows, None], found.best), dim=1))
    assert not compiled
    Scores(x[:2], state[2][:2], 60)  # the control: more logprobs than were compiled for are seen
    assert compiled
