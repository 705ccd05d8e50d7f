"""What changes the fingerprint and what does not: on plain values, and on the configurations that vLLM resolves."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_deterministic.configs import numerics

from vllm_deterministic.contract import Settings
from vllm_deterministic.errors import ConfigurationError
from vllm_deterministic.serving.fingerprint import (
    FINGERPRINT,
    Fingerprint,
    Numerics,
    agree,
    canonical,
    differing_parts,
    engine_parts,
)

NUMERICS = Numerics(
    version="v1",
    trees={"linear": {"rows": 32}},
    architecture={"instructions": ["avx2"]},
    dtype="bfloat16",
    model_code={"class": "LlamaForCausalLM", "source": "0"},
    compile_mode="none",
    libraries={"vllm": "0.32.0"},
)
BASE = Fingerprint(NUMERICS, "w", "t", "c", {"seed": 0})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Numerics)])
def test_every_part_of_the_arithmetic_changes_id_and_fingerprint(field: str) -> None:
    other: Any = "other" if isinstance(getattr(NUMERICS, field), str) else {"other": 1}
    changed = dataclasses.replace(NUMERICS, **{field: other})
    assert changed.id != NUMERICS.id
    assert str(dataclasses.replace(BASE, numerics=changed)) != str(BASE)
    assert differing_parts(dataclasses.replace(BASE, numerics=changed).parts, BASE.parts) == [
        f"numerics.{field}", "numerics_id"
    ]  # fmt: skip


@pytest.mark.parametrize("changed", [{"weights": "x"}, {"tokenizer": "x"}, {"chat_template": "x"}, {"settings": {}}])
def test_what_is_computed_with_it_changes_the_fingerprint_only(changed: dict[str, Any]) -> None:
    other = dataclasses.replace(BASE, **changed)
    assert str(other) != str(BASE)
    assert other.numerics.id == BASE.numerics.id


def test_form_and_order() -> None:
    assert FINGERPRINT.fullmatch(str(BASE))
    one, other = ({"a": 2, "b": 1}, {"b": 1, "a": 2})
    assert dataclasses.replace(NUMERICS, trees=one).id == dataclasses.replace(NUMERICS, trees=other).id


def test_engines_agree_on_what_they_decide() -> None:
    server = dataclasses.replace(BASE, settings={"seed": 0, "front_end": {"response_role": "assistant"}})
    engine = dataclasses.replace(BASE, tokenizer="none", chat_template="none", settings={"seed": 0, "front_end": {}})
    same = engine_parts(engine.parts)
    agree(server.parts, [same, same])
    for part, other in (
        ("numerics.dtype", dataclasses.replace(engine, numerics=dataclasses.replace(NUMERICS, dtype="float32"))),
        ("weights", dataclasses.replace(engine, weights="x")),
        ("settings.seed", dataclasses.replace(engine, settings={"seed": 1, "front_end": {}})),
    ):
        with pytest.raises(ConfigurationError, match=rf"rank 1 differs in {re.escape(part)}"):
            agree(server.parts, [same, engine_parts(other.parts)])
        with pytest.raises(ConfigurationError, match=r"rank 0 differs.*rank 1 differs"):
            agree(other.parts, [same, same])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4),
)


@given(JSON)
def test_canonical_json_reads_back(value: Any) -> None:
    assert json.loads(canonical(value)) == value


def test_weights_digest() -> None:
    torch = pytest.importorskip("torch")
    from vllm_deterministic.serving.weights import digest_of_weights

    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(5, dtype=torch.bfloat16)
    whole = digest_of_weights([("a", a), ("b", b)])
    assert whole == digest_of_weights([("b", b), ("a", a.clone())])
    one_bit = b.clone()
    one_bit.view(torch.int16)[4] ^= 1
    others = [
        [("a", a), ("b", one_bit)], [("a", a)], [("a", a), ("c", b)], [("a", a.reshape(3, 2)), ("b", b)],
        [("a", a), ("b", b.view(torch.float16))], [("a", a.t().contiguous().t().flip(0)), ("b", b)],
    ]  # fmt: skip
    digests = {digest_of_weights(other) for other in others}
    assert len(digests) == len(others)
    assert whole not in digests
    # A tensor of several chunks, and a strided one.
    large = torch.arange(9 * 2**20, dtype=torch.int32)
    assert digest_of_weights([("a", large)]) != digest_of_weights([("a", large + (large == large[-1]))])
    assert digest_of_weights([("a", a.t())]) == digest_of_weights([("a", a.t().contiguous())])


def test_the_named_trees_are_the_executed_ones() -> None:
    pytest.importorskip("torch")
    from vllm_deterministic.kernels.gemm.cpu import REFERENCE_ROWS

    assert numerics("v1")["cpu"]["linear"]["rows"] == REFERENCE_ROWS


# --- on vLLM's own configuration step ---------------------------------------------------------------------------
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512,
    "max_position_embeddings": 256, "torch_dtype": "bfloat16",
}  # fmt: skip
PROGRAM = """
import argparse, json, sys
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm_deterministic.integration import facts
def tokenizer(vocabulary):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "a")))
def of(folder, options, worker, vocabulary):
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", folder, "--skip-tokenizer-init", "--deterministic", *options])
    config = EngineArgs.from_cli_args(args).create_engine_config()
    found = facts.fingerprint(config, args, tokenizer(vocabulary), worker)
    return {"fingerprint": str(found), "id": found.numerics.id, "parts": found.parts}
