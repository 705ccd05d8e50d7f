"""What can be said of the CUDA prefill without a card: which layers it takes, and that both sides of a launch agree."""

import dataclasses
import re

import pytest
from vllm_deterministic.kernels import nvrtc
from vllm_deterministic.kernels.attention import launch, prefill_cuda
from vllm_deterministic.kernels.attention.launch import Attention, Scratch
from vllm_deterministic.kernels.attention.schedules import DECODE, PREFILL, Heads
from vllm_deterministic.kernels.attention.tree import tree_for

from vllm_deterministic.errors import SeamError

SOURCE = prefill_cuda._source("prefill.cu")
SCHEDULE, PIECES = sorted((schedule for schedule in PREFILL if schedule.cuda), key=lambda schedule: schedule.pieces)
HEADS = Heads(32, 8, 128)


def test_the_arguments_are_those_of_the_kernel() -> None:
    (body,) = re.findall(r"struct Arguments \{(.*?)\};", SOURCE, re.DOTALL)
    declared = re.findall(r"(\w+)\s*[,;]", re.sub(r"//.*", "", body))
    assert declared == [name for name, _ in prefill_cuda._Arguments._fields_]


def test_it_takes_plain_layers_of_head_size_128_on_hopper() -> None:
    plain = tree_for(128)
    assert SCHEDULE.eligible(plain, HEADS, hopper=True)
    for other in ({"window": 100}, {"softcap": 3.0}, {"sink": True}):
        assert not SCHEDULE.eligible(dataclasses.replace(plain, **other), HEADS, hopper=True)
    assert not SCHEDULE.eligible(tree_for(64), HEADS, hopper=True)
    assert not SCHEDULE.eligible(tree_for(256), HEADS, hopper=True)
    assert not SCHEDULE.eligible(plain, Heads(32, 8, 16), hopper=True)
    assert not SCHEDULE.eligible(plain, HEADS, hopper=False)


def test_the_kernel_is_written_for_the_sizes_of_the_tree() -> None:
    tree = tree_for(128)
    assert f"D = {tree.head_size}, T = {tree.tile};" in prefill_cuda._source("hopper.cuh")
    assert f"TILES_OF_SPLIT = {tree.split // tree.tile};" in prefill_cuda._source("tree.cuh")


def test_blocks_are_cut_in_small_steps_alone() -> None:
    attention = Attention(tree_for(128), HEADS, "cpu", Scratch.empty(1, 1, "cpu"))
    attention.hopper, attention.multiprocessors = True, 132
    assert attention.schedules(1, launch.SMALL, launch.SMALL)[1] == PIECES
    assert attention.schedules(1, launch.SMALL + 1, launch.SMALL + 1)[1] == SCHEDULE
    assert attention.block_slots(PIECES) == 16  # packs of 4 heads of 32 on 132 multiprocessors
    assert attention.block_slots(SCHEDULE) == 0
    attention.allowed = {schedule.name for schedule in (*DECODE, *PREFILL)} - {PIECES.name}
    assert attention.schedules(1, launch.SMALL, launch.SMALL)[1] == SCHEDULE


def test_the_work_lists_of_small_steps_are_those_of_large_ones() -> None:
    """Or one plan could not serve the graphs of both."""
    assert dataclasses.replace(PIECES, name=SCHEDULE.name, pieces=False) == SCHEDULE


@pytest.mark.parametrize(("group", "pack"), [(1, 1), (3, 1), (4, 4), (6, 2), (7, 1), (8, 8), (64, 64), (128, 64)])
def test_a_tile_of_rows_holds_whole_tokens(group: int, pack: int) -> None:
    assert Heads(2 * group, 2, 128).pack == pack


def test_a_pytorch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(SeamError, match="without CUDA"):
        nvrtc._nvrtc.__wrapped__()
