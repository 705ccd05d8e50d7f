"""Logprob and rank of one token a row, on CPU, without writing those of the rest of the vocabulary.

The likeliest token itself comes with them where it is the one that is asked for: a sum of exponentials starts from it.

PyTorch's log_softmax from PyTorch's own vector headers, so the bits are those of whoever asks for more logprobs. It is
compared with PyTorch's before its first use: vectors of another width would add up in another order. Where they differ,
and where there is no C++ compiler, PyTorch computes the whole vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
from collections.abc import Callable
from importlib.resources import files

import torch

__all__ = ["agrees", "chosen_logprobs", "compiled", "likeliest"]

logger = logging.getLogger("vllm.deterministic")

Scores = tuple[torch.Tensor, torch.Tensor]
# From logits and token ids, which it overwrites where they are negative, to scores and whether all of them are numbers.
Operator = Callable[[torch.Tensor, torch.Tensor], tuple[Scores, bool]]
_DTYPES = {torch.float32: "chosen_float32", torch.bfloat16: "chosen_bfloat16"}
# Vector widths and what is left of them, one vocabulary.
_WIDTHS = (1, 15, 16, 33, 1000, 49152)


def chosen_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> Scores:
    """The logprobs [rows] f32 of token_ids [rows] i64, and their ranks [rows] i64: how many of the row are as likely.

    logits: [rows, vocab] f32 or bf16. The bits are those of `logits.log_softmax(-1, dtype=torch.float32)`.
    """
    native = compiled()
    if native is None or logits.dtype not in _DTYPES:
        return _by_pytorch(logits, token_ids)
    return native(logits, token_ids.clone())[0]


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The likeliest token of each row [rows] i64, the first where several are, with its logprob and its rank.

    logits: [rows, vocab] f32 or bf16. None without the compiled operator, and where a row is not made of numbers.
    """
    native = compiled()
    if native is None or logits.dtype not in _DTYPES:
        return None
    token_ids = torch.full((len(logits),), -1)
    scores, numbers = native(logits, token_ids)
    return (token_ids, *scores) if numbers else None


def _by_pytorch(logits: torch.Tensor, token_ids: torch.Tensor) -> Scores:
    logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
    chosen = logprobs.gather(-1, token_ids.unsqueeze(-1))
    return chosen.squeeze(-1), (logprobs >= chosen).sum(-1)


@functools.cache
def compiled() -> Operator | None:
    """The compiled operator, made once a process; None where it could not be, or has other bits than PyTorch."""
    try:
        from torch._inductor.codecache import CppCodeCache

        source = files("vllm_deterministic.kernels.sampling").joinpath("chosen.cpp").read_text()
        library = CppCodeCache.load(source)
        functions = {dtype: _function(library, name) for dtype, name in _DTYPES.items()}
    except Exception as reason:
        logger.warning(
            "logprobs of chosen tokens are computed with those of the whole vocabulary, which takes longer and changes "
            "no bit: the C++ operator could not be compiled. Is g++ installed (or CXX set)? %s",
            str(reason).partition("\n")[0],
        )
        return None

    def run(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[Scores, bool]:
        logits = logits.contiguous()
        logprobs = torch.empty(len(logits))
        ranks = torch.empty(len(logits), dtype=torch.int64)
        tensors = (logits, token_ids, logprobs, ranks)
        numbers = functions[logits.dtype](*(x.data_ptr() for x in tensors), *logits.shape, torch.get_num_threads())
        return (logprobs, ranks), numbers

    return run if agrees(run) else None


def _function(library: ctypes.CDLL, name: str) -> Callable[..., bool]:
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_int]
    function.restype = ctypes.c_bool
    return function


def agrees(run: Operator) -> bool:
    """Whether it has PyTorch's bits: on normal, wide, equal, masked, infinite and NaN rows."""
    generator = torch.Generator().manual_seed(0)
    for dtype, width in itertools.product(_DTYPES, _WIDTHS):
        rows = torch.randn(6, width, generator=generator) * torch.tensor([1.0, 30.0, 0.0, 1.0, 1.0, 1.0]).unsqueeze(-1)
        rows[3, : width // 2] = float("-inf")
        rows[4, width // 3], rows[5, width // 3] = float("inf"), float("nan")
        logits, last, top = rows.to(dtype), torch.full((6,), width - 1), torch.full((6,), -1)
        top[4:] = 0  # where there are no numbers, nothing is likeliest
        for tokens, expected in ((last, last.clone()), (top, logits.argmax(-1) * (top < 0))):
            (mine, my_ranks), numbers = run(logits, tokens)
            if not torch.equal(tokens, expected):
                return False
            theirs, their_ranks = _by_pytorch(logits, tokens)
            known = ~theirs.isnan()
            same = torch.equal(mine[known].view(torch.int32), theirs[known].view(torch.int32))
            if not (same and torch.equal(known, ~mine.isnan()) and torch.equal(my_ranks, their_ranks)):
                return False
            if numbers != bool(known.all()):
                return False
    return True
