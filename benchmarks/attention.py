"""Attention on the GPU: vLLM's FlashAttention 3 (default and one split) and its batch-invariant Triton kernel against
ours.

Each point is one CUDA graph a side over scattered pages, rotated through more than the L2 cache holds; what a step
computes once for all layers (FlashAttention's scheduler metadata, our plan) is outside. The sides take turns, in
another order each time and each behind a run of its own that is not measured: a card at its power limit is as fast as
what ran before lets it be. A ratio is the median over the turns, with a bootstrap interval of 95 %.

usage: benchmarks/attention.py [--repeats 9] [--tune [SCHEDULE ...]] [--parts accuracy decode middle chunks prefill]
[--out benchmarks/results/attention.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bootstrap import interval
from report import machine, write
from vllm_deterministic.kernels.attention.certify import Sequences
from vllm_deterministic.kernels.attention.launch import FEW_MAX, Attention, Batch, Cache, Scratch
from vllm_deterministic.kernels.attention.schedules import DECODE, PREFILL, Decode, Heads, Prefill
from vllm_deterministic.kernels.attention.tree import tree_for
from vllm_deterministic.kernels.timing import Timed, copies_beyond_l2

QUERY_HEADS, KV_HEADS, HEAD_SIZE, PAGE = 32, 8, 128, 128
TREE, HEADS = tree_for(HEAD_SIZE, kv_heads=KV_HEADS), Heads(QUERY_HEADS, KV_HEADS, PAGE)
KEY_BYTES = 2 * KV_HEADS * HEAD_SIZE * 2
DECODE_POINTS = [(b, k) for b in (1, 4, 8, 32, 128) for k in (512, 2048, 8192, 32768)] + [(1, 131072), (4, 131072)]
MIDDLE_POINTS = [(b, k, n) for n in (2, 5, 16) for b, k in ((1, 8192), (32, 2048))]
CHUNK_POINTS = [(1, 4064, 64), (1, 4096, 96), (4, 4064, 64), (1, 32768, 128), (2, 8192, 256)]
PREFILL_POINTS = [(1, 4096, 4096), (4, 4096, 4096), (1, 8192, 8192), (1, 32768, 32768), (16, 30720, 2048)]
DEVICE = torch.device("cuda", 0)
Call = Callable[[], Any]


class Case:
    """`batch` sequences of `keys` keys, the last `queries` of them queries, on `copies` sets of scattered pages."""

    def __init__(self, pool: torch.Tensor, batch: int, keys: int, queries: int) -> None:
        pages = -(-keys // PAGE)
        copies = max(1, min(copies_beyond_l2(batch * keys * KEY_BYTES, DEVICE), pool.shape[1] // (batch * pages)))
        self.k, self.v = pool
        self.batch, self.keys, self.queries = batch, keys, queries
        self.tables = (
            torch.randperm(pool.shape[1], device=DEVICE)[: copies * batch * pages].int().view(copies, batch, pages)
        )
        self.q = torch.randn(batch * queries, QUERY_HEADS, HEAD_SIZE, device=DEVICE).bfloat16()
        self.out = torch.empty_like(self.q)
        self.start = torch.arange(0, batch * queries + 1, queries, device=DEVICE, dtype=torch.int32)
        self.kv_len = torch.full((batch,), keys, device=DEVICE, dtype=torch.int32)
        self.calls = max(copies, 4) if batch * keys * queries < 2**26 else 2

    def ours(self, attention: Attention, decode: Decode, prefill: Prefill | None) -> list[Call]:
        plan = attention.plan(self.batch, len(self.q), self.queries, decode, prefill)
        plan.fill(self.start, self.kv_len, attention.tree)
        cache = Cache(self.k, self.v)

        def call(i: int) -> Call:
            table = self.tables[i % len(self.tables)]
            batch = Batch(self.q, self.out, table, plan)
            return lambda: attention.run(batch, cache, decode, prefill)

        return [call(i) for i in range(self.calls)]

    def flash_attention(self, page: int, splits: int) -> list[Call]:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

        k, v = (x.view(-1, page, KV_HEADS, HEAD_SIZE) for x in (self.k, self.v))
        per = PAGE // page
        tables = (self.tables[..., None] * per + torch.arange(per, device=DEVICE)).flatten(2).int()
        metadata = get_scheduler_metadata(
            batch_size=self.batch, max_seqlen_q=self.queries, max_seqlen_k=self.keys, num_heads_q=QUERY_HEADS,
            num_heads_kv=KV_HEADS, headdim=HEAD_SIZE, cache_seqlens=self.kv_len, qkv_dtype=torch.bfloat16,
            cu_seqlens_q=self.start, page_size=page, causal=True, num_splits=splits,
        )  # fmt: skip

        def call(i: int) -> Call:
            return lambda: flash_attn_varlen_func(
                self.q, k, v, self.queries, self.start, self.keys, seqused_k=self.kv_len, softmax_scale=HEAD_SIZE**-0.5,
                causal=True, block_table=tables[i % len(tables)], out=self.out, fa_version=3, num_splits=splits,
                scheduler_metadata=metadata,
            )  # fmt: skip

        return [call(i) for i in range(self.calls)]

    def triton_batch_invariant(self) -> list[Call]:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        k, v = (x.view(-1, 16, KV_HEADS, HEAD_SIZE) for x in (self.k, self.v))
        per = PAGE // 16
        tables = (self.tables[..., None] * per + torch.arange(per, device=DEVICE)).flatten(2).int()

        def call(i: int) -> Call:
            return lambda: unified_attention(
                self.q, k, v, self.out, self.start, self.queries, self.kv_len, self.keys, HEAD_SIZE**-0.5, True, (-1,
                -1),
                tables[i % len(tables)], 0, None, None, None,
            )  # fmt: skip

        return [call(i) for i in range(self.calls)]


def measure(sides: dict[str, Callable[[], list[Call]]], repeats: int) -> dict[str, list[float]]:
    """Seconds per call of each side, turn by turn; a side that cannot run is left out and said."""
    timed, kept = {}, []  # a captured graph does not keep its tensors
    for name, calls in sides.items():
        try:
            kept.append(calls())
            timed[name] = Timed(kept[-1])
        except Exception as reason:
            print(f"  {name}: {type(reason).__name__}: {str(reason).strip().splitlines()[-1][:160]}", flush=True)
    for side in timed.values():
        side.seconds()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    rng = random.Random(0)
    for _ in range(repeats):
        for name in rng.sample(list(timed), len(timed)):
            timed[name].seconds()
            seconds[name].append(timed[name].seconds())
    return seconds


def points(turn: dict[str, Any], ours: str) -> list[dict[str, Any]]:
    """One row a peer, against our schedule; FlashAttention's page size is the one that is faster here."""
    seconds, batch, keys, queries = (turn[name] for name in ("seconds", "batch", "keys", "queries"))
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    fa3 = [name for name in middle if name.startswith("fa3 default")]
    peers = [min(fa3, key=middle.__getitem__)] if fa3 else []
    peers += [name for name in middle if name.startswith(("fa3 one", "vllm"))]
    rows = []
    for peer in peers if ours in seconds else []:
        ratios = [a / b for a, b in zip(seconds[peer], seconds[ours], strict=True)]
        flops = 4.0 * batch * QUERY_HEADS * HEAD_SIZE * queries * (2 * keys - queries + 1) / 2
        rows.append(
            {
                "what": turn["what"], "unit": "us", "name": peer, "schedule": ours,
                "peer": round(middle[peer] * 1e6, 2), "ours": round(middle[ours] * 1e6, 2),
                "ratio": round(statistics.median(ratios), 3),
                "interval": [round(bound, 3) for bound in interval(ratios)],
                "tb_per_s": round(batch * keys * KEY_BYTES / middle[ours] / 1e12, 3),
                "tflop_per_s": round(flops / middle[ours] / 1e12, 1),
            }
        )  # fmt: skip
    return rows


