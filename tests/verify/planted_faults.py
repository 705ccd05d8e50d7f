"""Faults for the mutation test: each breaks one invariance of a deterministic server.

`plant` is an entry point of vLLM's plugin group that exists on the test's PYTHONPATH only. It reads the fault's name
from the environment and waits for the plugin's own seams: a fault is planted right after the seam beside it was
installed, in the process that installed it.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_deterministic import compat

VARIABLE = "VD_PLANTED_FAULT"
_LAST_OF_WORKER = compat.CPU_SEAMS["top_logprobs"]
_LAST_OF_FRONT_END = compat.REQUEST_SEAMS["process_inputs"]

WORKER: dict[str, Callable[[], None]] = {}
FRONT_END: dict[str, Callable[[], None]] = {}
# The engine's own process, where the scheduler lives, has no seam of the plugin: planted when plugins are loaded.
ENGINE: dict[str, Callable[[], None]] = {}
# Faults that leave one of the plugin's replacements out.
LEFT_OUT = {
    "untiled-linear": compat.CPU_SEAMS["linear"],
    "tie-order": compat.CPU_SEAMS["top_logprobs"],
    "uncut-activation": compat.CPU_SEAMS["activation"],
    "tiles-of-many-rows": compat.CPU_SEAMS["attention"],  # a prefill cuts its keys into smaller tiles than a decode
}


def server_path(folder: Path) -> str:
    """PYTHONPATH of a server that finds `plant`: its entry point is written into `folder`."""
    metadata = folder / "planted_faults-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-faults\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nplanted_faults = planted_faults:plant\n")
    own = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    return os.pathsep.join([*own, str(folder), str(Path(__file__).parent)])


def plant() -> None:
    """Arms the fault named by the environment in this process."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    if name not in set(NAMES):
        raise ValueError(f"no planted fault is called {name!r}")
    if name in ENGINE:
        ENGINE[name]()
    install = compat.install

    def installing(seam: compat.Seam, wrap: Callable[..., Any]) -> None:
        if LEFT_OUT.get(name) != seam:
            install(seam, wrap)
        if seam == _LAST_OF_WORKER and name in WORKER:
            WORKER[name]()
        if seam == _LAST_OF_FRONT_END and name in FRONT_END:
            FRONT_END[name]()

    compat.install = installing


def _wrap(owner: Any, attribute: str, replacement: Callable[..., Any]) -> None:
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(owner, attribute, wrapped)


