"""`vllm-deterministic bisect`: the first operator whose bits depend on who else is served."""

from __future__ import annotations

import argparse
import os
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_deterministic.errors import ConfigurationError, UnsupportedError

if TYPE_CHECKING:
    from vllm_deterministic.integration.digests import Call, Pass

__all__ = ["Culprit", "add_parser", "first_difference"]

_PROMPT = "A lighthouse keeper finds a map behind a loose brick. The map shows"
_SCORED = "generated tokens read as a prompt"


@dataclass(frozen=True)
class Culprit:
    """The first operator that gave a row other bits. alone, other: the calls. rows: of the two batches."""

    stage: str
    key: Hashable
    alone: Call
    other: Call
    rows: tuple[int, int]

    def __str__(self) -> str:
        here = f"token {self.key[0]} at position {self.key[1]}" if isinstance(self.key, tuple) else "a row of logits"
        layer = self.alone.layer or "the model itself"
        shapes = (" and ".join(map(str, call.shapes)) for call in (self.alone, self.other))
        return (
            f"{layer}: {self.alone.operator}\n"
            f"  {here}: other bits with M = {self.rows[1]} than with M = {self.rows[0]}\n"
            "  operands {}\n  against  {}".format(*shapes)
        )


def first_difference(alone: Sequence[Pass], other: Sequence[Pass]) -> tuple[Culprit | None, int]:
    """The first operator of `alone` that made of some row what that layer's same operator made of it nowhere in
    `other`; and how many results of rows were compared.

    A row is found again by its key. Two rows of one batch with one key are left out; of several that it may be in the
    other run, those stay in question that have had the same bits so far. An operator that the layer did not need for
    the other batch is passed over: what comes of it is compared.
    """
    places: dict[tuple[str, Hashable], list[tuple[Pass, int]]] = {}
    called: dict[tuple[int, str, str], list[Call]] = {}
    for one in other:
        for row, key in enumerate(one.keys):
            places.setdefault((one.stage, key), []).append((one, row))
        for call in one.calls:
            called.setdefault((id(one), call.layer, call.operator), []).append(call)
    compared = 0
    for one in alone:
        often = Counter(one.keys)
        left = {row: places.get((one.stage, key), []) for row, key in enumerate(one.keys) if often[key] == 1}
        for call in one.calls:
            for row, candidates in left.items():
                there = [(place, called.get((id(place[0]), call.layer, call.operator), [])) for place in candidates]
                same = [p for p, calls in there if not calls or any(c.rows[p[1]] == call.rows[row] for c in calls)]
                if candidates and not same:
                    (place, calls) = there[0]
                    rows = len(one.keys), len(place[0].keys)
                    return Culprit(one.stage, one.keys[row], call, calls[0], rows), compared
                left[row] = same
                compared += any(calls for _, calls in there)
    return None, compared


def add_parser(subparsers: Any) -> None:
    what = "name the first operator whose bits change with the batch, in an eager engine in this process"
    parser: argparse.ArgumentParser = subparsers.add_parser("bisect", help=what, description=what)
    parser.add_argument("--prompt", default=_PROMPT, help="of the request that is followed")
    parser.add_argument("--tokens", type=int, default=16, help="that it generates (16)")
    parser.add_argument("--neighbours", type=int, default=31, help="the most that are served beside it (31)")
    parser.add_argument("serve", nargs=argparse.REMAINDER, metavar="-- MODEL ...", help="as after `vllm serve`")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what was found; returns 1 where an operator differs, 0 where none does."""
    if args.tokens < 1 or args.neighbours < 1:
        raise ConfigurationError("--tokens and --neighbours must be at least 1")
    serve = args.serve[args.serve[:1] == ["--"] :]
    if not serve or serve[0].startswith("-"):
        raise ConfigurationError("name a model after --, as in: vllm-deterministic bisect -- MODEL --deterministic")
    engine = _engine(*serve)
    from vllm_deterministic.integration.digests import Recorder
    from vllm_deterministic.verify.offline import Engine
    from vllm_deterministic.verify.probes import Probe

    recorder, client = Recorder(), Engine(engine)
    engine.apply_model(recorder.watch)
    config = engine.model_config
    tokenizer = None if config.skip_tokenizer_init else engine.get_tokenizer()
    prompt = tokenizer.encode(args.prompt) if tokenizer else [token % config.get_vocab_size() for token in range(7, 40)]
    probe = Probe("followed", prompt, max_tokens=args.tokens)
    rng = random.Random(0)
    # No token of the prompt: a neighbour's row must not be taken for one of the probe's.
    others = [token for token in range(config.get_vocab_size()) if token not in set(prompt)]

    def neighbour() -> Probe:
        return Probe("other", rng.choices(others, k=rng.randint(2, 60)), max_tokens=rng.randint(2, 2 * args.tokens))

    def recorded(ask: Callable[[], Any]) -> tuple[Any, list[Pass]]:
        client.cold()
        recorder.taken()
        return ask(), recorder.taken()

    client.ask([probe])  # what first calls prepare and certify is no part of the model
    wanted, alone = recorded(lambda: client.ask([probe]))
    ((answer,),) = wanted
    whole = replace(probe, prompt=[*prompt, *answer.token_ids], max_tokens=1)
    ways: dict[str, Callable[[], Any]] = {"alone again": lambda: client.ask([probe])}
    size = 1
    while size <= args.neighbours:
        crowd = [neighbour() for _ in range(size)]
        ways[f"among {size} others"] = lambda crowd=crowd: client.ask([probe], crowd)  # type: ignore[misc]
        size = 2 * size + 1
    ways[_SCORED] = lambda: client.ask([whole])
    for way, ask in ways.items():
        answers, passes = recorded(ask)
        culprit, compared = first_difference(alone, passes)
        if culprit is not None:
            print(f"{way}: the first operator with other bits is\n{culprit}")
            return 1
        print(f"{way}: {compared} results of rows, the same bits each")
        if answers != wanted and ask is not ways[_SCORED]:
            print("but another answer: what differs is behind the model, in the sampler")
            return 1
    return 0


def _engine(model: str, *options: str) -> Any:
    """An eager engine whose core lives in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as missing:
        raise UnsupportedError(f"bisect needs vLLM: {missing}") from missing
    load_general_plugins()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-deterministic bisect -- MODEL"))
    args = parser.parse_args([*options, "--model", model, "--enforce-eager"])
    return LLMEngine.from_engine_args(EngineArgs.from_cli_args(args), usage_context=UsageContext.LLM_CLASS)
