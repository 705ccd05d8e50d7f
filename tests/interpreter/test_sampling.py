"""The GPU's sampling kernels through Triton's interpreter: what is kept, drawn and scored, and that rows are alone."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from vllm_deterministic.kernels.sampling import draw as draw_module  # noqa: E402
from vllm_deterministic.kernels.sampling import scores as scores_module  # noqa: E402
from vllm_deterministic.kernels.sampling import select  # noqa: E402
from vllm_deterministic.kernels.sampling.draw import draw  # noqa: E402
from vllm_deterministic.kernels.sampling.reference import gumbel, kept  # noqa: E402
from vllm_deterministic.kernels.sampling.scores import Scores  # noqa: E402

VOCAB = 1301  # more than one of the small slices below, and no multiple of anything
INF, NAN = float("inf"), float("nan")
# (k, p): none, each alone, both, one token, nearly all.
LIMITS = [(VOCAB, 1.0), (20, 1.0), (VOCAB, 0.9), (50, 0.8), (1, 1.0), (700, 0.999)]


@pytest.fixture(autouse=True)
def _small_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules are free, and the interpreter is slow."""
    for module, name, value in (
        (select, "TILE", 2048),
        (select, "CHUNK", 512),
        (scores_module, "CHUNK", 512),
        (draw_module, "LANES", 512),
    ):
        monkeypatch.setattr(module, name, value)