def rescore(path: Path) -> None:
    """Writes a finished run's points again, for the schedules that the launcher chooses now."""
    result = json.loads(path.read_text())
    kept = [point for point in result["points"] if point["what"].startswith("error")]
    attention = Attention(TREE, HEADS, "cpu", Scratch.empty(1, 1, "cpu"))
    attention.hopper, attention.multiprocessors = True, 132
    for turn in result["turns"]:
        batch, queries = turn["batch"], turn["queries"]
        decode, prefill = attention.schedules(batch, batch * queries, queries)
        kept += points(turn, (prefill or decode).name)
    result["points"] = kept
    write(path, result)
    summary(kept)


def summary(rows: list[dict[str, Any]]) -> None:
    for kind in ("decode", "prefill"):
        for peer in ("fa3 default", "fa3 one split", "vllm triton"):
            ratios = [r["ratio"] for r in rows if r["what"].startswith(kind) and r["name"].startswith(peer)]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                print(f"{kind} against {peer}: geometric mean {mean:.3f}, worst {min(ratios)}", flush=True)


def accuracy() -> list[dict[str, Any]]:
    """Relative error against fp64 of bf16 outputs, 512 rows at the end of 4096 and of 1024 keys; ratio: FA3's over
    ours."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    attention = Attention(TREE, HEADS, DEVICE, Scratch.empty(QUERY_HEADS, HEAD_SIZE, DEVICE))
    sequences = Sequences(attention, 4096, torch.bfloat16, kinds=("normal", "heavy", "cancelling"))
    rows = []
    for i, kind in enumerate(sequences.kinds):
        for end in (1024, 4096):
            first = end - 512
            decode, prefill = attention.schedules(1, 512, 512)
            want = sequences.exact(i, first, end)
            got = sequences.run([(i, first, end)], decode, prefill, torch.bfloat16)
            q, k, v = (x[:end].contiguous() for x in sequences.data[i])
            k, v = (x.view(-1, PAGE, KV_HEADS, HEAD_SIZE) for x in (k, v))
            table = torch.arange(end // PAGE, device=DEVICE, dtype=torch.int32)[None]
            fa3 = flash_attn_varlen_func(
                q[first:].contiguous(), k, v, 512, torch.tensor([0, 512], device=DEVICE, dtype=torch.int32), end,
                seqused_k=torch.tensor([end], device=DEVICE, dtype=torch.int32), softmax_scale=HEAD_SIZE**-0.5,
                causal=True,
                block_table=table, fa_version=3,
            )  # fmt: skip
            ours, theirs = (((x.double() - want).norm() / want.norm()).item() for x in (got, fa3))
            worst = [((x.double() - want).abs().max() / want.abs().max()).item() for x in (got, fa3)]
            rows.append(
                {"what": f"error {kind} {end} keys", "unit": "relative to fp64", "name": "fa3 default", "peer": theirs,
                 "ours": ours, "ratio": round(theirs / ours, 4), "largest": {"ours": worst[0], "peer": worst[1]}}
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tune", nargs="*", help="time these schedules too (default: every one), not only the chosen")
    parser.add_argument("--without", nargs="*", default=[], help="schedules that certification dropped")
    parser.add_argument("--parts", nargs="+", default=["accuracy", "decode", "middle", "chunks", "prefill"])
    parser.add_argument("--gigabytes", type=float, default=20.0, help="of KV cache to scatter pages in")
    parser.add_argument("--rescore", type=Path, help="only score this finished run again")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention.json"))
    arguments = parser.parse_args()
    if arguments.rescore:
        rescore(arguments.rescore)
        return
    result: dict[str, Any] = {
        **machine("torch", "triton", "vllm"),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "points": [],
        "turns": [],
    }
    began = time.perf_counter()

    def add(rows: list[dict[str, Any]]) -> None:
        result["points"].extend(rows)
        for row in rows:
            print(f"{time.perf_counter() - began:.0f} s", {k: v for k, v in row.items() if k != "unit"}, flush=True)
        write(arguments.out, result)

    attention = Attention(TREE, HEADS, DEVICE, Scratch.empty(QUERY_HEADS, HEAD_SIZE, DEVICE))
    pool = torch.empty(
        2,
        int(arguments.gigabytes * 1e9) // (PAGE * KEY_BYTES),
        PAGE,
        KV_HEADS,
        HEAD_SIZE,
        device=DEVICE,
        dtype=torch.bfloat16,
    )
    for half in pool.flatten(0, 1).split(4096):
        half.normal_()

    attention.allowed = {schedule.name for schedule in (*DECODE, *PREFILL)} - set(arguments.without)
    eligible = {s.name for s in (*DECODE, *PREFILL) if s.eligible(TREE, HEADS, True)} & attention.allowed
    rivals = set() if arguments.tune is None else eligible & set(arguments.tune or eligible)

    def compare(what: str, batch: int, keys: int, queries: int) -> None:
        case = Case(pool, batch, keys, queries)
        decode, prefill = attention.schedules(batch, batch * queries, queries)
        mine: dict[str, Callable[[], list[Call]]] = {}
        chosen = (prefill or decode).name
        mine[chosen] = lambda: case.ours(attention, decode, prefill)
        for other in PREFILL if prefill else ():
            if other.name in rivals and other is not prefill:
                mine[other.name] = lambda other=other: case.ours(attention, decode, other)
        for rival in DECODE if queries <= FEW_MAX else ():
            if rival.name in rivals and rival.name != chosen:
                mine[rival.name] = lambda rival=rival: case.ours(attention, rival, None)
        sides = dict(mine)
        for page in (16, 128):
            sides[f"fa3 default page {page}"] = lambda page=page: case.flash_attention(page, 0)
        sides["fa3 one split page 128"] = lambda: case.flash_attention(128, 1)
        sides["vllm triton batch-invariant page 16"] = case.triton_batch_invariant
        seconds = measure(sides, arguments.repeats)
        turn = {"what": what, "batch": batch, "keys": keys, "queries": queries, "seconds": seconds}
        result["turns"].append(turn)
        add(points(turn, chosen))
        for rival in list(mine)[1:]:
            for row in points(turn, rival)[:1]:
                print("  instead", {name: row[name] for name in ("schedule", "ours", "ratio", "interval")}, flush=True)

    parts = {
        "accuracy": lambda: add(accuracy()),
        "decode": lambda: [compare(f"decode {b} x {k}", b, k, 1) for b, k in DECODE_POINTS],
        "middle": lambda: [compare(f"{n} tokens {b} x {k}", b, k, n) for b, k, n in MIDDLE_POINTS],
        "chunks": lambda: [compare(f"chunk {b} x {n} of {k}", b, k, n) for b, k, n in CHUNK_POINTS],
        "prefill": lambda: [compare(f"prefill {b} x {n} of {k}", b, k, n) for b, k, n in PREFILL_POINTS],
    }
    for part in arguments.parts:
        parts[part]()
    summary(result["points"])


if __name__ == "__main__":
    main()
