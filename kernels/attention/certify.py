"""Certification of attention's schedules on the card at hand: decode row = prefill row = chunk row, bit for bit.

The tree's bits are those of the simplest kernel, one tile at a time over whole sequences. Every eligible schedule
then runs the same rows in other company: alone, in batches of 1 to 256, as chunks cut at random and at every edge,
beside sequences of NaN and infinities, over scattered pages whose stale slots hold poison. Outputs are fp32: rounding
to bf16 would hide most differences. What differs anywhere is dropped.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vllm_deterministic.errors import CertificationError

from .. import certificates
from ..certificates import Certificate
from .launch import FEW_MAX, Attention, Batch, Cache
from .reference import exact, quantised
from .schedules import DECODE, PREFILL, REFERENCE, Decode, Prefill
from .tree import Tree

__all__ = ["KINDS", "Sequences", "certify", "edges", "prepare"]

KINDS = ("normal", "heavy", "cancelling", "poison")
_STALE = 3e4  # finite, and would be seen


def edges(tree: Tree, longest: int) -> list[int]:
    """Contexts at which a schedule does something else than one key before or after."""
    t, s = tree.tile, tree.split
    at = {1, 2, 15, 16, 17, 63, 64, 65, t - 1, t, t + 1, s - 1, s, s + 1, 2 * s - 1, 2 * s, 2 * s + 1, 2 * s + 17}
    at |= {3000, 4095, 4096, 4097, 8191, 8192, 16384, 32767, 32768, longest}
    if tree.steady:  # where splits double, in the middle of such a split and at its end
        at |= {tree.steady + more + n for more in (0, s, 2 * s, 3 * s) for n in (-1, 0, 1)}
    if tree.window:
        at |= {tree.window - 1, tree.window, tree.window + 1, tree.window + t}
    return sorted(n for n in at if 0 < n <= longest)


# A stretch of a sequence: (sequence, first position, end position). Its queries attend to everything before them.
Stretch = tuple[int, int, int]


@dataclass
class Sequences:
    """Sequences of one length, one of each kind, on scattered pages. The last one is poison: NaN and infinities.

    stale: what slots hold that no sequence owns; NaN for kernels that load only what a sequence owns.
    """

    attention: Attention
    length: int
    dtype: torch.dtype
    stale: float = _STALE
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    data: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        heads, size, device = self.attention.heads, self.attention.tree.head_size, self.attention.device
        generator = torch.Generator(device=device).manual_seed(self.seed)
        per = -(-self.length // heads.page)
        total = per * len(self.kinds) + 3
        pages = torch.full((total, heads.page, heads.kv, 2 * size), self.stale, dtype=self.dtype, device=device)
        order = torch.randperm(total, device=device, generator=generator)[: per * len(self.kinds)]
        self.table = order.view(len(self.kinds), per).int()
        for i, kind in enumerate(self.kinds):
            q, k, v = self._tensors(kind, generator)
            self.data.append((q, k, v))
            whole = pages.new_full((per * heads.page, heads.kv, 2 * size), self.stale)
            whole[: self.length] = torch.cat([k, v], -1)
            pages[self.table[i]] = whole.view(per, heads.page, heads.kv, 2 * size)
        if self.attention.tree.e4m3:
            pages = quantised(pages, 1.0)
        self.cache = Cache(pages[..., :size], pages[..., size:])
        self.sinks = torch.linspace(-2, 3, heads.query, device=device) if self.attention.tree.sink else None
        steps = torch.arange(1, heads.query + 1, device=device)
        self.slopes = torch.exp2(-8 * steps / heads.query) if self.attention.tree.alibi else None

    def _tensors(self, kind: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads, size = self.attention.heads, self.attention.tree.head_size

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=self.attention.device, generator=generator)

        n = self.length
        q, k, v = normal(n, heads.query, size), normal(n, heads.kv, size), normal(n, heads.kv, size)
        if kind == "heavy":  # large scores, maxima that drift upwards, values of all sizes
            k *= torch.exp(normal(n, heads.kv, 1)) * torch.linspace(0.3, 2, n, device=k.device)[:, None, None]
            q *= torch.exp(0.7 * normal(n, heads.query, 1))
            v *= torch.exp(2 * normal(n, heads.kv, 1))
        elif kind == "cancelling":
            v[1::2] = -v[::2][: v[1::2].shape[0]] * (1 + 2**-7)
        elif kind == "poison":
            v[::3], k[1::5], q[2::7] = float("nan"), float("inf"), float("-inf")
        tree = self.attention.tree
        if tree.e4m3:  # as elements of the cache, each of which a half-precision type holds
            k, v = quantised(k, tree.k_scale), quantised(v, tree.v_scale)
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)

    def run(
        self,
        stretches: list[Stretch],
        decode: Decode | None,
        prefill: Prefill | None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """[query tokens, heads, head size] of the stretches in one batch."""
        attention, device = self.attention, self.attention.device
        q = torch.cat([self.data[i][0][a:b] for i, a, b in stretches])
        out = torch.full(q.shape, float("nan"), dtype=dtype, device=device)
        lengths = [b - a for _, a, b in stretches]
        start = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        kv_len = torch.tensor([b for _, _, b in stretches], dtype=torch.int32, device=device)
        table = self.table[[i for i, _, _ in stretches]].contiguous()
        plan = attention.plan(len(lengths), len(q), max(lengths), decode or DECODE[-1], prefill)
        if decode is None:
            plan.few = 0
        plan.fill(start, kv_len, attention.tree)
        attention.run(Batch(q, out, table, plan, self.sinks, self.slopes), self.cache, decode, prefill)
        return out

    def rows(self, stretches: list[Stretch], gold: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([gold[i][a:b] for i, a, b in stretches])

    def exact(self, i: int, first: int, end: int) -> torch.Tensor:
        """fp64 [end - first, heads, head size]."""
        q, k, v = self.data[i]
        return exact(self.attention.tree, q[first:end], k[:end], v[:end], first, self.sinks, self.slopes)


def _differing(got: torch.Tensor, want: torch.Tensor, owners: torch.Tensor) -> int:
    """Elements with other bits, of rows whose sequence is not poison (a NaN's payload is not part of an answer)."""
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    return int((got.view(bits) != want.view(bits))[owners].sum())


def _batches(sequences: Sequences, few: int, rng: random.Random, sizes: Iterable[int]) -> Iterable[list[Stretch]]:
    """Decode batches: every edge alone and all together, then random ones of each size with up to `few` query
    tokens."""
    n = len(sequences.kinds)
    ends = edges(sequences.attention.tree, sequences.length)
    yield [(i % n, end - min(end, few), end) for i, end in enumerate(ends)]
    for i, end in enumerate(ends):
        yield [(i % (n - 1), end - 1, end)]
    for size in sizes:
        batch = []
        for _ in range(size):
            end = rng.choice([*ends, rng.randrange(1, sequences.length + 1)])
            batch.append((rng.randrange(n), end - rng.randrange(1, min(end, few) + 1), end))
        yield batch


def _cuts(sequences: Sequences, rng: random.Random) -> Iterable[list[Stretch]]:
    """Prefill batches: whole sequences together, each cut into chunks, a few tokens at every edge, mixed batches of
    decodes, chunks and prompts."""
    n, length = len(sequences.kinds), sequences.length
    ends = edges(sequences.attention.tree, length)
    yield [(i, 0, length) for i in range(n)]
    for i in range(n - 1):
        cuts = sorted({0, length, *rng.sample(ends, 3), *(rng.randrange(1, length) for _ in range(5))})
        for a, b in itertools.pairwise(cuts):
            yield [(i, a, b)]
    for i, end in enumerate(ends):  # so few that their keys are cut into pieces
        yield [(i % (n - 1), max(end - (5, 40, 130)[i % 3], 0), end)]
    for size in (1, 7, 40):
        batch = []
        for _ in range(size):
            end = rng.choice([*ends, rng.randrange(1, length + 1)])
            batch.append((rng.randrange(n), end - min(end, rng.choice([1, 1, 2, 9, 33, 130, 700])), end))
        yield batch


def prepare(attention: Attention, dtype: torch.dtype, longest: int) -> Certificate:
    """This machine's certificate, cached or made now; `attention` may run what it names from here on.

    Raises CertificationError where no decode or no prefill schedule is on the tree.
    """
    wanted = Certificate(
        "attention",
        attention.tree.digest,
        _shape(attention, dtype, longest),
        certificates.card(attention.device, Path(__file__).parent),
        {},
    )
    found = certificates.load(wanted.key)
    if found is None:
        found = certify(attention, dtype, longest, wanted.machine)
        certificates.store(found)
    attention.allowed = set(found.schedules)
    return found


def _shape(attention: Attention, dtype: torch.dtype, longest: int) -> dict[str, int | str]:
    heads = attention.heads
    return {
        "query_heads": heads.query, "kv_heads": heads.kv, "page": heads.page, "dtype": str(dtype), "longest": longest,
    }  # fmt: skip


def certify(
    attention: Attention,
    dtype: torch.dtype,
    longest: int,
    on: Mapping[str, str],
    sizes: Iterable[int] = (1, 2, 8, 33, 64),
) -> Certificate:
    """Runs every eligible schedule against the reference, contexts up to `longest`. on: the machine. sizes: decode
    batches.

    Raises CertificationError where no decode or no prefill schedule is left.
    """
    began = time.perf_counter()
    tree, heads = attention.tree, attention.heads
    sequences = Sequences(attention, longest, dtype)
    owned = Sequences(attention, longest, dtype, stale=float("nan"))
    gold = [sequences.run([(i, 0, longest)], None, REFERENCE) for i in range(len(sequences.kinds))]
    poison = len(sequences.kinds) - 1
    schedules: dict[str, list[tuple[int, int]]] = {}
    dropped: dict[str, str] = {}

    def check(data: Sequences, batch: list[Stretch], schedule: Decode | Prefill, out: torch.dtype) -> str | None:
        is_decode = isinstance(schedule, Decode)
        got = data.run(batch, schedule if is_decode else None, None if is_decode else schedule, out)
        clean = torch.cat([torch.full((b - a,), i != poison, device=got.device) for i, a, b in batch])
        wrong = _differing(got, data.rows(batch, gold).to(out), clean)
        if not wrong:
            return None
        checked = int(clean.sum()) * heads.query * tree.head_size
        return f"{wrong} of {checked} elements in a batch of {len(batch)}: {batch[:3]}"

    def found(schedule: Decode | Prefill, batches: Iterable[list[Stretch]], spans: list[tuple[int, int]]) -> None:
        whole_tiles = schedule.tma if isinstance(schedule, Decode) else schedule.cuda or schedule.warp_specialised
        data = sequences if whole_tiles else owned
        runs = [(batch, torch.float32) for batch in batches]
        runs.append((runs[0][0], dtype))  # as served, which is another compilation
        try:
            for batch, out in runs:
                wrong = check(data, batch, schedule, out)
                if wrong:
                    dropped[schedule.name] = wrong
                    return
            schedules[schedule.name] = spans
        except Exception as reason:  # a kernel that this compiler or card cannot run is no schedule
            dropped[schedule.name] = f"{type(reason).__name__}: {str(reason).strip().splitlines()[-1][:200]}"

    for decode in DECODE:
        few = FEW_MAX if decode.rows > 16 else max(16 // heads.group, 1)
        if decode.eligible(tree, heads, attention.hopper):
            found(decode, _batches(sequences, few, random.Random(1), sizes), [(1, few)])
    for prefill in PREFILL:
        if prefill.eligible(tree, heads, attention.hopper):
            found(prefill, _cuts(sequences, random.Random(2)), [(1, longest)])
    for family in (DECODE, PREFILL):
        if not any(schedule.name in schedules for schedule in family):
            raise CertificationError(f"no schedule gives the bits of {tree} for {heads}: {dropped}")
    shape, seconds = _shape(attention, dtype, longest), time.perf_counter() - began
    return Certificate("attention", tree.digest, shape, on, schedules, dropped, seconds)
