"""Draws docs/plots/ from benchmarks/results/: run it after a benchmark (pip install 'vllm-deterministic[docs]').

usage: benchmarks/plots.py
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PLOTS = HERE.parent / "docs" / "plots"
# What the maker states for the card: memory in TB/s, dense bf16 in TFLOP/s.
LIMITS = {"NVIDIA H200": (4.8, 989), "NVIDIA H100 80GB HBM3": (3.35, 989)}
SIDES = {
    "ours": ("ours", "#0b6e4f", "-", 2.4),
    "default": ("default (cuBLAS)", "#444444", "-", 1.4),
    "vllm_batch_invariant": ("vLLM's batch-invariant mode", "#c8553d", "--", 1.4),
    "batch_invariant_ops": ("batch_invariant_ops", "#d9a441", ":", 1.6),
}
LAYERS = ("qkv", "o", "gate_up", "down")


def times(point: dict[str, Any]) -> dict[str, float]:
    return {"ours": point["ours"], "default": point["peer"], **point["others"]}


def gemm(report: dict[str, Any], model: str = "Qwen3-8B") -> None:
    """One forward pass's linear layers in TB/s and TFLOP/s, and every measured ratio."""
    totals: dict[int, dict[str, Any]] = {}
    for point in report["points"]:
        if any(f"{model} {layer}" in point["what"] for layer in LAYERS):
            m, n, k = point["m"], point["n"], point["k"]
            total = totals.setdefault(m, {"bytes": 0, "flop": 0, "us": dict.fromkeys(times(point), 0.0)})
            total["bytes"] += 2 * (n * k + m * k + m * n)
            total["flop"] += 2 * m * n * k
            for side, microseconds in times(point).items():
                total["us"][side] += microseconds
    memory, compute = LIMITS[report["card"]]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    sizes = sorted(totals)
    few = [m for m in sizes if m <= 256]
    for side, (label, colour, style, width) in SIDES.items():
        if side not in totals[sizes[0]]["us"]:
            continue
        bandwidth = [totals[m]["bytes"] / totals[m]["us"][side] / 1e6 for m in few]
        rate = [totals[m]["flop"] / totals[m]["us"][side] / 1e6 for m in sizes]
        axes[0].plot(few, bandwidth, style, color=colour, linewidth=width, label=label)
        axes[1].plot(sizes, rate, style, color=colour, linewidth=width)
    axes[0].axhline(memory, color="#999999", linewidth=0.8)
    axes[0].text(few[0], memory * 0.985, f"the card's memory, {memory} TB/s", va="top", fontsize=8, color="#666666")
    axes[0].set(title=f"{model}, linear layers: TB/s", xscale="log", xlabel="rows M", ylim=(0, memory * 1.06))
    axes[1].axhline(compute, color="#999999", linewidth=0.8)
    axes[1].text(sizes[0], compute * 0.97, f"the card's bf16, {compute} TFLOP/s", va="top", fontsize=8, color="#666666")
    axes[1].set(title="TFLOP/s", xscale="log", yscale="log", xlabel="rows M")
    figure.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.46, 0.17), frameon=False)
    for point in report["points"]:
        axes[2].plot(point["m"], point["ratio"], "o", color="#0b6e4f", alpha=0.45, markersize=4, markeredgewidth=0)
    axes[2].axhline(1, color="#444444", linewidth=0.8)
    axes[2].axhline(0.97, color="#c8553d", linewidth=0.8, linestyle=":")
    title = f"default / ours, {len(report['points'])} points of four models"
    axes[2].set(title=title, xscale="log", yscale="log", xlabel="rows M")
    steps = (0.95, 1, 1.05, 1.1, 1.2, 1.5, 2)
    axes[2].set_yticks(steps, [str(step) for step in steps])
    for axis in axes:
        axis.grid(True, which="major", color="#eeeeee")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        ticks = [m for m in (1, 4, 16, 64, 256, 1024, 4096) if m <= axis.get_xlim()[1]]
        axis.set_xticks(ticks, [str(m) for m in ticks])
        axis.minorticks_off()
    figure.suptitle(f"{report['card']}, {report['date']}: {report['command']}", fontsize=8, color="#666666")
    save(figure, "gemm")


