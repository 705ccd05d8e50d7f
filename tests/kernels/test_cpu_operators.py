"""What vLLM's CPU build brings besides linear layers, operator by operator: a row's bits do not see the other rows.

Norms, rotary embedding and log-softmax are left as they are, the activation is cut at the border of rows, and attention
is asked without KV split and in rounds of one: that they are on one tree then is checked here, eager and compiled, with
one thread, with two, and with 5 and 7, whose equal shares of a batch end within a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch")
platforms = pytest.importorskip("vllm.platforms")
if not platforms.current_platform.is_cpu():
    pytest.skip("the CPU kernels are in the CPU build only", allow_module_level=True)
platforms.current_platform.import_kernels()

from vllm import _custom_ops as ops  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # noqa: E402
from vllm_deterministic.kernels import activation  # noqa: E402
from vllm_deterministic.kernels.attention import cpu  # noqa: E402
from vllm_deterministic.kernels.gemm.cpu import hard_rows  # noqa: E402

from vllm_deterministic.errors import CertificationError  # noqa: E402
from vllm_deterministic.integration import cpu_activation, cpu_attention  # noqa: E402

ROWS, HIDDEN, HEADS, GROUPS, HEAD = 150, 576, 9, 3, 64
WIDER = 5
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


with_threads = pytest.mark.parametrize("threads", [1, 2], indirect=True)


def on_one_thread(op: Callable[[], torch.Tensor]) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return op()
    finally:
        torch.set_num_threads(before)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """NaN equals NaN: its payload is no part of an answer."""
    return torch.equal(left.nan_to_num(), right.nan_to_num()) and torch.equal(left.isnan(), right.isnan())


def row_by_row(op: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor) -> bool:
    """Whether every row has the bits that the whole batch has on one thread: alone, in other company, elsewhere.

    op: takes rows [M, ...] and their positions [M]; returns one row of results each.
    """
    positions = (torch.arange(len(x)) * 37) % 2000
    expected = on_one_thread(lambda: op(x.clone(), positions))
    for count in (1, 2, 3, 5, 8, 17, 32, 33, 64, 100, len(x)):
        for start in {0, (53 * count) % (len(x) - count + 1), len(x) - count}:
            stop = start + count
            if not same_bits(op(x[start:stop].clone(), positions[start:stop]), expected[start:stop]):
                return False
    return True


def rms_norm(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    from vllm.model_executor.layers.layernorm import RMSNorm

    layer = RMSNorm(HIDDEN, dtype=dtype)
    return lambda x, positions: layer(x)


def rms_norm_with_residual(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    from vllm.model_executor.layers.layernorm import RMSNorm

    layer = RMSNorm(HIDDEN, dtype=dtype)
    return lambda x, positions: torch.cat(layer(x, x.flip(-1).contiguous()), -1)


def norm_of_heads(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Qwen3's norm of queries and keys."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    layer = RMSNorm(HEAD, dtype=dtype)
    return lambda x, positions: layer(x.view(-1, HEADS, HEAD)).reshape(x.shape)


def swiglu(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """As armed: the seam's function, over wider rows than the others, which a thread's share would cut."""
    from vllm.model_executor.layers.activation import SiluAndMul

    silu_and_mul = cpu_activation.by_whole_rows(SiluAndMul.forward_native)
    return lambda x, positions: silu_and_mul(x.repeat(1, WIDER))


def rotary_embedding(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    layer = get_rope(HEAD, 2048, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, dtype=dtype)
    return lambda x, positions: torch.cat(layer(positions, x, x[:, : GROUPS * HEAD].contiguous()), -1)


def log_softmax(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    from vllm.v1.sample.sampler import Sampler

    return lambda x, positions: Sampler.compute_logprobs(x.repeat(1, 85).float())  # a vocabulary of 48,960


OPERATORS = (rms_norm, rms_norm_with_residual, norm_of_heads, swiglu, rotary_embedding, log_softmax)


WAYS = [
    *(("eager", threads) for threads in (1, 2, 5, 7)),
    *(("compiled", threads) for threads in (1, 2)),
    *(pytest.param("compiled", threads, marks=pytest.mark.slow) for threads in (5, 7)),
]


@dtypes
@pytest.mark.parametrize(("how", "threads"), WAYS, indirect=["threads"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_a_row_does_not_see_the_others(operator, how: str, threads: int, dtype: torch.dtype) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    if how == "compiled" and operator is log_softmax:
        pytest.skip("vLLM's sampler is not compiled; Inductor shares a long row among 5 or 7 threads, which changes it")
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        op = operator(dtype)
        if how == "compiled":
            torch._dynamo.reset()
            op = torch.compile(op, dynamic=True)
        assert row_by_row(op, hard_rows(ROWS, HIDDEN, dtype))


@with_threads
def test_the_check_sees_a_batch_dependent_sum(threads: int) -> None:
    """The control: torch's own product of one row is another tree than that of many."""
    weight = torch.randn(1536, HIDDEN, generator=torch.Generator().manual_seed(0))
    assert not row_by_row(
        lambda x, positions: torch.nn.functional.linear(x, weight), hard_rows(ROWS, HIDDEN, torch.float32)
    )


