"""Golden bits: digests of kernels' outputs on fixed hard data, and of a real model's whole answers.

    .venv/bin/python scripts/goldens.py record      # writes tests/goldens/VERSION/cpu-….json for this machine
    python scripts/goldens_cuda.py record           # the same for a card

A golden holds for one numerics version and one architecture with its library versions. Tests recompute it; bits that
changed while all of that stayed are a change of answers, which needs a new numerics version. `record` is for a new
version, architecture or library: it refuses to replace a golden whose bits are others.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm_deterministic.configs import numerics
from vllm_deterministic.kernels.gemm import cpu
from vllm_deterministic.kernels.sampling.noise import derive_seed, noise_seed
from vllm_deterministic.kernels.sampling.top import top_logprobs
from vllm_deterministic.kernels.sampling.truncate import top_k_top_p_by_row

from vllm_deterministic import __version__, compat, models
from vllm_deterministic.contract import NUMERICS_VERSIONS
from vllm_deterministic.integration.facts import cpu_architecture
from vllm_deterministic.serving.receipts import Chain, prompt_digest
from vllm_deterministic.verify.probes import Answer, Endpoint, Probe, ask
from vllm_deterministic.verify.server import serve

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"
# The default model's layers, and one wider: (N, K).
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (2048, 2048))
ROWS = 64
SERVERS = {
    "bfloat16 compiled": ("bfloat16", ()),
    "float32 eager": ("float32", ("--enforce-eager",)),
}
STORY = "A lighthouse keeper finds a map behind a loose brick. The map shows an island that no sailor has ever named. "
PROBES = (
    Probe("greedy", prompt=STORY, max_tokens=32, logprobs=0, extra_body={"ignore_eos": True}),
    Probe("greedy, long prompt", prompt=STORY * 12, max_tokens=16, logprobs=0, extra_body={"ignore_eos": True}),
    Probe("seeded", prompt=STORY, max_tokens=32, temperature=0.8, seed=20261125, logprobs=0,
          extra_body={"ignore_eos": True}),
    Probe("seeded, top-p", prompt=STORY, max_tokens=32, temperature=1.0, seed=7, top_p=0.9, logprobs=0,
          extra_body={"ignore_eos": True, "top_k": 50}),
)  # fmt: skip
# Parts of a fingerprint that say where the trees run and on which model. The settings are those of SERVERS.
_PLACE = [f"numerics.{name}" for name in ("architecture", "dtype", "model_code", "compile_mode", "libraries")]
_PLACE += ["weights", "tokenizer"]


def digest(*tensors: torch.Tensor) -> str:
    """sha256 of the tensors' bytes; a NaN is a NaN, whatever its payload."""
    whole = hashlib.sha256()
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor = tensor.masked_fill(tensor.isnan(), float("nan"))
        whole.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return whole.hexdigest()


def where() -> dict[str, Any]:
    """What the kernels' bits depend on here besides their trees."""
    return {
        "device": "cpu",
        "architecture": cpu_architecture(),
        "libraries": {"vllm": compat.vllm_version(), "torch": torch.__version__},
    }


def kernels() -> dict[str, str]:
    """Name -> digest of every CPU kernel's output on fixed data."""
    return dict(_kernels())


