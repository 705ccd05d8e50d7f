"""The trainer's operators for a card, put together on CPU tensors: Triton's kernels through its interpreter.

Products, SiLU and FlashAttention's gradient have no interpreter: PyTorch stands for them here, row by row or sequence
by sequence. So this shows that the parts fit, not what a card's bits are (tests/gpu/test_train.py).
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("vllm")
transformers = pytest.importorskip("transformers")

from vllm_deterministic.kernels.attention import certify  # noqa: E402
from vllm_deterministic.kernels.norm import rms  # noqa: E402

from vllm_deterministic.train import accumulate, cuda, cuda_attention, deterministic_forward, forward, logprobs  # noqa: E402
from vllm_deterministic.train.cuda_attention import CUDAAttention  # noqa: E402

pytestmark = pytest.mark.slow
LENGTHS = (5, 20, 2)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = torch.stack([torch.mv(weight.float(), row) for row in x.float()])
    return (y if bias is None else y + bias.float()).to(x.dtype)


def attention_gradient(self: CUDAAttention, *operands: Any) -> tuple[torch.Tensor, ...]:
    *tensors, dout, starts, _ = operands
    edges = starts.tolist()
    with torch.enable_grad():
        heads = [t.detach().float().view(len(t), -1, self.size).requires_grad_() for t in tensors]
        out = [
            torch.nn.functional.scaled_dot_product_attention(
                *(part[start:stop].transpose(0, 1) for part in heads), is_causal=True, enable_gqa=True
            ).transpose(0, 1)
            for start, stop in itertools.pairwise(edges)
        ]
        found = torch.autograd.grad(torch.cat(out), heads, dout.float().view(len(dout), -1, self.size))
    return tuple(part.reshape(len(part), -1).to(dout.dtype) for part in found)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    silu = torch.nn.functional.silu
    for where, name, stands in (
        (forward, "device_of", lambda kind: cuda),
        (cuda, "DTYPES", (torch.float16,)),
        (cuda, "_product", product),
        (cuda, "silu_and_mul", lambda gate, up: silu(gate.float()).to(gate.dtype) * up),
        (rms, "rms_norm", rms._norm),
        (rms, "fused_add_rms_norm", rms._add_norm),
        (certify, "prepare", lambda *_: None),
        (cuda_attention, "_processors", lambda device: 32),  # eight of the model's sequences
        (cuda_attention, "_ALONE", 19),
        (CUDAAttention, "_backward", attention_gradient),
    ):
        monkeypatch.setattr(where, name, stands)


def plain(model: Any, ids: list[int]) -> torch.Tensor:
    scores = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return scores.gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(1)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def test_the_parts_fit() -> None:
    config = transformers.Qwen3Config(
        vocab_size=100, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256, initializer_range=0.1,
        tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(2)
    model = transformers.Qwen3ForCausalLM(config).half()
    exact = copy.deepcopy(model).double()
    ids = [torch.randint(0, 100, (length,)).tolist() for length in LENGTHS]
    for model_of in (model, exact):
        sum(plain(model_of, each).sum() for each in ids).backward()
    theirs, truth = gradients(model), gradients(exact)
    with deterministic_forward(model):
        scores = logprobs(model, ids)
        assert all(map(torch.equal, scores, (logprobs(model, [each])[0] for each in ids)))
        for each, score in zip(ids, scores, strict=True):
            assert (score - plain(exact, each)).abs().max() < 0.02
        torch.cat(scores).sum().backward()
        found = [gradients(model)]
        for order, size in ((ids, 1), (ids[::-1], 2)):
            accumulate(model, order, lambda i, each: each.sum(), micro_batch=size)
            found.append(gradients(model))
        model.train().gradient_checkpointing_enable()
        accumulate(model, ids, lambda i, each: each.sum(), micro_batch=3)
        found.append(gradients(model))
    for name, value in truth.items():
        assert all(torch.equal(found[1][name], other[name]) for other in found[2:]), name
        allowed = 2 * (theirs[name] - value).norm() + 2**-9 * value.norm()
        assert max((each[name] - value).norm() for each in found[:2]) <= allowed, name