def rows(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(len(LIMITS), VOCAB, generator=generator)
    return {
        "flat": normal * 0.01,
        "normal": normal,
        "peaked": normal * 6,
        "ties": (normal * 4).to(torch.bfloat16).float(),
        "equal": torch.zeros_like(normal),
        "masked": torch.where(normal > 2.3, normal, -INF),
        "poison": torch.where(normal > 3, NAN, torch.where(normal < -3, INF, normal)),
    }[kind]


def limits() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([k for k, _ in LIMITS], dtype=torch.int32), torch.tensor([p for _, p in LIMITS])


def kept_by_kernel(x: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    marked = torch.where(x == -INF, -1e30, x)  # so that a dropped logit can be told from one that was -inf
    return select.drop_below(marked, select.thresholds(x, k, p)) != -INF


@pytest.mark.parametrize(
    ("kind", "capacity"),
    [*((kind, select.CAPACITY) for kind in ("flat", "peaked", "ties", "equal", "masked")), ("ties", 2)],
)
def test_what_is_kept(kind: str, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "CAPACITY", capacity)  # 2: the row is searched instead of the gathered tokens
    x, (k, p) = rows(kind), limits()
    found = kept_by_kernel(x, k, p)
    for row, (limit, _) in enumerate(LIMITS):
        want = kept(x[row], limit, float(p[row]))
        alive = x[row] > -INF
        assert torch.equal(found[row] & alive, want & alive), (LIMITS[row], int(found[row].sum()), int(want.sum()))


def test_a_row_alone_is_the_row_in_a_batch() -> None:
    x, (k, p) = rows("ties").half(), limits()
    x[0], x[2, 7], x[5, 9] = NAN, NAN, INF
    among = select.thresholds(x, k, p)
    turned = select.thresholds(x.flip(0), k.flip(0), p.flip(0)).flip(0)
    assert torch.equal(among, turned)
    for row in (1, 3, 5):
        assert torch.equal(select.thresholds(x[row : row + 1], k[row : row + 1], p[row : row + 1])[0], among[row])
    # Whether a neighbour brings the other kind of limit does not matter either.
    assert torch.equal(select.thresholds(x[:2], k[:2], None), among[:2])
    assert torch.equal(select.thresholds(x[2:3], None, p[2:3]), among[2:3])


def test_the_threshold_is_the_rank_of_the_last_kept_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not merely a number below it: then it is the same however the bracket was drawn."""
    x, (k, p) = rows("ties"), limits()
    found = select.thresholds(x, k, p)
    for name, value in (("TILE", 1024), ("FEW_ROWS", 0), ("TILE", 512)):  # finer slices, coarser bins, both
        monkeypatch.setattr(select, name, value)
        assert torch.equal(select.thresholds(x, k, p), found), name
    assert found[0] == 0  # without limits
    for row, (limit, _) in list(enumerate(LIMITS))[1:]:
        tokens = kept(x[row], limit, float(p[row])).nonzero()[:, 0]
        last = tokens[x[row, tokens] == x[row, tokens].min()].max()
        key = x[row, last].view(torch.int32).long()
        key = (key if key >= 0 else key ^ 0x7FFFFFFF) + 2**31
        assert found[row] == (key << 20) + (2**20 - 1 - last)


def test_neighbouring_ranks_are_told_apart() -> None:
    """Equal logits of neighbouring tokens: as many ranks in a row, where a search that skips one keeps one too many."""
    counts = [2, 3, 8, 9, 10, 64, 65, 66, 73, 129]
    x = torch.full((len(counts), VOCAB), -INF)
    for row, count in enumerate(counts):
        x[row, :count] = 1.5
    k = torch.tensor([1] * len(counts), dtype=torch.int32)
    kept_tokens = (select.drop_below(x.clone(), select.thresholds(x, k, None)) > -INF).sum(1)
    assert kept_tokens.tolist() == [1] * len(counts)


def test_the_order_of_a_float_sum_would_be_seen() -> None:
    """The control: masses in f32, added up in another order, move the nucleus."""
    x = rows("normal")[:1].sort(descending=True).values
    mass = (x - x.max()).exp()
    totals = {float(part.sum(-1).sum()) for part in (mass.view(1, -1), mass[:, :1300].view(50, 26), mass.flip(1))}
    assert len(totals) > 1


def draws(x: torch.Tensor, seeds: list[int], positions: list[int], temperature: float = 1.0) -> torch.Tensor:
    count = len(seeds)
    hot = torch.full((count,), temperature)
    return draw(x, torch.arange(count), hot, torch.tensor(seeds), torch.tensor(positions))


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    x = rows("normal")
    cases = [(0, 0), (1, 0), (0, 1), (2**31 - 1, 131071), (-5, 7), (2**62 + 3, 2**33)]
    seeds, positions = [seed for seed, _ in cases], [position for _, position in cases]
    tokens = draws(x, seeds, positions)
    want = [int((x[i].double() + gumbel(seed, place, VOCAB)).argmax()) for i, (seed, place) in enumerate(cases)]
    assert tokens.tolist() == want
    assert len(set(tokens.tolist())) > 4
    # Elsewhere in the batch, alone, and among fewer tokens: the same noise. With another seed: another token.
    assert torch.equal(draws(x.flip(0), seeds[::-1], positions[::-1]).flip(0), tokens)
    for row in (0, 3, 5):
        assert draws(x[row : row + 1], seeds[row : row + 1], positions[row : row + 1])[0] == tokens[row]
    assert not torch.equal(draws(x, seeds[::-1], positions), tokens)
    fewer = x.clone()
    fewer[:, ::3] = -INF
    want = [int((fewer[i].double() + gumbel(seed, place, VOCAB)).argmax()) for i, (seed, place) in enumerate(cases)]
    assert draws(fewer, seeds, positions).tolist() == want


def test_the_noise_draws_from_the_softmax() -> None:
    """On the reference's noise, which the kernel's was compared with above."""
    x = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 0.5, 0.5, -8.0], dtype=torch.float64)
    count = 8000
    tokens = torch.stack([(x + gumbel(seed, seed % 7, 8)).argmax() for seed in range(count)])
    expected = x.softmax(0) * count
    chi = (((tokens.bincount(minlength=8) - expected) ** 2) / expected).sum()
    assert chi < 24.3  # 7 degrees of freedom: exceeded by 1 in 1000


def test_truncation_and_draw_meet() -> None:
    x, (k, p) = rows("peaked"), limits()
    ranks = select.thresholds(x, k, p)
    count = len(LIMITS)
    request, hot, seed, place = torch.arange(count), torch.ones(count), torch.arange(count), torch.arange(count)
    lazily = draw(x, request, hot, seed, place, ranks)
    assert torch.equal(lazily, draw(select.drop_below(x.clone(), ranks), request, hot, seed, place))
    assert torch.equal(lazily[4], x[4].argmax())


def test_greedy_ties_go_to_the_lower_token_id() -> None:
    x = rows("ties")
    x[:, 1299] = x[:, 17] = x.max() + 1
    x[2] = -INF
    x[3, 40] = NAN
    greedy = draws(x, [1] * len(x), [1] * len(x), temperature=0.0)
    assert greedy.tolist() == [17, 17, 0, 17, 17, 17]


@pytest.mark.parametrize(("kind", "n"), [("normal", 1), ("ties", 0), ("ties", 5), ("masked", 20)])
def test_scores(n: int, kind: str) -> None:
    x = rows(kind)
    sampled = x.argsort(descending=True, stable=True)[torch.arange(len(x)), torch.arange(len(x)) * 3]
    scores = Scores(x, sampled, n)
    assert torch.equal(scores.best, torch.sort(x, descending=True, stable=True).indices[:, :n])
    assert torch.equal(scores.ranks, (x >= x.gather(1, sampled[:, None])).sum(1))
    ids = torch.cat((sampled[:, None], scores.best), dim=1)
    exact = x.double().log_softmax(-1).gather(1, ids)
    finite = exact > -INF
    found = scores.logprobs(ids)
    # exp and log: 2 ulp each; the mass of a token is cut by at most 2^-44, of up to 2^18 of them.
    assert ((found - exact).abs() <= 1e-6 * (1 + exact.abs()))[finite].all()
    assert (found[~finite] == -INF).all()
    for row in range(0, len(x), 3):
        alone = Scores(x[row : row + 1], sampled[row : row + 1], min(n + 2, 20))
        assert torch.equal(alone.best[0, :n], scores.best[row])
        assert torch.equal(alone.logprobs(ids[row : row + 1])[0], found[row])


def test_more_tokens_than_a_kernel_sorts() -> None:
    x = rows("ties")[:2]
    everything = Scores(x, torch.zeros(2, dtype=torch.int64), VOCAB).best
    assert torch.equal(everything, torch.sort(x, descending=True, stable=True).indices)
    assert torch.equal(Scores(x, torch.zeros(2, dtype=torch.int64), 20).best, everything[:, :20])


def test_layouts_that_are_not_covered() -> None:
    with pytest.raises(ValueError, match="strides"):
        select.thresholds(torch.zeros(4, 8).t(), torch.ones(8, dtype=torch.int32), None)
