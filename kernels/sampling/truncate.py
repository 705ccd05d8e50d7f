"""Top-k and top-p, row by row: which algorithm a row gets depends on that row's k and p alone."""

from __future__ import annotations

import torch

__all__ = ["top_k_top_p_by_row"]


def top_k_top_p_by_row(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """Sets the logits outside a row's top-k and nucleus to -inf, in place, and returns `logits`.

    logits: [rows, vocab] f32. k: [rows] integer, vocab or more for "no limit", or None. p: [rows] f32, 1 for "no
    limit", or None. Of logits equal to the last one that fits, the lower token ids are kept. A row with neither is not
    touched.
    """
    rows, vocab = logits.shape
    limits = [vocab] * rows if k is None else k.tolist()
    nuclei = [1.0] * rows if p is None else p.tolist()
    for row, (limit, nucleus) in enumerate(zip(limits, nuclei, strict=True)):
        if nucleus < 1.0:
            _nucleus(logits[row], min(limit, vocab), nucleus)
        elif 0 < limit < vocab:
            _largest(logits[row], limit)
    return logits


def _largest(line: torch.Tensor, limit: int) -> None:
    """Keeps of one row the `limit` largest logits; of those equal to the last of them the lower token ids."""
    least = line.topk(limit).values[-1]
    above = int((line > least).sum())
    ties = (line == least).nonzero()[:, 0]
    line.masked_fill_(line < least, float("-inf"))
    line[ties[limit - above :]] = float("-inf")


def _nucleus(line: torch.Tensor, limit: int, nucleus: float) -> None:
    """Keeps of one row the `limit` largest logits, and of those the smallest set whose probability reaches `nucleus`.

    Stable descending order, so ties are broken towards the lower token id. The sum runs over that order, one addition
    after the other, in f64: a sum in f32 would end below 1 and could keep the whole tail.
    """
    ordered, index = line.sort(descending=True, stable=True)
    ordered = ordered[:limit]
    before = ordered.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1).roll(1)
    before[0] = 0.0  # the most likely token always stays
    keep = index[:limit][before < nucleus]
    kept = line[keep]
    line.fill_(float("-inf"))
    line[keep] = kept