def _worker(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    return lambda plant_it: WORKER.setdefault(name, plant_it)


def _engine(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    return lambda plant_it: ENGINE.setdefault(name, plant_it)


def _front_end(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    return lambda plant_it: FRONT_END.setdefault(name, plant_it)


@_worker("batch-top-p")
def _batch_top_p() -> None:
    """Every row is cut at the smallest nucleus of the batch."""
    from vllm_deterministic.integration import sampler

    def cut(original: Any, logits: Any, k: Any, p: Any) -> Any:
        return original(logits, k, p if p is None else p.min().expand(p.shape))

    _wrap(sampler, "top_k_top_p_by_row", cut)


@_worker("seed-from-arrival")
def _seed_from_arrival() -> None:
    """A request's noise also depends on how many sampled requests came before it."""
    from vllm_deterministic.integration.sampler import RowNoise

    def init(original: Any, self: Any, request: Any) -> None:
        original(self, request)
        RowNoise.arrived = getattr(RowNoise, "arrived", 0) + 1
        self.arrival = RowNoise.arrived

    _wrap(RowNoise, "__init__", init)
    _wrap(RowNoise, "seed", lambda original, self: original(self) ^ self.arrival)


@_worker("noise-from-row")
def _noise_from_row() -> None:
    """The noise of row i of the batch is shifted by i."""
    from vllm_deterministic.integration import sampler

    def add(original: Any, self: Any, request: Any) -> int:
        row = original(self, request)
        if row in self.generators:
            self.generators[row].row = row
        return row

    from vllm.v1.worker.gpu_input_batch import InputBatch

    _wrap(InputBatch, "add_request", add)
    _wrap(sampler.RowNoise, "seed", lambda original, self: original(self) ^ getattr(self, "row", 0))


@_worker("chunk-norm")
def _chunk_norm() -> None:
    """RMSNorm of more than 64 rows sums the squares in the input's own type instead of float32."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    def forward(original: Any, self: Any, x: Any, residual: Any = None) -> Any:
        if x.shape[0] <= 64:
            return original(self, x, residual)
        total = x if residual is None else x + residual
        scale = (total.pow(2).mean(dim=-1, keepdim=True) + self.variance_epsilon).rsqrt()
        normed = (total * scale).to(x.dtype) * self.weight
        return normed if residual is None else (normed, total)

    _wrap(RMSNorm, "forward_native", forward)


@_engine("stale-prefix")
def _stale_prefix() -> None:
    """The prefix cache's key covers the first eighth of a page: a page with the same beginning is taken for it."""
    from vllm.v1.core import kv_cache_utils

    def hashing(original: Any, function: Any, parent: Any, tokens: Any, extra: Any = None) -> Any:
        return original(function, parent, tokens[: max(1, len(tokens) // 8)], extra)

    _wrap(kv_cache_utils, "hash_block_tokens", hashing)


@_worker("rounded-prompt-logprobs")
def _rounded_prompt_logprobs() -> None:
    """Logprobs of prompt tokens pass through bfloat16."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def rounded(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        for tensors in found.values():
            if tensors is not None:
                tensors.logprobs.copy_(tensors.logprobs.bfloat16().float())
        return found

    _wrap(GPUModelRunner, "_get_prompt_logprobs_dict", rounded)


@_worker("abort-leak")
def _abort_leak() -> None:
    """Sampling noise shifts with every request that ended before its answer was complete."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_deterministic.integration.sampler import RowNoise

    leaked = [0]

    def update(original: Any, self: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        for name in scheduled.finished_req_ids:
            state = self.requests.get(name)
            if state is not None and len(state.output_token_ids) < state.sampling_params.max_tokens - 1:
                leaked[0] += 1
        return original(self, scheduled, *args, **kwargs)

    _wrap(GPUModelRunner, "_update_states", update)
    _wrap(RowNoise, "seed", lambda original, self: original(self) ^ leaked[0])


@_worker("idle-noise")
def _idle_noise() -> None:
    """A request that finds the sampler idle for more than two seconds draws other noise."""
    from vllm_deterministic.integration.sampler import RowNoise

    last = [time.monotonic()]

    def init(original: Any, self: Any, request: Any) -> None:
        original(self, request)
        self.idle = time.monotonic() - last[0] > 2.0

    def seed(original: Any, self: Any) -> int:
        last[0] = time.monotonic()
        return original(self) ^ int(self.idle)

    _wrap(RowNoise, "__init__", init)
    _wrap(RowNoise, "seed", seed)


@_front_end("stream-rounding")
def _stream_rounding() -> None:
    """Streamed logprobs are rounded to four decimals."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.logprobs import LogprobsProcessor

    make = LogprobsProcessor.from_new_request  # the seam that the plugin has put there

    @functools.wraps(make)
    def from_new_request(tokenizer: Any, request: Any) -> Any:
        made = make(tokenizer, request)
        made.streamed = request.sampling_params.output_kind == RequestOutputKind.DELTA
        return made

    LogprobsProcessor.from_new_request = staticmethod(from_new_request)

    def update(original: Any, self: Any, lists: Any) -> None:
        original(self, lists._replace(logprobs=lists.logprobs.round(4)) if self.streamed else lists)

    _wrap(LogprobsProcessor, "_update_sample_logprobs", update)


@_front_end("choice-seeds")
def _choice_seeds() -> None:
    """The seeds of the second and third choice depend on how many requests with several choices came before."""
    from vllm.v1.engine.parallel_sampling import ParentRequest

    asked = [0]

    def child(original: Any, self: Any, index: int) -> Any:
        params = original(self, index)
        if index == 0:
            asked[0] += 1
        elif params.seed is not None:
            params.seed += asked[0]
        return params

    _wrap(ParentRequest, "_get_child_sampling_params", child)


@_front_end("chat-temperature")
def _chat_temperature() -> None:
    """The chat endpoint samples ten per cent hotter than the completions endpoint."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    def params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(self, *args, **kwargs)
        made.temperature *= 1.1
        return made

    _wrap(ChatCompletionRequest, "to_sampling_params", params)


NAMES = sorted({*WORKER, *FRONT_END, *ENGINE, *LEFT_OUT})
