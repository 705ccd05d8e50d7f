"""Price of `--deterministic` on a GPU: one card, one run, three whole engines alive side by side that take turns.

The model has the shape of its configuration and random weights with which the text varies. Each engine is a process
of its own with the same room for its KV cache; while one works, the others wait. Work is given in short turns, the
order of the engines changes every round, and a ratio is the median of the rounds' ratios with its 95 % bootstrap
interval.

usage: benchmarks/engine.py MODEL_FOLDER [--rounds 9] [--sides default ours vllm-mode]
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import random
import shlex
import statistics
import sys
import time
import traceback
import zlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bootstrap import interval
from report import machine, write

OURS = "ours"
SIDES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "default": ({}, {}),
    OURS: ({"additional_config": {"vllm_deterministic": {}}}, {}),
    "vllm-mode": ({"attention_backend": "FLASH_ATTN"}, {"VLLM_BATCH_INVARIANT": "1"}),
}
DECODE_TOKENS = 48
# name -> (kind, numbers): what one turn does.
WORK: dict[str, tuple[str, tuple[int, ...]]] = {
    **{f"decode, {n} sequences": ("decode", (n,)) for n in (1, 2, 8, 32, 64, 128, 256)},
    "prefill, 8 x 4096 tokens": ("prefill", (8, 4096)),
    **{f"decode at {n // 1000}k context, {b} sequences": ("context", (n, b)) for n in (8000, 32000) for b in (1, 4)},
    "decode at 8k context, 16 sequences": ("context", (8000, 16)),
    "1000 prompts of about 60 tokens, 100 tokens each": ("many", (1000,)),
}
SELDOM = ("many",)  # takes seconds: every fifth round


def fill(self: object, model: Any, model_config: object) -> None:
    """Norms at one, matrices N(0, 0.03), each from its own seed: weights with which the text varies."""
    import torch

    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
            continue
        generator = torch.Generator("cuda").manual_seed(zlib.crc32(name.encode()))
        for rows in parameter.data.split(8192):
            rows.copy_(torch.randn(rows.shape, generator=generator, device="cuda").mul_(0.03))


class Engine:
    """One vLLM in this process. Each kind of work returns seconds."""

    def __init__(self, folder: str, options: dict[str, Any], gigabytes: float) -> None:
        import vllm.model_executor.model_loader.dummy_loader as dummy_loader

        dummy_loader.DummyModelLoader.load_weights = fill  # type: ignore[method-assign,assignment]
        from vllm import LLM

        self.cache_bytes = int(gigabytes * 2**30)
        began = time.perf_counter()
        self.llm = LLM(
            folder, load_format="dummy", max_model_len=36864, max_num_seqs=256, seed=0, disable_log_stats=True,
            kv_cache_memory_bytes=self.cache_bytes, gpu_memory_utilization=0.3, **options,
        )  # fmt: skip
        self.start_seconds = time.perf_counter() - began
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self._prefixes: dict[tuple[int, int], list[list[int]]] = {}

    def ids(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(100, self.vocabulary - 1000) for _ in range(count)]

    def _seconds(self, prompts: list[list[int]], tokens: list[int]) -> float:
        from vllm import SamplingParams

        asked = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False) for n in tokens]
        began = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
        return time.perf_counter() - began

    def decode(self, rng: random.Random, sequences: int) -> float:
        prompts = [self.ids(rng, 64) for _ in range(sequences)]
        return self._seconds(prompts, [DECODE_TOKENS] * sequences)

    def prefill(self, rng: random.Random, sequences: int, tokens: int) -> float:
        return self._seconds([self.ids(rng, tokens) for _ in range(sequences)], [1] * sequences)

    def context(self, rng: random.Random, tokens: int, sequences: int) -> float:
        """Seconds of DECODE_TOKENS tokens behind a prefix that the cache holds."""
        key = (tokens, sequences)
        if key not in self._prefixes:
            own = random.Random(f"{key}")
            self._prefixes[key] = [self.ids(own, tokens) for _ in range(sequences)]
        self._seconds(self._prefixes[key], [1] * sequences)  # other work may have taken the prefix's pages
        prompts = [[*prefix, *self.ids(rng, 8)] for prefix in self._prefixes[key]]
        short = self._seconds(prompts, [1] * sequences)
        return self._seconds(prompts, [1 + DECODE_TOKENS] * sequences) - short

    def room(self, rng: random.Random) -> float:
        """KV-cache tokens that fit beside everything else that this engine came to hold, in 0.9 of the card."""
        import torch

        cache = self.llm.llm_engine.vllm_config.cache_config
        tokens = cache.num_gpu_blocks * cache.block_size
        beside = torch.cuda.memory_reserved() - self.cache_bytes
        return tokens * (0.9 * torch.cuda.mem_get_info()[1] - beside) / self.cache_bytes

    def many(self, rng: random.Random, requests: int) -> float:
        prompts = [self.ids(rng, rng.randrange(40, 80)) for _ in range(requests)]
        return self._seconds(prompts, [rng.randrange(90, 111) for _ in range(requests)])


def serve(connection: Connection, folder: str, side: str, gigabytes: float, log: str) -> None:
    """The body of an engine's process: answers (kind, seed, numbers) with seconds until it is sent None."""
    options, environment = SIDES[side]
    os.environ.update(environment, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CACHE_ROOT=f"{log}.cache")
    with open(log, "w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    try:
        engine = Engine(folder, options, gigabytes)
        connection.send(engine.start_seconds)
        while (asked := connection.recv()) is not None:
            kind, seed, numbers = asked
            connection.send(getattr(engine, kind)(random.Random(seed), *numbers))
    except BaseException:
        traceback.print_exc()
        raise


def tokens_of(kind: str, numbers: tuple[int, ...]) -> int:
    """Tokens that a turn makes or reads."""
    if kind == "prefill":
        return numbers[0] * numbers[1]
    return {"decode": numbers[0] * DECODE_TOKENS, "context": numbers[-1] * DECODE_TOKENS, "many": numbers[0] * 100}[
        kind
    ]


def one_round(engines: dict[str, Connection], turn: int, seconds: dict[str, list[dict[str, float]]]) -> None:
    """Every piece of work on every engine, into `seconds`; turn -1 warms up and is not kept."""
    for what, (kind, numbers) in WORK.items():
        if kind in SELDOM and turn % 5:
            continue
        found = {}
        for name in list(engines) if turn % 2 else list(engines)[::-1]:
            # The same prompts for every engine; new ones each round, so that no prefix is found in the cache.
            engines[name].send((kind, f"{what}/{turn}", numbers))
            found[name] = engines[name].recv()
        if turn >= 0:
            seconds[what].append(found)


def points(seconds: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    found = []
    for what, rounds in seconds.items():
        work = tokens_of(*WORK[what])
        for peer in [name for name in SIDES if name != OURS and name in rounds[0]]:
            ratios = [turn[peer] / turn[OURS] for turn in rounds]
            low, high = interval(ratios)
            rate = {name: work / statistics.median(turn[name] for turn in rounds) for name in (peer, OURS)}
            found.append(
                {
                    "what": what, "unit": "tokens/s", "name": peer, "peer": round(rate[peer], 1),
                    "ours": round(rate[OURS], 1), "ratio": round(statistics.median(ratios), 3),
                    "low": round(low, 3), "high": round(high, 3), "rounds": len(ratios),
                }
            )  # fmt: skip
    return found


def write_report(
    report: dict[str, Any], seconds: dict[str, list[dict[str, float]]], tokens: dict[str, float], path: Path
) -> None:
    """tokens: of KV cache that fit, of each engine."""
    found = points(seconds)
    for peer in [side for side in tokens if side != OURS]:
        fit = {"peer": round(tokens[peer]), "ours": round(tokens[OURS]), "ratio": round(tokens[OURS] / tokens[peer], 3)}
        found.append({"what": "KV-cache tokens that fit in 0.9 of the card", "unit": "tokens", "name": peer, **fit})
    write(path, {**report, "points": found, "seconds": seconds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a configuration; weights are made up")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--gigabytes", type=float, default=22, help="of KV cache for each engine")
    parser.add_argument("--logs", default=".cache/engine-logs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engine.json")
    args = parser.parse_args()
    Path(args.logs).mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    engines, processes = {}, []
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:.0f} s: {what}", flush=True)

    for side in args.sides:
        engines[side], theirs = context.Pipe()
        body = (theirs, args.model, side, args.gigabytes, f"{args.logs}/{side}.log")
        processes.append(context.Process(target=serve, args=body))
        processes[-1].start()
        theirs.close()
    starts = {}
    for side, connection in engines.items():
        try:
            starts[side] = round(connection.recv(), 1)
        except EOFError:
            sys.exit(f"the engine {side!r} did not start: see {args.logs}/{side}.log")
        say(f"{side} is up")
    report = {
        **machine("torch", "triton", "vllm"),
        "command": shlex.join(["python", "benchmarks/engine.py", Path(args.model).name, *sys.argv[2:]]),
        "date": datetime.date.today().isoformat(),
        "start_seconds_side_by_side": starts,
    }
    seconds: dict[str, list[dict[str, float]]] = {what: [] for what in WORK}
    for turn in range(-1, args.rounds):
        one_round(engines, turn, seconds)
        if turn >= 0:
            write_report(report, seconds, {}, args.out)  # a run that is cut short has said what it saw
        say(f"round {turn + 1} of {args.rounds}")
    tokens = {}
    for side, connection in engines.items():
        connection.send(("room", "", ()))
        tokens[side] = connection.recv()
        connection.send(None)
    write_report(report, seconds, tokens, args.out)
    for process in processes:
        process.join(60)
    for peer in [side for side in args.sides if side != OURS]:
        ratios = [row["ratio"] for row in points(seconds) if row["name"] == peer]
        print(f"{peer} / ours: geometric mean {statistics.geometric_mean(ratios):.3f}, worst {min(ratios)}")


if __name__ == "__main__":
    main()
