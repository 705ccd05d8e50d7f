"""Price of `--deterministic` on a GPU: one card, one run, three whole engines alive side by side that take turns.

The model has the shape of its configuration and random weights with which the text varies. Each engine is a process
of its own with the same room for its KV cache; while one works, the others wait. Work is given in short turns; every
turn draws the order of the engines anew, and a ratio is the median of the turns' ratios with its 95 % bootstrap
interval. Each kind of work comes up in every visit, some turns in a row, so that long prefixes stay in the cache.

With --layers the engines are that much shorter and do only the work whose KV cache would not fit twice otherwise; with
--only they do the work whose name holds one of these words. Its points join those that the file has.

usage: benchmarks/engine.py MODEL_FOLDER [--visits 3] [--sides default ours vllm-mode] [--layers N] [--only WORD ...]
       benchmarks/engine.py --join FILE      the points of a run that was written elsewhere join those of --out
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import random
import shlex
import shutil
import statistics
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bootstrap import interval
from report import machine, write

OURS = "ours"
FLAG = {"additional_config": {"vllm_deterministic": {}}}
# Name -> options, environment variables, settings of Inductor.
SIDES: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any]]] = {
    "default": ({}, {}, {}),
    OURS: (FLAG, {}, {}),
    "vllm-mode": ({"attention_backend": "FLASH_ATTN"}, {"VLLM_BATCH_INVARIANT": "1"}, {}),
    # What it would cost if compiled graphs rounded where eager ones do.
    "rounded-as-eager": (FLAG, {}, {"emulate_precision_casts": True}),
}
DECODE_TOKENS = 48
Work = dict[str, tuple[str, tuple[int, ...]]]  # name -> (kind, numbers): what one turn does
WORK: Work = {
    **{f"decode, {n} sequences": ("decode", (n,)) for n in (1, 2, 8, 32, 64, 128, 256)},
    "prefill, 8 x 4096 tokens": ("prefill", (8, 4096)),
    **{f"decode at {n // 1000}k context, {b} sequences": ("context", (n, b)) for n in (8000, 32000) for b in (1, 4)},
    "decode at 8k context, 16 sequences": ("context", (8000, 16)),
    "1000 prompts of about 60 tokens, 100 tokens each": ("many", (1000,)),
}
LONG: Work = {"decode at 32k context, 16 sequences": ("context", (32000, 16))}
TURNS = 3  # of a kind of work in a visit
ONCE = ("many", "vllm-mode")  # work and sides that take long: one turn in a visit


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


def shortened(folder: str, layers: int, into: Path) -> str:
    """A model folder with the same configuration but for its number of layers."""
    shutil.copytree(folder, into, dirs_exist_ok=True)
    config = json.loads((into / "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return str(into)


def serve(connection: Connection, folder: str, side: str, gigabytes: float, log: str) -> None:
    """The body of an engine's process: answers (kind, seed, numbers) with seconds until it is sent None."""
    options, environment, settings = SIDES[side]
    os.environ.update(environment, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CACHE_ROOT=f"{log}.cache")
    with open(log, "w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    try:
        from torch._inductor import config as inductor

        for name, value in settings.items():
            setattr(inductor, name, value)
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


def visit(
    engines: dict[str, Connection], work: Work, number: int, turns: dict[str, list[dict[str, float]]]
) -> Iterator[str]:
    """Every piece of work on every engine, seconds into `turns`; visit -1 warms up, is not kept, and is short where
    there is short work."""
    for what, (kind, numbers) in work.items():
        if number < 0 and len(work) > 1 and (kind in ONCE or sum(numbers) > 9000):
            continue
        for turn in range(1 if number < 0 or kind in ONCE else TURNS):
            # The same prompts for every engine; new ones each turn, so that no prefix is found in the cache.
            seed = f"{what}/{number}/{turn}"
            sides = [name for name in engines if turn == 0 or name not in ONCE]
            random.Random(seed).shuffle(sides)
            found = {}
            for name in sides:
                engines[name].send((kind, seed, numbers))
                found[name] = engines[name].recv()
            if number >= 0:
                turns[what].append(found)
        yield what


def points(work: Work, seconds: dict[str, list[dict[str, float]]], suffix: str) -> list[dict[str, Any]]:
    found = []
    for what, turns in seconds.items():
        size = tokens_of(*work[what])
        for peer in [name for name in SIDES if name != OURS]:
            both = [turn for turn in turns if peer in turn]
            if not both:
                continue
            ratios = [turn[peer] / turn[OURS] for turn in both]
            low, high = interval(ratios)
            rate = {name: size / statistics.median(turn[name] for turn in both) for name in (peer, OURS)}
            found.append(
                {
                    "what": what + suffix, "unit": "tokens/s", "name": peer, "peer": round(rate[peer], 1),
                    "ours": round(rate[OURS], 1), "ratio": round(statistics.median(ratios), 3),
                    "low": round(low, 3), "high": round(high, 3), "turns": len(ratios),
                }
            )  # fmt: skip
    return found


def room_points(tokens: dict[str, float]) -> list[dict[str, Any]]:
    """tokens: of KV cache that fit, of each engine."""
    what = "KV-cache tokens that fit in 0.9 of the card"
    return [
        {
            "what": what, "unit": "tokens", "name": peer, "peer": round(tokens[peer]), "ours": round(tokens[OURS]),
            "ratio": round(tokens[OURS] / tokens[peer], 3),
        }
        for peer in tokens
        if peer != OURS
    ]  # fmt: skip


def save(path: Path, report: dict[str, Any], found: list[dict[str, Any]], seconds: dict[str, Any], join: bool) -> None:
    """Writes the report; with `join` its points, and how they were measured, join the report that is there."""
    if not join or not path.exists():
        write(path, {**report, "points": found, "seconds": seconds})
        return
    whole = json.loads(path.read_text())
    new = {(point["what"], point["name"]): point for point in found}
    kept = [new.pop((point["what"], point["name"]), point) for point in whole["points"]]
    whole["points"] = [*kept, *new.values()]
    runs = {run["command"]: run for run in whole.get("joined", [])}
    whole["joined"] = list({**runs, report["command"]: {**report, "seconds": seconds}}.values())
    write(path, whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder with a configuration; weights are made up")
    parser.add_argument("--visits", type=int, default=3, help=f"of each kind of work, {TURNS} turns each")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES)[:3])
    parser.add_argument("--gigabytes", type=float, default=22, help="of KV cache for each engine")
    parser.add_argument("--layers", type=int, help="of the model; only the work with the largest KV cache is done")
    parser.add_argument("--only", nargs="+", default=[""], help="words of the work's name")
    parser.add_argument("--logs", default=".cache/engine-logs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engine.json")
    parser.add_argument("--join", type=Path, help="only take this finished run's points into --out")
    args = parser.parse_args()
    if args.join:
        run = json.loads(args.join.read_text())
        save(args.out, run, run.pop("points"), run.pop("seconds"), join=True)
        return
    if not args.model:
        parser.error("name a model folder, or --join FILE")
    every, suffix = (LONG, f", {args.layers} layers") if args.layers else (WORK, "")
    work = {what: asked for what, asked in every.items() if any(word in what for word in args.only)}
    if not work:
        parser.error(f"--only: no work is called so: {', '.join(every)}")
    part = work != WORK
    Path(args.logs).mkdir(parents=True, exist_ok=True)
    folder = shortened(args.model, args.layers, Path(args.logs) / "model") if args.layers else args.model
    context = multiprocessing.get_context("spawn")
    engines, processes = {}, []
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:.0f} s: {what}", flush=True)

    for side in args.sides:
        engines[side], theirs = context.Pipe()
        body = (theirs, folder, side, args.gigabytes, f"{args.logs}/{side}.log")
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
    report: dict[str, Any] = {
        **machine("torch", "triton", "vllm"),
        "command": shlex.join(["python", "benchmarks/engine.py", Path(args.model).name, *sys.argv[2:]]),
        "date": datetime.date.today().isoformat(),
        "start_seconds_side_by_side": starts,
    }
    seconds: dict[str, list[dict[str, float]]] = {what: [] for what in work}
    rooms: dict[str, float] = {}
    for number in range(-1, args.visits):
        for what in visit(engines, work, number, seconds):
            say(f"visit {number + 1} of {args.visits}: {what}")
            if number >= 0:  # a run that is cut short has said what it saw
                rates = points(work, seconds, suffix)
                save(args.out, report, rates + room_points(rooms), seconds, part)
        for side in [] if part else engines:
            engines[side].send(("room", "", ()))
            rooms[side] = engines[side].recv()
    save(args.out, report, rates + room_points(rooms), seconds, part)
    for connection in engines.values():
        connection.send(None)
    for process in processes:
        process.join(60)
    for peer in [side for side in args.sides if side != OURS]:
        ratios = [row["ratio"] for row in rates if row["name"] == peer]
        print(f"{peer} / ours: geometric mean {statistics.geometric_mean(ratios):.3f}, worst {min(ratios)}")


if __name__ == "__main__":
    main()
