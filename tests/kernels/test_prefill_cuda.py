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
SCHEDULE, PAIRS = sorted((schedule for schedule in PREFILL if schedule.cuda), key=lambda schedule: schedule.long)
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


def test_pairs_are_for_long_contexts_of_even_groups() -> None:
    plain = tree_for(128)
    assert PAIRS.eligible(plain, HEADS, hopper=True)
    assert not PAIRS.eligible(plain, Heads(9, 3, 128), hopper=True)
    assert not PAIRS.eligible(plain, HEADS, hopper=False)
    assert not PAIRS.eligible(dataclasses.replace(plain, window=100), HEADS, hopper=True)
    attention = Attention(plain, HEADS, "cpu", Scratch.empty(1, 1, "cpu"))
    attention.hopper, attention.multiprocessors = True, 132
    assert attention.schedules(1, 17, launch.LONG)[1] == PAIRS
    assert attention.schedules(1, 17, launch.LONG - 1)[1] == SCHEDULE
    attention.allowed = {schedule.name for schedule in (*DECODE, *PREFILL)} - {PAIRS.name}
    assert attention.schedules(1, 17, launch.LONG)[1] == SCHEDULE


def test_pairs_cut_the_work_as_the_schedule_for_short_contexts() -> None:
    """Or a graph captured for long contexts could not be replayed for a step of short ones."""
    assert dataclasses.replace(PAIRS, name=SCHEDULE.name, long=False) == SCHEDULE


def test_a_pytorch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(SeamError, match="without CUDA"):
        nvrtc._nvrtc.__wrapped__()
