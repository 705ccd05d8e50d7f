"""What a fingerprint names, end to end: one server for each setting, its fingerprint and its answers beside another's.

The servers are small: random weights, two layers, the default model's tokenizer. Trees are not among the settings:
there is one version of them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vllm_deterministic.serving.fingerprint import differing_parts
from vllm_deterministic.train import LiveServer
from vllm_deterministic.verify.probes import Probe, ask
from vllm_deterministic.verify.server import serve

pytestmark = [pytest.mark.serving, pytest.mark.slow]

SCHEMA = {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]}
_TOLD = {"prompt": "The Captain of the Mail Boat", "max_tokens": 24, "logprobs": 0, "extra_body": {"ignore_eos": True}}
PROBES = [
    Probe("greedy", **_TOLD),
    Probe("seeded", temperature=0.8, seed=7, **_TOLD),
    Probe("unseeded", temperature=0.8, **_TOLD),
    Probe("chat", chat=True, **_TOLD),
    Probe("held", **_TOLD | {"extra_body": {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}}),
]
ALL = frozenset(probe.name for probe in PROBES)


@dataclasses.dataclass(frozen=True)
class Case:
    """How a server differs from the first one.

    parts: those of the fingerprint that differ. moves: the probes whose answers must differ, may: those that may. The
    answers to all others must be the same bits.
    """

    options: tuple[str, ...] = ()
    model: str = "base"
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parts: frozenset[str] = frozenset()
    moves: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()


def case(*options: str, parts: str = "", moves: str = "", may: str = "", model: str = "base", **env: str) -> Case:
    given = (frozenset(names.split()) for names in (parts, moves, may))
    return Case(options, model, env, *given)


EVERY = " ".join(ALL)
SAME = {
    "max_num_seqs": case("--max-num-seqs", "3"),
    "chunks": case("--max-num-batched-tokens", "64", "--max-num-seqs", "16"),
    "blocks": case("--num-gpu-blocks-override", "9"),
    "memory": case(VLLM_CPU_KVCACHE_SPACE="2"),
    "no prefix cache": case("--no-enable-prefix-caching"),
    "threads": case(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="3"),
    "schedules": case(PYTHONPATH="@schedules"),
    "name and port": case("--served-model-name", "other"),  # each server has a port of its own
}
OTHER = {
    "dtype": case("--dtype", "float32", parts="numerics_id numerics.dtype", moves=EVERY),
    "instructions": case(parts="numerics_id numerics.architecture", may=EVERY, ATEN_CPU_CAPABILITY="avx2"),
    # transformers gives another family another tokenizer, whatever the folder says
    "model code": case(
        "--tokenizer", "@base", model="family", moves=EVERY,
        parts="numerics_id numerics.model_code weights settings.model_config",
    ),
    "weights": case(model="weights", parts="weights", moves=EVERY),
    "rope scaling": case(model="rope", parts="settings.rope settings.model_config", moves=EVERY),
    "tokenizer": case("--tokenizer", "@tokenizer", parts="tokenizer", moves=EVERY),
    "chat template": case("--chat-template", "@template", parts="chat_template", moves="chat"),
    "seed": case("--seed", "9", parts="settings.seed", moves="unseeded"),
    "generation config": case(
        model="sampling", parts="settings.generation_config", moves="seeded unseeded", may="greedy chat held"
    ),
    "its override": case(
        "--override-generation-config", '{"top_k": 2}', parts="settings.generation_config", moves="seeded unseeded"
    ),
    # Greedy logits are processed by nothing but a grammar, whose mask is in vLLM's raw logits already.
    "logprobs mode": case(
        "--logprobs-mode", "processed_logprobs", parts="settings.logprobs_mode", moves="seeded unseeded"
    ),
    "structured outputs": case(
        "--structured-outputs-config", '{"backend": "guidance"}', parts="settings.structured_outputs", may="held"
    ),
    "max_model_len": case("--max-model-len", "512", parts="settings.max_model_len"),
}  # fmt: skip


# A plugin of vLLM that exists on one server's path: of the certified schedules it takes the largest number of rows in
# every linear layer, and attends to one query at a time.
SCHEDULES = """
def plant():
    from vllm_deterministic.kernels.attention import cpu as attention
    from vllm_deterministic.kernels.gemm import cpu, rows
    add = rows.add_schedule
    rows.add_schedule = lambda product, n, k, found: add(product, n, k, cpu.RowSchedule((found.tile,) * found.tile))
    attention.tokens_of_a_round = lambda *shape: 1