def _kernels() -> Iterator[tuple[str, str]]:
    from vllm_deterministic.integration.linear import packed_product

    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for n, k in SHAPES:
            weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(dtype)
            x = cpu.hard_rows(ROWS, k, dtype)
            yield f"linear {n}x{k} {name}", digest(cpu.reference(packed_product(weight, None), x, n))
    seeds = [noise_seed(seed, position) for seed in (0, 1, 2**63 - 1) for position in (0, 1, 4095)]
    drawn = [torch.rand(997, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    yield "noise", digest(torch.tensor(seeds), *drawn)
    yield "derived seeds", digest(torch.tensor([derive_seed(server, b"content") for server in (0, 1)]))
    logits = torch.randn(8, 997, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, 10] = logits[:, 11]  # a tie
    limits = torch.tensor([997, 50, 20, 3, 1, 997, 997, 100], dtype=torch.int32)
    nucleus = torch.tensor([1.0, 1.0, 0.9, 0.999, 1.0, 0.5, 1e-6, 0.8])
    yield "top-k, top-p", digest(top_k_top_p_by_row(logits.clone(), limits, nucleus))
    yield "top logprobs", digest(*top_logprobs(logits, 20))


def of_answer(answer: Answer, prompt: Sequence[int]) -> dict[str, Any]:
    """Digests of an answer to a prompt of these token ids, as a receipt makes them."""
    chain = Chain(prompt_digest(prompt), 0)
    chain.add(answer.token_ids, answer.logprobs)
    ended = chain.finish("length")
    return {"tokens": ended.tokens, "token_ids": ended.token_chain[-1], "logprobs": ended.logprob_chain[-1]}


def answers(endpoint: Endpoint) -> dict[str, Any]:
    """Probe -> digests of its answer."""
    found = {probe.name: asyncio.run(ask(endpoint, probe))[0] for probe in PROBES}
    return {name: of_answer(answer, answer.prompt_token_ids) for name, answer in found.items()}


def place(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a server's fingerprint by which a golden is found."""
    return {name: parts[name] for name in _PLACE}


def outdated(made: Mapping[str, Any]) -> str:
    """Why a golden says nothing any more: its version was not frozen, and its trees were changed. Else empty.

    Raises SystemExit for a tree that was changed after release 1.0 froze it.
    """
    if made["trees"] == numerics(made["numerics"])[made["kernels"]["where"]["device"]]:
        return ""
    if int(__version__.partition(".")[0]) >= 1:
        raise SystemExit(f"numerics {made['numerics']} is frozen, and its trees have been changed")
    return f"numerics {made['numerics']} is not frozen and its trees have changed: record them again"


def goldens(version: str) -> list[dict[str, Any]]:
    """Every golden of a numerics version."""
    return [json.loads(file.read_text()) for file in sorted((GOLDENS / version).glob("*.json"))]


def record(out: Path, version: str, command: str) -> Path:
    """Writes the golden of this machine. Raises SystemExit where one with other bits exists."""
    import openai

    made = begun(version, "cpu", command, {"processor": cpu.machine({})})
    made["kernels"] = {"where": where(), "digests": kernels()}
    for name, (dtype, options) in SERVERS.items():
        options = ("--deterministic", "--dtype", dtype, "--max-model-len", "2048", *options)
        with serve(models.prepare_default_model(dtype=dtype), *options, timeout=900,
                   env={"VLLM_CPU_KVCACHE_SPACE": "1"}) as server:  # fmt: skip
            with openai.OpenAI(base_url=server.url, api_key="EMPTY",
                               http_client=openai.DefaultHttpxClient(trust_env=False)) as client:  # fmt: skip
                parts = client.get("/deterministic", cast_to=object)["parts"]
            made["answers"].append({"name": name, "where": place(parts), "digests": answers(server.endpoint)})
    return write(out, made)


def begun(version: str, device: str, command: str, machine: Mapping[str, Any]) -> dict[str, Any]:
    """A golden without its digests. machine: what it was made on, for people; it is no key."""
    provenance = {"date": datetime.date.today().isoformat(), "command": command, "package": __version__, **machine}
    return {
        "numerics": version,
        "provenance": provenance,
        "trees": numerics(version)[device],
        "kernels": {},
        "answers": [],
    }


def write(out: Path, made: Mapping[str, Any]) -> Path:
    """Writes a golden under the name of its place; answers that are there already and were not asked now stay.

    Raises SystemExit where one with other bits exists.
    """
    where = made["kernels"]["where"]
    key = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:12]
    file = out / made["numerics"] / f"{where['device']}-{key}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    if before and not outdated(before):
        now = {(entry["name"], str(entry["where"])): entry for entry in made["answers"]}
        kept = {(entry["name"], str(entry["where"])): entry for entry in before["answers"]}
        if before["kernels"] != made["kernels"] or any(now.get(name, entry) != entry for name, entry in kept.items()):
            raise SystemExit(f"{file} has other bits: a change of bits is a new numerics version, not a new golden")
        made = {**made, "answers": list((kept | now).values())}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made, indent=2) + "\n")
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record"])
    parser.add_argument("--numerics", choices=NUMERICS_VERSIONS, default=NUMERICS_VERSIONS[-1])
    args = parser.parse_args()
    print(record(GOLDENS, args.numerics, "scripts/goldens.py " + " ".join(sys.argv[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
