"""Gradients on a real card: the sums' bits against a plain kernel on the same chain, cut and moved, with controls."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

import sequences  # noqa: E402
from sequences import spans  # noqa: E402
from vllm_deterministic.kernels import gradients  # noqa: E402

QWEN3_8B = [(4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288), (151936, 4096)]
ODD = [(1000, 517), (77, 4096)]  # not of whole tiles, nor of whole multiples of 16 bytes
random = functools.partial(sequences.random, dtype=torch.bfloat16, device="cuda")
LENGTHS = (1, 63, 64, 65, 700, 1023)


@triton.jit
def _chain(DY, X, SUM, STARTS, sequences, n, k, ROWS: tl.constexpr, SIDE: tl.constexpr):
    """Grid: (blocks of N, blocks of K). Without TMA: what a tile lacks is masked."""
    rn = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    rk = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    here = rn[:, None].to(tl.int64) * k + rk[None, :]
    inside = (rn < n)[:, None] & (rk < k)[None, :]
    total = tl.load(SUM + here, mask=inside, other=0.0)
    for i in range(sequences):
        stop = tl.load(STARTS + i + 1)
        for first in range(tl.load(STARTS + i), stop, ROWS):
            row = first + tl.arange(0, ROWS).to(tl.int64)
            dy = tl.load(DY + row[:, None] * n + rn, mask=(row < stop)[:, None] & (rn < n)[None, :], other=0.0)
            x = tl.load(X + row[:, None] * k + rk, mask=(row < stop)[:, None] & (rk < k)[None, :], other=0.0)
            total = tl.dot(tl.trans(dy), x, total)
    tl.store(SUM + here, total, mask=inside)


@pytest.mark.parametrize(("n", "k"), [*QWEN3_8B, *ODD])
def test_products_have_one_chain(n: int, k: int) -> None:
    rows = sum(LENGTHS)
    dy, x, so_far = random(rows, n, seed=0), random(rows, k, seed=1), random(n, k, seed=2, dtype=torch.float32)

    def summed(dy: torch.Tensor, x: torch.Tensor, *groups: Sequence[slice]) -> torch.Tensor:
        total = so_far.clone()
        for group in groups:
            gradients.add_product(total, dy, x, group)
        return total

    want, starts = so_far.clone(), torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device="cuda")
    _chain[(triton.cdiv(n, 64), triton.cdiv(k, 64))](dy, x, want, starts, len(LENGTHS), n, k, 64, 64)
    found = spans(LENGTHS)
    assert torch.equal(summed(dy, x, found), want)
    assert torch.equal(summed(dy, x, *([span] for span in found)), want)
    assert torch.equal(summed(dy, x, found[:4], found[4:]), want)
    # Elsewhere in the batch, and what stands beside it is not read.
    beside = [torch.nn.functional.pad(t, (0, 0, 37, 100), value=torch.nan) for t in (dy, x)]
    assert torch.equal(summed(*beside, spans(LENGTHS, 37)), want)
    assert not torch.equal(summed(dy, x, found[::-1]), want)  # the controls: another order, other tiles
    assert not torch.equal(summed(dy, x, [slice(0, rows)]), want)
    part = slice(0, 256)
    exact = so_far[part].double() + dy[:, part].double().t() @ x.double()
    assert (want[part] - exact).abs().max() < 1e-2


@pytest.mark.parametrize("shape", [(4096,), (32, 128)])
def test_sums_of_rows_have_one_chain(shape: tuple[int, ...]) -> None:
    terms = random(sum(LENGTHS), *shape, seed=0, dtype=torch.float32)

    def summed(*groups: Sequence[slice]) -> torch.Tensor:
        total = torch.ones(shape[-1], device="cuda")
        for group in groups:
            gradients.add_rows(total, terms, group)
        return total

    found = spans(LENGTHS)
    at_once = summed(found)
    assert (at_once - (terms.double().reshape(-1, shape[-1]).sum(0) + 1)).abs().max() < 1e-3
    assert torch.equal(summed(*([span] for span in found)), at_once)
    assert torch.equal(summed(found[:2], found[2:]), at_once)
    assert not torch.equal(summed(found[::-1]), at_once)  # the control


def test_embeddings_are_added_row_after_row() -> None:
    dy, ids = random(400, 4096, seed=0), torch.arange(400, device="cuda") ** 2 % 23

    def summed(*groups: torch.Tensor) -> torch.Tensor:
        total = torch.ones(23, 4096, device="cuda")
        for rows in groups:
            gradients.add_embeddings(total, dy[rows], ids[rows])
        return total

    want, rows = torch.ones(23, 4096, device="cuda"), torch.arange(400, device="cuda")
    for token, row in zip(ids.tolist(), dy, strict=True):
        want[token] += row.float()
    assert torch.equal(summed(rows), want)
    assert torch.equal(summed(rows[:111], rows[111:]), want)
    assert not torch.equal(summed(rows.flip(0)), want)  # the control
