"""vLLM's CPU attention on one tree: every query in company that its kernel takes in one round.

The kernel cuts the keys into tiles, one running softmax over them, and the tile's size depends on how many rows (query
tokens times query heads of a KV head) it holds at once: one round of rows gets the largest tile that the L2 cache
allows, several rounds smaller ones. A prefill would so be added up in another order than a decode. Given as several
requests of few tokens each, that share the pages of the cache, a chunk of any length is taken in rounds of one, and a
token's keys are cut at the same positions from 0, however it came into the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vllm_deterministic.errors import CertificationError

__all__ = ["CONTEXT", "ROUND", "Attend", "certify", "pieces", "tokens_of_a_round"]

# The kernel's instruction set -> rows of one round.
ROUND = {"vec": 8, "vec16": 16, "amx": 32}
# Tokens of the sequence that is certified on, more than a tile of several rounds holds; its last ones are compared.
# Many, since the output's rounding hides most of a difference.
CONTEXT, COMPARED = 4096, 512
# Pieces of a sequence of CONTEXT tokens, (start, stop) each, in one batch -> the outputs of their queries.
Attend = Callable[[Sequence[tuple[int, int]]], torch.Tensor]


def tokens_of_a_round(isa: str, heads: int, groups: int) -> int:
    """Query tokens of one round, for `heads` query heads and `groups` KV heads.

    Heads that share a KV head share its rounds where their number divides a round; else each head has its own.
    Raises CertificationError for an instruction set whose rounds are not known here.
    """
    if isa not in ROUND:
        raise CertificationError(f"attention for {isa} is not proved on one tree; proved: {', '.join(ROUND)}")
    together = heads // groups
    return ROUND[isa] // together if ROUND[isa] % together == 0 else ROUND[isa]


def pieces(starts: torch.Tensor, lengths: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The requests of a batch, cut into pieces of at most `most` query tokens.

    starts: [requests + 1], where each one's queries start; lengths: [requests], its tokens up to the last query.
    Returns the same two for the pieces, in their types, and [pieces], the request that each is a piece of.
    """
    sizes = starts.diff()
    counts = (sizes + most - 1) // most
    owner = torch.arange(len(sizes)).repeat_interleave(counts)
    within = (torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]) * most
    size = (sizes[owner] - within).clamp(max=most)
    piece_starts = torch.cat([starts[:1], starts[0] + size.cumsum(0)]).to(starts.dtype)
    return piece_starts, (lengths[owner] - sizes[owner] + within + size).to(lengths.dtype), owner


def certify(attend: Attend, most: int) -> None:
    """Raises CertificationError unless a token has the same bits in a piece of any size up to `most`, and alone."""

    def cut(size: int) -> torch.Tensor:
        starts = range(CONTEXT - COMPARED, CONTEXT, size)
        return attend([(start, min(start + size, CONTEXT)) for start in starts])

    expected = cut(1)
    wrong = [size for size in range(2, most + 1) if not torch.equal(cut(size), expected)]
    if not torch.equal(attend([(CONTEXT - 1, CONTEXT)]), expected[-1:]):
        wrong = [1, *wrong]
    if wrong:
        raise CertificationError(
            f"attention: tokens in pieces of {wrong} have other bits than one by one in a batch; run with fewer "
            "threads (VLLM_CPU_OMP_THREADS_BIND)"
        )
