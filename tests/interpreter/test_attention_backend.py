"""vLLM's backend without a card: its own metadata and specification classes, our kernels in Triton's interpreter."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("vllm")

from vllm.model_executor.layers.attention.attention import set_default_quant_scales  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402
from vllm_deterministic.kernels.attention.launch import Cache  # noqa: E402
from vllm_deterministic.kernels.attention.reference import exact, quantised  # noqa: E402
from vllm_deterministic.kernels.attention.schedules import Heads  # noqa: E402
from vllm_deterministic.kernels.attention.store import store  # noqa: E402
from vllm_deterministic.kernels.attention.tree import tree_for  # noqa: E402
from vllm_deterministic.kernels.certificates import Certificate  # noqa: E402

from vllm_deterministic.errors import CertificationError, SeamError, UnsupportedError  # noqa: E402
from vllm_deterministic.integration import attention as backend  # noqa: E402

HEADS, KV_HEADS, SIZE, PAGE = 6, 2, 64, 32


def kv_cache(pages: int, layout: str, fill: float = float("nan"), size: int = SIZE) -> torch.Tensor:
    """[pages, kv heads, slots, 2 * head size] over either physical order."""
    shape = (pages, KV_HEADS, PAGE, 2 * size) if layout == "HND" else (pages, PAGE, KV_HEADS, 2 * size)
    cache = torch.full(shape, fill, dtype=torch.float16)
    return cache if layout == "HND" else cache.transpose(1, 2)


def sixteenths(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Values that e4m3 holds at every power of two as a scale: the interpreter's cast does not round as a card does."""
    return torch.randint(-15, 16, shape, generator=generator).half() / 8


OF_LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "96": {"head_size": 96},
    "ALiBi": {"alibi_slopes": [2.0**-i for i in range(1, HEADS + 1)]},
    "fp8": {"kv_cache_dtype": "fp8"},
    "all": {"head_size": 96, "kv_cache_dtype": "fp8_e4m3", "alibi_slopes": [0.125] * HEADS, "logits_soft_cap": 20.0},
}


@pytest.mark.parametrize(
    ("layer", "layout"),
    [("plain", "HND"), ("plain", "NHD"), ("96", "NHD"), ("ALiBi", "HND"), ("fp8", "NHD"), ("all", "HND")],
)
def test_steps_of_a_serving_engine_give_the_exact_answer(layer: str, layout: str) -> None:
    """A prompt in two chunks, a second one beside it, then decodes of both; pages handed out full of NaN."""
    asked = {"head_size": SIZE, **OF_LAYERS[layer]}
    size = asked["head_size"]
    impl = backend.OneTreeImpl(HEADS, scale=size**-0.5, num_kv_heads=KV_HEADS, **asked)
    impl.fix_scales(types.SimpleNamespace(_k_scale_float=0.25, _v_scale_float=0.5))
    assert impl.tree.k_scale == (0.25 if "fp8" in asked.get("kv_cache_dtype", "") else 1.0)
    generator = torch.Generator().manual_seed(0)
    config = types.SimpleNamespace(
        scheduler_config=types.SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=256),
        compilation_config=types.SimpleNamespace(static_forward_context={"0": types.SimpleNamespace(impl=impl)}),
        model_config=types.SimpleNamespace(get_num_attention_heads=lambda _: HEADS, max_model_len=64),
        parallel_config=None,
    )
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=size, dtype=torch.float16)
    builder = backend.OneTreeBuilder(spec, ["0"], config, torch.device("cpu"))
    cache = kv_cache(6, layout, size=size)
    if impl.tree.e4m3:  # bytes, as vLLM hands them over
        cache = cache.to(torch.float8_e4m3fn).view(torch.uint8)
    table = torch.tensor([[5, 2], [1, 4]], dtype=torch.int32)
    data = [tuple(sixteenths(50, n, size, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS)) for _ in range(2)]
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
        out = torch.full((len(q), HEADS * size), float("nan"), dtype=torch.float16)
        impl.forward(None, q, k, v, cache, metadata, out)
        for got, (i, first, end) in zip(out.view(-1, HEADS, size).split(lengths), step, strict=True):
            queries, keys, values = data[i]
            keys, values = keys[:end] / impl.tree.k_scale, values[:end] / impl.tree.v_scale
            want = exact(impl.tree, queries[first:end], keys, values, first, None, impl.slopes)
            assert ((got - want).norm() / want.norm()).item() < 2**-9


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_an_e4m3_cache_is_written_through_its_scales(layout: str) -> None:
    """With values beyond the largest. Rounding is a matter for a card."""
    cache = kv_cache(2, layout, 7.0, 96).to(torch.float8_e4m3fn)
    pages = cache.transpose(1, 2)
    whole = Cache(pages[..., :96], pages[..., 96:])
    k = sixteenths(5, KV_HEADS, 96, generator=torch.Generator().manual_seed(0))
    k[1, 1, :4] = torch.tensor([500.0, -500.0, float("inf"), float("-inf")])
    store(k, k, whole, torch.arange(PAGE, PAGE + 5), 1.0, 0.25)
    for found, scale in ((whole.k, 1.0), (whole.v, 0.25)):
        assert torch.equal(found[1, :5].float(), quantised(k, scale).float())
    assert bool((whole.v[1, 5:].float() == 0).all())
    assert bool((whole.v[0].float() == 7).all())
    assert not torch.equal(whole.k[1, :5].float(), whole.v[1, :5].float())


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
    assert found.supports_head_size(96)
    assert found.supports_kv_cache_dtype("fp8_e4m3")
    assert not found.supports_kv_cache_dtype("fp8_e5m2")
    assert not found.supports_head_size(80)


