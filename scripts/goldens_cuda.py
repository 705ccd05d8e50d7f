"""Golden bits of a CUDA card: digests of kernels' outputs, and of the answers of small whole engines.

    python scripts/goldens_cuda.py record [--out FOLDER]    # writes FOLDER/VERSION/cuda-….json for this card's family
    python scripts/goldens_cuda.py record --kernels         # the same without engines, which can be added later
    python scripts/goldens_cuda.py answers ENGINE           # one engine's part of it, as a line of JSON

All data are integers times powers of two, made on the CPU: the same on every machine, whatever its card's random
numbers are. So a golden made on one card of a family holds on every other one with the same libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where PYTHONSAFEPATH leaves it out
from goldens import GOLDENS, begun, digest, of_answer, place, write
from vllm_deterministic.kernels import certificates
from vllm_deterministic.kernels.attention.launch import Attention, Batch, Cache, Scratch
from vllm_deterministic.kernels.attention.schedules import DECODE, REFERENCE, Heads
from vllm_deterministic.kernels.attention.tree import Tree, tree_for
from vllm_deterministic.kernels.gemm.reference import bit_reference
from vllm_deterministic.kernels.norm.rms import fused_add_rms_norm, rms_norm
from vllm_deterministic.kernels.sampling import select
from vllm_deterministic.kernels.sampling.draw import draw
from vllm_deterministic.kernels.sampling.scores import Scores

from vllm_deterministic.contract import NUMERICS_VERSIONS
from vllm_deterministic.integration.facts import gpu_architecture
from vllm_deterministic.verify.probes import Probe

ANSWERS = "answers: "  # begins the line with an engine's part
ROWS = 64
# Layers of Qwen3-0.6B and SmolLM2, and one whose k is no multiple of a step: (N, K).
SHAPES = ((4096, 1024), (1024, 3072), (960, 576), (576, 1000))
TREES = {
    "64": tree_for(64),
    "128": tree_for(128),
    "256": tree_for(256),
    "128, window": tree_for(128, window=300),
    "64, window and sink": tree_for(64, window=128, sink=True),
    "128, softcap": tree_for(128, softcap=30.0),
}
KEYS = 1100  # three splits, the last of them cut
VOCABULARY = 32003
_MODEL = {
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "bos_token_id": 1,
    "eos_token_id": 2, "num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192,
}  # fmt: skip
_GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 2}
_GRAPHS = {"cudagraph_capture_sizes": [1, 2, 4, 8, 64]}
# Name -> config.json, and options of the engine.
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen3, bfloat16, compiled": (
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": False},
        {"dtype": "bfloat16", **_GRAPHS},
    ),
    "Qwen2, float16, compiled": (
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **_GROUPED, "tie_word_embeddings": True},
        {"dtype": "float16", **_GRAPHS},
    ),
    "Llama, bfloat16, eager": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_GROUPED, "tie_word_embeddings": True},
        {"dtype": "bfloat16", "enforce_eager": True},
    ),
}  # fmt: skip
_ENGINE = {"max_model_len": 2048, "max_num_batched_tokens": 512, "max_num_seqs": 8, "seed": 0,
           "kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.05, "skip_tokenizer_init": True}  # fmt: skip
_IDS = [(7919 * i + 13) % 8000 + 100 for i in range(700)]
PROBES = (
    Probe("greedy", _IDS[:40], max_tokens=48, logprobs=0),
    Probe("greedy, long prompt", _IDS, max_tokens=32, logprobs=0),
    Probe("seeded", _IDS[:40], max_tokens=48, temperature=0.8, seed=20261125, logprobs=0),
    Probe("seeded, top-p", _IDS[9:70], max_tokens=48, temperature=1.0, seed=7, top_p=0.9, logprobs=0,
          extra_body={"top_k": 50, "repetition_penalty": 1.2}),
)  # fmt: skip


# --- kernels ------------------------------------------------------------------------------------------------------
def wide(*shape: int, seed: int, spread: int = 4) -> torch.Tensor:
    """float32 values of eight bits each, with signs and exponents in [-spread, spread), on which orders of addition
    differ. Exact in half precision."""
    generator = torch.Generator().manual_seed(seed)
    significand = torch.randint(128, 256, shape, generator=generator) * (
        2 * torch.randint(0, 2, shape, generator=generator) - 1
    )
    powers = torch.tensor([2.0**e for e in range(-spread, spread)])
    return significand / 128 * powers[torch.randint(0, 2 * spread, shape, generator=generator)]


def even(*shape: int, seed: int, bits: int, scale: float) -> torch.Tensor:
    """float32 integers below 2**bits in size, times `scale`, a power of two."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 - 2**bits, 2**bits, shape, generator=generator) * scale


