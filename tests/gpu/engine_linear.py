"""One real engine, asked one prompt alone and in company. Run by test_engine_linear.py; prints one line of JSON.

usage: engine_linear.py MODEL_FOLDER WORKER(ours|default) [planted] [eager]
"""

from __future__ import annotations

import json
import random
import sys
import zlib

import torch
import vllm.model_executor.model_loader.dummy_loader as dummy_loader
from vllm import LLM, SamplingParams

OURS = "vllm_deterministic.integration.gpu_worker.DeterministicGPUWorker"


def fill(self: object, model: torch.nn.Module, model_config: object) -> None:
    """Norms at one, matrices N(0, 0.03), each from its own seed: weights with which the text varies."""
    for name, parameter in sorted(model.named_parameters()):
        generator = torch.Generator("cuda").manual_seed(zlib.crc32(name.encode()))
        if parameter.dim() == 1 and "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cuda").mul_(0.03))


def plant() -> None:
    """The planted fault of a model that multiplies matrices by itself."""
    from vllm.model_executor.models.qwen2 import Qwen2MLP

    def forward(self: Qwen2MLP, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.nn.functional.linear(x, self.gate_up_proj.weight)
        return self.down_proj(self.act_fn(gate_up))[0]

    Qwen2MLP.forward = forward


def main() -> None:
    folder, worker, *how = sys.argv[1:]
    dummy_loader.DummyModelLoader.load_weights = fill
    if "planted" in how:
        plant()
    llm = LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=160, seed=0,
        kv_cache_memory_bytes=3 << 30, gpu_memory_utilization=0.1, disable_log_stats=True,
        enforce_eager="eager" in how, **({"worker_cls": OURS} if worker == "ours" else {}),
    )  # fmt: skip
    rng = random.Random(1)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def ids(count: int) -> list[int]:
        return [rng.randrange(100, vocabulary) for _ in range(count)]

    probe = ids(48)
    report: dict[str, object] = {}
    for kind, extra in (("greedy", {"temperature": 0.0}), ("seeded", {"temperature": 1.0, "seed": 7})):
        asked = SamplingParams(max_tokens=48, ignore_eos=True, logprobs=1, detokenize=False, **extra)
        other = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True, detokenize=False)
        answers = set()
        for company in (0, 1, 2, 6, 16, 32, 64, 128):
            prompts = [probe, *(ids(rng.randrange(4, 60)) for _ in range(company))]
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
            output = llm.generate(inputs, [asked] + [other] * company, use_tqdm=False)[0].outputs[0]
            logprobs = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
            answers.add((tuple(output.token_ids), tuple(logprobs)))
        report[kind] = {"answers": len(answers), "texts": len({tokens for tokens, _ in answers})}
        report[kind]["distinct_tokens"] = len(set(next(iter(answers))[0]))
    if worker == "ours":
        from vllm_deterministic.kernels.gemm import dispatch

        plans = dispatch._plans.values()
        report["layers"] = sorted(str(plan.problem) for plan in plans)
        report["families"] = sorted({plan.choose(m)[0].family for plan in plans for m in (1, 8, 32, 160)})
    print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