def test_what_has_no_tree_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="1 alibi_slopes for 6 heads"):
        backend.OneTreeImpl(HEADS, SIZE, 0.1, KV_HEADS, alibi_slopes=[1.0])
    with pytest.raises(UnsupportedError, match="use_alibi_sqrt"):
        backend.OneTreeImpl(HEADS, SIZE, 0.1, KV_HEADS, use_alibi_sqrt=True)
    for dtype in ("fp8_e5m2", "fp8_per_token_head", "nvfp4"):
        with pytest.raises(UnsupportedError, match=f"--kv-cache-dtype {dtype} .*e4m3"):
            backend.OneTreeImpl(HEADS, SIZE, 0.1, KV_HEADS, kv_cache_dtype=dtype)
    with pytest.raises(UnsupportedError, match="encoder"):
        backend.OneTreeImpl(HEADS, SIZE, 0.1, KV_HEADS, attn_type="encoder")


def test_scales_of_the_cache_are_fixed_or_refused() -> None:
    impl = backend.OneTreeImpl(HEADS, SIZE, 0.1, KV_HEADS, kv_cache_dtype="fp8")
    assert not impl.supports_quant_query_input
    with pytest.raises(UnsupportedError, match="--calculate-kv-scales"):
        impl.fix_scales(types.SimpleNamespace(calculate_kv_scales=True, _k_scale_float=1.0, _v_scale_float=1.0))
    with pytest.raises(UnsupportedError, match="positive"):
        impl.fix_scales(types.SimpleNamespace(_k_scale_float=-1.0, _v_scale_float=1.0))
    with pytest.raises(SeamError, match="None"):
        impl.fix_scales(types.SimpleNamespace())
    # vLLM's own layers say them.
    layer = torch.nn.Module()
    set_default_quant_scales(layer, register_buffer=True)
    layer.impl = impl
    impl.fix_scales(layer)
    assert impl.tree == tree_for(SIZE, 0.1, kv_heads=KV_HEADS, cache="e4m3")


def test_schedules_are_certified_past_the_key_where_splits_double() -> None:
    for kv, most, context in ((8, 131072, 8192 + 2577), (8, 4096, 4096), (1, 131072, 65536 + 2577), (8, 9000, 9000)):
        assert backend.certified_context(tree_for(128, kv_heads=kv), most) == context
    assert backend.certified_context(tree_for(128, window=4096, kv_heads=8), 131072) == 8192 + 17


def test_trees_of_their_own_are_named_with_their_scales() -> None:
    def model(*scales: float, **asked: Any) -> torch.nn.Module:
        layers = []
        for scale in scales:
            layer = torch.nn.Module()
            layer.impl = backend.OneTreeImpl(HEADS, SIZE, 0.1, KV_HEADS, **asked)
            layer.impl.fix_scales(types.SimpleNamespace(_k_scale_float=scale, _v_scale_float=1.0))
            layers.append(layer)
        return torch.nn.Sequential(*layers)

    assert backend.trees(model(1.0, 1.0)) == {}, "the numerics id of a plain model is the version's"
    fp8 = {"kv_cache_dtype": "fp8"}
    named = [model(1.0, 1.0, **fp8), model(1.0, 2.0, **fp8), model(2.0, 1.0, **fp8), model(1.0, alibi_slopes=[1.0] * 6)]
    assert len({backend.trees(one)["attention_layers"] for one in named}) == len(named)


def test_layers_of_a_group_run_what_all_of_them_may(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, heads = tree_for(64), tree_for(64, alibi=True), Heads(HEADS, KV_HEADS, PAGE)
    certificate = functools.partial(Certificate, "attention", "", {}, {})
    found = {
        (one, heads): certificate({"decode": [], "decode-tma": [], "prefill": []}),
        (other, heads): certificate({"decode": [], "prefill": [], "prefill-64": []}),
    }
    monkeypatch.setattr(backend, "_certified", found)
    assert backend._of_group([one, other, one], heads, torch.device("cpu")).allowed == {"decode", "prefill"}
    assert backend._of_group([one], heads, torch.device("cpu")).allowed == {"decode", "decode-tma", "prefill"}
    with pytest.raises(CertificationError, match="window=9"):
        backend._attention(tree_for(64, window=9), heads, torch.device("cuda"))