"""


@dataclasses.dataclass(frozen=True)
class Seen:
    """A server as its client sees it. answers: token ids and the bits of their logprobs, by probe.

    certified: what GET /deterministic says of schedules; no part of what is compared.
    """

    fingerprint: str
    parts: Mapping[str, Any]
    answers: Mapping[str, Any]
    certified: Any = dataclasses.field(compare=False)


@pytest.fixture(scope="module")
def folders(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models, and a tokenizer and a chat template of another kind."""
    import torch
    import transformers

    root = tmp_path_factory.mktemp("models")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model("bfloat16"))

    def make(name: str, seed: int = 1, family: str = "Llama") -> Path:
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
            initializer_range=0.2,
        )  # fmt: skip
        built = getattr(transformers, f"{family}ForCausalLM")(config)
        built.to(torch.bfloat16).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        return root / name

    def edited(source: Path, name: str, file: str, **members: Any) -> Path:
        shutil.copytree(source, root / name)
        path = root / name / file
        path.write_text(json.dumps(json.loads(path.read_text()) | members))
        return root / name

    base = make("base")
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    about = root / "schedules" / "other_schedules-0.dist-info"
    about.mkdir(parents=True)
    (root / "schedules" / "other_schedules.py").write_text(SCHEDULES)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-schedules\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nother_schedules = other_schedules:plant\n")
    (root / "template").write_text("{% for message in messages %}Q: {{ message.content }}\nA:{% endfor %}")
    return {
        "base": base,
        "weights": make("weights", seed=2),
        "family": make("family", family="Qwen2"),
        "rope": edited(base, "rope", "config.json", rope_parameters=rope),
        "sampling": edited(base, "sampling", "generation_config.json", top_k=2, repetition_penalty=1.3),
        "tokenizer": edited(base, "tokenizer", "tokenizer.json", normalizer={"type": "Lowercase"}),
        "template": root / "template",
        "schedules": root / "schedules",
    }


@pytest.fixture(scope="module")
def see(servers: Any, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Seen]:
    """Starts a server, asks it everything, and ends it."""
    servers.stop()
    logs = tmp_path_factory.mktemp("logs")

    async def answers(endpoint: Any) -> dict[str, Any]:
        found = [(probe.name, (await ask(endpoint, probe))[0]) for probe in PROBES]
        return {name: (answer.token_ids, answer.logprob_bits) for name, answer in found}

    def seeing(one: Case) -> Seen:
        options = [str(folders[option[1:]]) if option[0] == "@" else option for option in one.options]
        sizes = ["--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager"]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", **one.env}
        if "PYTHONPATH" in env:
            path = [os.environ.get("PYTHONPATH", ""), str(folders[env["PYTHONPATH"][1:]])]
            env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        # Of an option that is said twice the last one counts.
        with serve(folders[one.model], *sizes, *options, "--deterministic", env=env, log=logs / "log") as server:
            said = LiveServer(server.url).description()
            return Seen(said["fingerprint"], said["parts"], asyncio.run(answers(server.endpoint)), said["certified"])

    return seeing


@pytest.fixture(scope="module")
def base(see: Callable[[Case], Seen]) -> Seen:
    return see(Case())


@pytest.mark.parametrize("what", SAME)
def test_what_changes_no_answer_changes_no_fingerprint(see: Callable[[Case], Seen], base: Seen, what: str) -> None:
    seen = see(SAME[what])
    assert seen == base
    assert what != "schedules" or seen.certified != base.certified


@pytest.mark.parametrize("what", OTHER)
def test_what_changes_answers_changes_the_fingerprint(see: Callable[[Case], Seen], base: Seen, what: str) -> None:
    one = OTHER[what]
    seen = see(one)
    assert seen.fingerprint != base.fingerprint
    assert set(differing_parts(seen.parts, base.parts)) == one.parts
    moved = {name for name in ALL if seen.answers[name] != base.answers[name]}
    assert one.moves <= moved <= one.moves | one.may
