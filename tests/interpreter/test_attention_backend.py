"""vLLM's backend without a card: its own metadata and specification classes, our kernels in Triton's interpreter."""

from __future__ import annotations

import types

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("vllm")

from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402
from vllm_deterministic.kernels.attention.launch import Cache  # noqa: E402
from vllm_deterministic.kernels.attention.reference import exact  # noqa: E402
from vllm_deterministic.kernels.attention.store import store  # noqa: E402

from vllm_deterministic.errors import UnsupportedError  # noqa: E402
from vllm_deterministic.integration import attention as backend  # noqa: E402

HEADS, KV_HEADS, SIZE, PAGE = 6, 2, 64, 32


def kv_cache(pages: int, layout: str, fill: float = float("nan")) -> torch.Tensor:
    """[pages, kv heads, slots, 2 * head size] over either physical order."""
    shape = (pages, KV_HEADS, PAGE, 2 * SIZE) if layout == "HND" else (pages, PAGE, KV_HEADS, 2 * SIZE)
    cache = torch.full(shape, fill, dtype=torch.float16)
    return cache if layout == "HND" else cache.transpose(1, 2)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_steps_of_a_serving_engine_give_the_exact_answer(layout: str) -> None:
    """A prompt in two chunks, a second one beside it, then decodes of both; pages handed out full of NaN."""
    generator = torch.Generator().manual_seed(0)
    config = types.SimpleNamespace(
        scheduler_config=types.SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=256),
        compilation_config=types.SimpleNamespace(static_forward_context={}),
        model_config=types.SimpleNamespace(get_num_attention_heads=lambda _: HEADS, max_model_len=64),
        parallel_config=None,
    )
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float16)
    builder = backend.OneTreeBuilder(spec, [], config, torch.device("cpu"))
    impl = backend.OneTreeImpl(HEADS, SIZE, SIZE**-0.5, KV_HEADS)
    cache = kv_cache(6, layout)
    table = torch.tensor([[5, 2], [1, 4]], dtype=torch.int32)
    data = [
        tuple(torch.randn(50, n, SIZE, generator=generator).half() for n in (HEADS, KV_HEADS, KV_HEADS))
        for _ in range(2)
    ]
    steps = [[(0, 0, 20)], [(0, 20, 45), (1, 0, 9)], [(0, 45, 46), (1, 9, 10)], [(0, 46, 47), (1, 10, 11)]]
    for step in steps:
        lengths = [end - first for _, first, end in step]
        q, k, v = (torch.cat([data[i][part][a:b] for i, a, b in step]) for part in range(3))
        rows = table[[i for i, _, _ in step]]
        slots = torch.cat(
            [table[i, p // PAGE].long() * PAGE + p % PAGE for i, a, b in step for p in [torch.arange(a, b)]]
        )
        start = torch.tensor([0, *lengths]).cumsum(0).int()
        common = CommonAttentionMetadata(
            query_start_loc=start, query_start_loc_cpu=start, num_reqs=len(step), num_actual_tokens=len(q),
            seq_lens=torch.tensor([end for _, _, end in step], dtype=torch.int32), max_query_len=max(lengths),
            max_seq_len=64, block_table_tensor=rows, slot_mapping=slots,
        )  # fmt: skip
        metadata = builder.build(0, common)
        impl.do_kv_cache_update(None, k, v, cache, slots)
        out = torch.full((len(q), HEADS * SIZE), float("nan"), dtype=torch.float16)
        impl.forward(None, q, k, v, cache, metadata, out)
        for got, (i, first, end) in zip(out.view(-1, HEADS, SIZE).split(lengths), step, strict=True):
            queries, keys, values = data[i]
            want = exact(impl.tree, queries[first:end], keys[:end], values[:end], first)
            assert ((got - want).norm() / want.norm()).item() < 2**-9


def test_values_behind_a_sequence_are_cleared_once_and_never_another_s() -> None:
    cache = kv_cache(3, "NHD")
    pages = cache.transpose(1, 2)
    whole = Cache(pages[..., :SIZE], pages[..., SIZE:])
    k = torch.ones(5, KV_HEADS, SIZE, dtype=torch.float16)
    # Three tokens open page 1; two continue page 2, which someone else's step opened.
    store(k, k, whole, torch.tensor([PAGE, PAGE + 1, PAGE + 2, 2 * PAGE + 7, 2 * PAGE + 8]))
    assert bool((whole.v[1, :3] == 1).all())
    assert bool((whole.v[1, 3:] == 0).all())
    assert bool(whole.v[2, :7].isnan().all())
    assert bool(whole.v[2, 9:].isnan().all())
    assert bool(whole.v[0].isnan().all())
    whole.v[1, 3:] = 9.0
    store(k[:1], k[:1], whole, torch.tensor([PAGE + 3]))
    assert bool((whole.v[1, 4:] == 9).all()), "a page is cleared when it is opened, not at every step"


def test_the_backend_is_what_vllm_asks_for() -> None:
    backend.arm()
    backend.arm()
    found = AttentionBackendEnum.CUSTOM.get_class()
    assert found is backend.OneTreeBackend
    assert found.get_builder_cls().get_cudagraph_support(None, None) is AttentionCGSupport.ALWAYS
    assert found.get_preferred_block_size(16) == backend.PAGE == 128
    assert found.supports_head_size(128)
    assert not found.supports_head_size(80)


def test_what_has_no_tree_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="alibi_slopes"):
        backend.OneTreeImpl(HEADS, SIZE, 0.1, KV_HEADS, alibi_slopes=[1.0])
    with pytest.raises(UnsupportedError, match="encoder"):
        backend.OneTreeImpl(HEADS, SIZE, 0.1, KV_HEADS, attn_type="encoder")