print(json.dumps([of(*case) for case in json.load(sys.stdin)]))
"""
WORKER = {"weights": "w", "model_code": {"class": "LlamaForCausalLM", "source": "s"}, "architecture": {"isa": "avx2"}}
VOCABULARY = {"a": 0, "b": 1}
TEMPLATE = "{{ messages[0].content }}"
ROPE = {**MODEL, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
# What changed -> (model configuration, options, worker's report, vocabulary).
SAME: dict[str, tuple[Any, ...]] = {
    "max_num_seqs": (MODEL, ["--max-num-seqs", "3"], WORKER, VOCABULARY),
    "chunks": (MODEL, ["--max-num-batched-tokens", "300"], WORKER, VOCABULARY),
    "memory": (MODEL, ["--num-gpu-blocks-override", "40"], WORKER, VOCABULARY),
    "port": (MODEL, ["--port", "8123"], WORKER, VOCABULARY),
    "no prefix cache": (MODEL, ["--no-enable-prefix-caching"], WORKER, VOCABULARY),
    "name": (MODEL, ["--served-model-name", "other"], WORKER, VOCABULARY),
    "logging": (MODEL, ["--disable-log-stats"], WORKER, VOCABULARY),
    "no trees of its own": (MODEL, [], {**WORKER, "trees": {}}, VOCABULARY),
}
OTHER_ID: dict[str, tuple[Any, ...]] = {
    "dtype": (MODEL, ["--dtype", "float32"], WORKER, VOCABULARY),
    "eager": (MODEL, ["--enforce-eager"], WORKER, VOCABULARY),
    "trees": (MODEL, [], {**WORKER, "trees": {"attention_layers": "d"}}, VOCABULARY),
    "instructions": (MODEL, [], {**WORKER, "architecture": {"isa": "avx512"}}, VOCABULARY),
    "model code": (MODEL, [], {**WORKER, "model_code": {"class": "LlamaForCausalLM", "source": "z"}}, VOCABULARY),
}
OTHER: dict[str, tuple[Any, ...]] = OTHER_ID | {
    "weights": (MODEL, [], {**WORKER, "weights": "x"}, VOCABULARY),
    "tokenizer": (MODEL, [], WORKER, {"a": 1, "b": 0}),
    "chat template": (MODEL, ["--chat-template", TEMPLATE], WORKER, VOCABULARY),
    "rope scaling": (ROPE, [], WORKER, VOCABULARY),
    "seed": (MODEL, ["--seed", "7"], WORKER, VOCABULARY),
    "date": (MODEL, ["--deterministic-date", "2026-11-24"], WORKER, VOCABULARY),
    "unseeded": (MODEL, ["--deterministic-unseeded", "random"], WORKER, VOCABULARY),
    "generation config": (MODEL, ["--override-generation-config", '{"temperature": 0.3}'], WORKER, VOCABULARY),
    "logprobs mode": (MODEL, ["--logprobs-mode", "processed_logprobs"], WORKER, VOCABULARY),
    "structured outputs": (MODEL, ["--structured-outputs-config", '{"backend": "guidance"}'], WORKER, VOCABULARY),
    "max_model_len": (MODEL, ["--max-model-len", "128"], WORKER, VOCABULARY),
    "tool parser": (MODEL, ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"], WORKER, VOCABULARY),
}


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("vllm", reason="configures a real vLLM")
    cases = {"base": (MODEL, [], WORKER, VOCABULARY), **SAME, **OTHER}
    given = []
    for number, (model, *rest) in enumerate(cases.values()):
        # Each from a folder of its own: where a model lies is no part of what it is.
        folder: Path = tmp_path_factory.mktemp(f"model{number}")
        (folder / "config.json").write_text(json.dumps(model))
        given.append((str(folder), *rest))
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("what", SAME)
def test_what_changes_no_answer_changes_no_fingerprint(resolved: dict[str, Any], what: str) -> None:
    assert differing_parts(resolved[what]["parts"], resolved["base"]["parts"]) == []
    assert resolved[what]["fingerprint"] == resolved["base"]["fingerprint"]


@pytest.mark.parametrize("what", OTHER)
def test_what_changes_answers_changes_the_fingerprint(resolved: dict[str, Any], what: str) -> None:
    assert resolved[what]["fingerprint"] != resolved["base"]["fingerprint"]
    assert (resolved[what]["id"] != resolved["base"]["id"]) == (what in OTHER_ID)


def test_no_two_of_them_are_the_same(resolved: dict[str, Any]) -> None:
    assert len({resolved[what]["fingerprint"] for what in OTHER}) == len(OTHER)


# --- the day, an input that no request names ----------------------------------------------------------------------
CLOCK = """
import sys
from transformers.utils import chat_template_utils as templates
from vllm_deterministic.integration import hidden_inputs
for date in sys.argv[1:]:
    if date != "unarmed":
        hidden_inputs.arm(None if date == "none" else date)
    try:
        print(templates._compile_jinja_template("{{ strftime_now('%d %b %Y') }}").render())
    except Exception as error:
        print(type(error).__name__)
"""


def test_the_day_is_pinned_or_refused() -> None:
    """The control comes first: without the plugin a chat template sees today's date."""
    pytest.importorskip("vllm", reason="replaces the clock of vLLM's chat templates")
    command = [sys.executable, "-P", "-c", CLOCK, "unarmed", "none", "2001-02-03"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-3:]
    assert said[0].endswith(f"{datetime.date.today():%Y}")
    assert said[1:] == ["VLLMValidationError", "03 Feb 2001"]


@pytest.mark.parametrize("date", ["2026-02-30", "yesterday", "20261124", ""])
def test_no_day_is_named_so(date: str) -> None:
    with pytest.raises(ConfigurationError, match="--deterministic-date"):
        Settings(date=date)