def where(device: torch.device) -> dict[str, Any]:
    """What the kernels' bits depend on besides their trees."""
    libraries = {"torch": torch.__version__, "triton": triton.__version__}
    return {"device": "cuda", "architecture": gpu_architecture(device), "libraries": libraries}


def kernels(device: torch.device) -> dict[str, str]:
    """Name -> digest of every kernel's output on fixed data."""
    return dict(_kernels(device))


def _kernels(device: torch.device) -> Iterator[tuple[str, str]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n, k in SHAPES:
            shapes = (ROWS, k), (n, k), (n,)
            x, weight, bias = (wide(*shape, seed=seed).to(device, dtype) for seed, shape in enumerate(shapes))
            found = bit_reference(x, weight, bias), bit_reference(x, weight, None, torch.float32)
            yield f"linear {n}x{k} {_name(dtype)}", digest(*found)
        for size in (128, 1024, 4096):
            # Half precision rounds a sum's last bits away; float32, which is not served, shows every one of them.
            x, residual = (wide(16 * ROWS, size, seed=seed).to(device, dtype) for seed in (1, 2))
            weight = wide(size, seed=3, spread=2).to(device, dtype)
            found = rms_norm(x, weight, 1e-6), *fused_add_rms_norm(x, residual, weight, 1e-6)
            yield f"norm {size} {_name(dtype)}", digest(*found)
    for dtype in (torch.bfloat16, torch.float16):
        for name, tree in TREES.items():
            yield f"attention {name} {_name(dtype)}", digest(attend(tree, Heads(4, 2, 16), dtype, KEYS, device))
    yield from _sampling(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attend(tree: Tree, heads: Heads, dtype: torch.dtype, keys: int, device: torch.device) -> torch.Tensor:
    """fp32 outputs of a whole sequence by the plainest kernel, over pages in descending order."""
    attention = Attention(tree, heads, device, Scratch.empty(heads.query, tree.head_size, device))
    per, size = -(-keys // heads.page), tree.head_size
    q = wide(keys, heads.query, size, seed=4, spread=1).to(device, dtype)
    pages = wide(per, heads.page, heads.kv, 2 * size, seed=5, spread=2).to(device, dtype)
    table = torch.arange(per - 1, -1, -1, dtype=torch.int32, device=device)[None]
    plan = attention.plan(1, keys, keys, DECODE[-1], REFERENCE)
    plan.few = 0
    start, kv_len = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, keys], [keys]))
    plan.fill(start, kv_len, tree)
    out = torch.empty(q.shape, dtype=torch.float32, device=device)
    sinks = torch.arange(-1.0, heads.query - 1, device=device) if tree.sink else None
    attention.run(Batch(q, out, table, plan, sinks), Cache(pages[..., :size], pages[..., size:]), None, REFERENCE)
    return out


def _sampling(device: torch.device) -> Iterator[tuple[str, str]]:
    rows = 8
    k = torch.tensor([VOCABULARY, 20, VOCABULARY, 50, 1, VOCABULARY, 1000, VOCABULARY], dtype=torch.int32)
    p = torch.tensor([1.0, 1.0, 0.95, 0.9, 1.0, 1e-6, 0.999, 0.9999])
    requests, positions = torch.arange(rows, dtype=torch.int32), torch.arange(rows) * 977
    temperatures = torch.tensor([0.0] + [0.8] * (rows - 1))
    seeds = torch.arange(rows) * 2**33 - 12345
    sampled = torch.arange(rows) * 1009
    k, p, requests, positions, temperatures, seeds, sampled = (
        given.to(device) for given in (k, p, requests, positions, temperatures, seeds, sampled)
    )
    for kind, bits in (("fine", 20), ("with ties", 7)):
        x = even(rows, VOCABULARY, seed=6, bits=bits, scale=2.0 ** (3 - bits)).to(device)
        ranks = select.thresholds(x, k, p)
        yield f"top-k, top-p {kind}", digest(select.drop_below(x, ranks))
        drawn = [draw(x, requests, temperatures, seeds, positions + step, ranks) for step in range(32)]
        yield f"drawn {kind}", digest(*drawn)
        scores = Scores(x, sampled, 20)
        ids = torch.cat((sampled[:, None], scores.best), dim=1)
        yield f"scores {kind}", digest(scores.best, scores.ranks, scores.logprobs(ids))