def attention(report: dict[str, Any]) -> None:
    """Decode in TB/s of KV cache against context, prefill in TFLOP/s; ours and FlashAttention-3's default."""
    points = [point for point in report["points"] if point["name"].startswith("fa3 default")]
    memory, compute = LIMITS[report["card"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    decode: dict[int, list[tuple[int, float, float]]] = {}
    for point in points:
        if point["what"].startswith("decode "):
            batch, keys = (int(number) for number in point["what"].removeprefix("decode ").split(" x "))
            rate = point["tb_per_s"]
            decode.setdefault(batch, []).append((keys, rate, rate * point["ours"] / point["peer"]))
    colours = plt.get_cmap("viridis")
    for at, (batch, curve) in enumerate(sorted(decode.items())):
        keys, ours, peer = zip(*sorted(curve), strict=True)
        colour = colours(0.1 + 0.8 * at / len(decode))
        axes[0].plot(keys, ours, "-o", color=colour, linewidth=2, markersize=4, label=f"batch {batch}")
        axes[0].plot(keys, peer, ":", color=colour, linewidth=1.4)
    axes[0].axhline(memory, color="#999999", linewidth=0.8)
    axes[0].text(512, memory * 0.985, f"the card's memory, {memory} TB/s", va="top", fontsize=8, color="#666666")
    title = "decode, TB/s of KV cache (dotted: FlashAttention-3)"
    axes[0].set(title=title, xscale="log", xlabel="context, tokens", ylim=(0, memory * 1.06))
    ticks = (512, 2048, 8192, 32768, 131072)
    axes[0].set_xticks(ticks, [f"{tick // 1024}k" if tick > 1023 else str(tick) for tick in ticks])
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8, loc="lower right", frameon=False)
    prefill = [point for point in points if point["what"].startswith("prefill ")]
    for at, point in enumerate(prefill):
        ours = point["tflop_per_s"]
        for shift, value, colour in ((-0.2, ours, "#0b6e4f"), (0.2, ours * point["ours"] / point["peer"], "#999999")):
            axes[1].bar(at + shift, value, width=0.38, color=colour)
            axes[1].text(at + shift, value, f"{value:.0f}", ha="center", va="bottom", fontsize=8)
    labels = [point["what"].removeprefix("prefill ").replace(" of ", "\nof ") for point in prefill]
    axes[1].set_xticks(range(len(prefill)), labels, fontsize=8)
    axes[1].set(title="prefill, TFLOP/s: ours (green), FlashAttention-3 (grey)", ylim=(0, compute * 1.06))
    axes[1].axhline(compute, color="#999999", linewidth=0.8)
    axes[1].text(-0.4, compute * 0.985, f"the card's bf16, {compute} TFLOP/s", va="top", fontsize=8, color="#666666")
    for axis in axes:
        axis.grid(True, which="major", axis="y", color="#eeeeee")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['card']}, {report['date']}: {report['command']}", fontsize=8, color="#666666")
    save(figure, "attention")


WAYS = {
    "default": ("default, uncorrected", "#c8553d", "--"),
    "corrected": ("default, importance weights", "#d9a441", ":"),
    "ours": ("deterministic", "#0b6e4f", "-"),
}


def rl_demo(report: dict[str, Any], name: str = "rl_demo") -> None:
    """How far sampler and trainer are apart at each step, and the reward."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True)
    panels = (("kl", "KL(sampler ‖ trainer)"), ("unequal", "share of tokens that differ"), ("reward", "reward"))
    for axis, (what, title) in zip(axes, panels, strict=True):
        for way, (label, colour, style) in WAYS.items():
            if way in report["runs"]:
                values = [step[what] for step in report["runs"][way]["steps"]]
                axis.plot(values, style, color=colour, linewidth=2, label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(True, which="major", color="#eeeeee")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("symlog", linthresh=1e-6)  # zero is on the axis
    axes[0].set_ylim(bottom=-2e-7)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{report['card']}, {report['date']}: {report['command']}", fontsize=8, color="#666666")
    save(figure, name)


def save(figure: Any, name: str) -> None:
    PLOTS.mkdir(parents=True, exist_ok=True)
    # No date and no random ids in the file: the same results draw the same bytes.
    figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "vllm-deterministic"
    on_a_card = functools.partial(rl_demo, name="rl_demo_gpu")
    for name, draw in (("gemm", gemm), ("attention", attention), ("rl_demo", rl_demo), ("rl_demo_gpu", on_a_card)):
        path = HERE / "results" / f"{name}.json"
        if path.exists():
            draw(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