@pytest.mark.parametrize("threads", [5, 7], indirect=True)
def test_vllms_own_activation_is_cut_within_rows(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control; and a server whose PyTorch deals out otherwise than we think does not start."""
    width = 1536
    x = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([torch.nn.functional.silu(row) for row in x.split(1)])
    for op, invariant in ((torch.nn.functional.silu, False), (activation.silu, True)):
        assert all(torch.equal(op(x[:rows]), expected[:rows]) for rows in range(ROWS)) is invariant
    activation.certify.__wrapped__(width, torch.float32, threads)
    monkeypatch.setattr(activation, "whole_rows", lambda rows, width, threads: rows)
    with pytest.raises(CertificationError, match=f"with {threads} threads.*VLLM_CPU_OMP_THREADS_BIND"):
        activation.certify.__wrapped__(width, torch.float32, threads)


def test_whole_rows() -> None:
    assert [activation.whole_rows(rows, 1536, 1) for rows in (1, 22, 1000)] == [1, 22, 1000]
    assert [activation.whole_rows(rows, 1536, 5) for rows in (21, 22, 23, 86, 150, 151)] == [21, 22, 22, 84, 150, 150]
    assert activation.whole_rows(9, 40_000, 2) == 1


PAGE = 128
# Tokens of each sequence in the cache; the first one is compared.
LENGTHS = (1700, 1, 300, 129, 900, 64, 257, 1024)


def drawn(generator: torch.Generator, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values of a sequence: [length, heads, HEAD] each."""
    return [torch.randn(length, heads, HEAD, generator=generator).to(dtype) for heads in (HEADS, GROUPS, GROUPS)]


class Attention:
    """A paged cache that holds sequences of LENGTHS, and vLLM's kernel over any queries of them."""

    def __init__(self, dtype: torch.dtype, cut: bool = True, split: bool = False, window: int = -1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dtype, self.cut, self.split, self.window = dtype, cut, split, window
        self.isa = _get_attn_isa(dtype, PAGE, HEAD)
        pages = [-(-length // PAGE) for length in LENGTHS]
        order = torch.randperm(sum(pages), generator=generator)
        self.table = torch.zeros(len(LENGTHS), max(pages), dtype=torch.int32)
        for row, held in enumerate(order.split(pages)):
            self.table[row, : len(held)] = held
        whole = torch.zeros(sum(pages), GROUPS, PAGE, 2 * HEAD, dtype=dtype).view(-1, GROUPS, 2 * PAGE, HEAD)
        self.keys, self.values = whole.chunk(2, dim=2)
        self.queries = []
        for row, length in enumerate(LENGTHS):
            q, k, v = drawn(generator, length, dtype)
            at = torch.arange(length)
            slots = self.table[row, at // PAGE].long() * PAGE + at % PAGE
            ops.cpu_attn_reshape_and_cache(k, v, self.keys, self.values, slots, self.isa)
            self.queries.append(q)

    def run(self, *chunks: tuple[int, int, int]) -> list[torch.Tensor]:
        """Outputs [stop - start, HEADS, HEAD] of each (sequence, start, stop): queries of a chunk of a sequence."""
        table = self.table[[row for row, _, _ in chunks]]
        query = torch.cat([self.queries[row][start:stop] for row, start, stop in chunks])
        sizes = [stop - start for _, start, stop in chunks]
        starts = torch.tensor([0, *sizes]).cumsum(0).int()
        lengths = torch.tensor([stop for _, _, stop in chunks], dtype=torch.int32)
        if self.cut:
            starts, lengths, owner = cpu.pieces(starts, lengths, cpu.tokens_of_a_round(self.isa, HEADS, GROUPS))
            table = table[owner]
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths), num_heads=HEADS, num_kv_heads=GROUPS, head_dim=HEAD, seq_lens=lengths,
            dtype=self.dtype, query_start_loc=starts, causal=True, sliding_window_size=self.window, isa=self.isa,
            enable_kv_split=self.split,
        )  # fmt: skip
        output = torch.empty_like(query)
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=self.keys, value_cache=self.values, output=output, query_start_loc=starts,
            seq_lens=lengths, scale=HEAD**-0.5, causal=True, alibi_slopes=None, sliding_window=self.window,
            block_table=table, softcap=0.0, scheduler_metadata=plan, s_aux=None,
        )  # fmt: skip
        return list(output.split(sizes))

    def of_the_last_token(self) -> list[torch.Tensor]:
        """The first sequence's last token: decoded alone and in company, as a chunk's end, as a whole prefill's."""
        last = (0, LENGTHS[0] - 1, LENGTHS[0])
        decodes = [(row, length - 1, length) for row, length in enumerate(LENGTHS) if row]
        prefills = [(row, 0, length) for row, length in enumerate(LENGTHS) if row]
        batches = [
            [last], [last, *decodes], [*decodes, last], [last, *prefills], [*prefills[:3], last, *decodes[3:]],
            *([(0, LENGTHS[0] - size, LENGTHS[0])] for size in (2, 7, 16, 64, 257, LENGTHS[0])),
            [*prefills, (0, LENGTHS[0] - 100, LENGTHS[0])],
        ]  # fmt: skip
        found = []
        for batch in batches:
            at = next(place for place, (row, _, _) in enumerate(batch) if row == 0)
            found.append(self.run(*batch)[at][-1])
        return found


def alike(outputs: list[torch.Tensor]) -> bool:
    return all(torch.equal(outputs[0], other) for other in outputs)


@dtypes
@with_threads
@pytest.mark.parametrize("window", [-1, 200], ids=["full", "window"])
def test_attention_in_rounds_of_one(threads: int, dtype: torch.dtype, window: int) -> None:
    attention = Attention(dtype, window=window)
    expected = on_one_thread(attention.of_the_last_token)
    assert alike([*expected, *attention.of_the_last_token()])
    # The mean error against f64 is rounding: probabilities and values are rounded to the type, sums are in f32.
    keys, values = exact_sequence(attention)
    seen = slice(max(0, LENGTHS[0] - window) if window > 0 else 0, None)
    q = attention.queries[0][-1].double().view(GROUPS, HEADS // GROUPS, HEAD)
    weights = (torch.einsum("ghd,tgd->ght", q, keys[seen]) * HEAD**-0.5).softmax(-1)
    exact = torch.einsum("ght,tgd->ghd", weights, values[seen]).reshape(HEADS, HEAD)
    assert float((expected[0].double() - exact).abs().mean()) < 4 * torch.finfo(dtype).eps * float(values.abs().mean())


def exact_sequence(attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first sequence, [T, GROUPS, HEAD], drawn again: the cache packs them its own way."""
    generator = torch.Generator().manual_seed(0)
    torch.randperm(sum(-(-length // PAGE) for length in LENGTHS), generator=generator)
    _, keys, values = drawn(generator, LENGTHS[0], attention.dtype)
    return keys.double(), values.double()


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("settings", [{"split": True}, {"cut": False}], ids=["split", "whole chunks"])
def test_without_the_cure_attention_is_on_several_trees(threads: int, settings: dict[str, bool]) -> None:
    """The control, for each half of the cure. In bf16 the tiles are as wrong, and rounding hides it."""
    assert not alike(Attention(torch.float32, **settings).of_the_last_token())


@dtypes
@with_threads
def test_certification(threads: int, dtype: torch.dtype) -> None:
    """A round is certified; two rounds, which have smaller tiles of keys, are not."""
    shape = cpu_attention.Shape(_get_attn_isa(dtype, PAGE, HEAD), HEADS, GROUPS, HEAD, dtype, PAGE, -1)
    attend, most = cpu_attention.one_sequence(shape), cpu.tokens_of_a_round(shape.isa, HEADS, GROUPS)
    cpu.certify(attend, most)
    with pytest.raises(CertificationError, match=rf"in pieces of \[{most + 1}"):
        cpu.certify(attend, most + 2)


def test_pieces() -> None:
    starts, lengths = torch.tensor([0, 1, 18, 26], dtype=torch.int32), torch.tensor([9, 17, 100], dtype=torch.int32)
    cut_starts, cut_lengths, owner = cpu.pieces(starts, lengths, 8)
    assert owner.tolist() == [0, 1, 1, 1, 2]
    assert cut_starts.tolist() == [0, 1, 9, 17, 18, 26]
    assert cut_lengths.tolist() == [9, 8, 16, 17, 100]
    assert cut_starts.dtype == cut_lengths.dtype == torch.int32
    whole = cpu.pieces(starts, lengths, 17)
    assert [part.tolist() for part in whole] == [starts.tolist(), lengths.tolist(), [0, 1, 2]]


def test_rounds() -> None:
    assert [cpu.tokens_of_a_round("vec", 8 * together, 8) for together in (1, 2, 3, 4, 8)] == [8, 4, 8, 2, 1]
    assert cpu.tokens_of_a_round("amx", 32, 8) == 8
    with pytest.raises(CertificationError, match="neon"):
        cpu.tokens_of_a_round("neon", 8, 8)