# --- whole engines ------------------------------------------------------------------------------------------------
def checkpoint(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """A model folder: config.json and weights whose every bit is chosen here. No tokenizer."""
    from safetensors.torch import save_file

    config = {**_MODEL, **config, "torch_dtype": _name(dtype)}
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        if config["model_type"] == "qwen3":
            parts |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    weights = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        # Seven bits: norms around 1, matrices with a standard deviation of about 0.04.
        norm = len(shape) == 1
        values = even(*shape, seed=seed, bits=4 if norm else 7, scale=2.0**-6 if norm else 2.0**-11) + float(norm)
        weights[f"{name}.weight"] = values.to(dtype)
        if config["model_type"] == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
            weights[f"{name}.bias"] = even(shape[0], seed=seed + 1000, bits=6, scale=2.0**-6).to(dtype)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")


def answers(engine: str, **options: Any) -> dict[str, Any]:
    """One engine's part of a golden. Its core must live in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""
    from vllm import LLM

    import vllm_deterministic
    from vllm_deterministic.integration.facts import fingerprint
    from vllm_deterministic.verify.offline import Engine

    config, own = ENGINES[engine]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        checkpoint(folder, config, getattr(torch, own["dtype"]))
        enabled = vllm_deterministic.enable()
        llm = LLM(str(folder), additional_config=enabled, **{**_ENGINE, **own, **options})
        found = [answer for answer, *_ in Engine(llm.llm_engine).ask(PROBES)]
        report = llm.collective_rpc("deterministic_report")[0]
        parts = fingerprint(llm.llm_engine.vllm_config, None, None, report).parts
    digests = {probe.name: of_answer(answer, probe.prompt) for probe, answer in zip(PROBES, found, strict=True)}
    return {"name": engine, "where": place(parts), "digests": digests}


def ask_all() -> list[dict[str, Any]]:
    """Every engine's part, of processes side by side on the first card. Raises SystemExit where one fails."""

    def ask(engine: str) -> dict[str, Any]:
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "answers", engine]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{engine}: status {done.returncode}, see above")
        said = [line for line in done.stdout.splitlines() if line.startswith(ANSWERS)]  # engines print there, too
        made: dict[str, Any] = json.loads(said[-1].removeprefix(ANSWERS))
        return made

    with ThreadPoolExecutor(len(ENGINES)) as pool:
        return list(pool.map(ask, ENGINES))


def record(out: Path, version: str, command: str, engines: bool) -> Path:
    """Writes the golden of this card's family. Raises SystemExit where one with other bits exists."""
    device = torch.device("cuda", 0)
    machine = certificates.card(device, Path(__file__).parent)
    made = begun(version, "cuda", command, {name: machine[name].strip() for name in ("card", "driver")})
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_all if engines else list)
        made["kernels"] = {"where": where(device), "digests": kernels(device)}
        made["answers"] = asked.result()
    return write(out, made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record")
    recording.add_argument("--numerics", choices=NUMERICS_VERSIONS, default=NUMERICS_VERSIONS[-1])
    recording.add_argument("--out", type=Path, default=GOLDENS)
    recording.add_argument("--kernels", action="store_true", help="no whole engines")
    actions.add_parser("answers").add_argument("engine", choices=ENGINES)
    args = parser.parse_args()
    if args.action == "answers":
        print(ANSWERS + json.dumps(answers(args.engine)), flush=True)
    else:
        command = "scripts/goldens_cuda.py record" + " --kernels" * args.kernels
        print(record(args.out, args.numerics, command, not args.kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
