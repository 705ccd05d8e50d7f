"""The report's pictures as inline SVG. Colours are CSS variables of the page, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["colour", "drift", "histogram", "mosaic", "river"]

# Group 0 is what the first answer said; the others walk through these. More groups than colours share the last.
COLOURS = 8


def colour(group: int) -> str:
    """CSS colour of a group of equal answers."""
    return f"var(--g{min(group, COLOURS - 1)})"


def _svg(width: float, height: float, body: str, label: str, css: str = "") -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" class="{css}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def mosaic(groups: Sequence[int], titles: Sequence[str], columns: int = 40, size: float = 14) -> str:
    """One square per answer in the order of arrival, coloured by what it said."""
    pitch = size + 3
    columns = min(columns, max(1, len(groups)))
    rows = -(-len(groups) // columns)
    squares = "".join(
        f'<rect x="{at % columns * pitch:g}" y="{at // columns * pitch:g}" width="{size:g}" height="{size:g}" rx="3" '
        f'fill="{colour(group)}"><title>{escape(title)}: answer {group + 1}</title></rect>'
        for at, (group, title) in enumerate(zip(groups, titles, strict=True))
    )
    label = f"{len(groups)} answers, {len(set(groups))} of them distinct"
    width = columns * pitch - 3
    svg = _svg(width, rows * pitch - 3, squares, label, "mosaic")
    return svg.replace("<svg ", f'<svg style="width:min(100%,{width:g}px)" ', 1)


def histogram(values: Sequence[int], length: int, caption: str, bins: int = 24) -> str:
    """How many answers part from the first one at which position, 0 … length - 1."""
    width, height, left, bottom = 960.0, 220.0, 40.0, 34.0
    step = max(1, -(-max(length, 1) // bins))
    counts = [0] * max(1, -(-max(length, 1) // step))
    for value in values:
        counts[min(value // step, len(counts) - 1)] += 1
    most = max(1, *counts)
    inner_w, inner_h = width - left - 8, height - bottom - 14
    slot = inner_w / len(counts)
    body = _axis(left, 14, inner_w, inner_h, [(0, "0"), (1, str(most))])
    for at, count in enumerate(counts):
        if count:
            tall = inner_h * count / most
            what = f"{count} from token {at * step}" + (f" to {at * step + step - 1}" if step > 1 else "")
            body += (
                f'<rect class="bar" x="{left + at * slot + 1:.1f}" y="{14 + inner_h - tall:.1f}" '
                f'width="{max(1.0, slot - 2):.1f}" height="{tall:.1f}" rx="2"><title>{what}</title></rect>'
            )
    body += _x_labels(left, height - bottom, inner_w, length, caption, height)
    return _svg(width, height, body, f"first divergence of {len(values)} answers by token position")


def drift(series: Sequence[tuple[str, Sequence[float]]], caption: str) -> str:
    """Largest |Δ logprob| by position on a logarithmic scale, a line per case; exact zeros lie on the floor."""
    width, height, left, bottom = 960.0, 260.0, 48.0, 34.0
    inner_w, inner_h = width - left - 8, height - bottom - 14
    values = [value for _, line in series for value in line if value > 0]
    if not values:
        return ""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    length = max(len(line) for _, line in series)
    ticks = [(0.0, "0")] + [
        ((power - low + 1) / (high - low + 1), f"1e{power}")
        for power in range(low, high + 1)
        if (power - low) % max(1, (high - low) // 4) == 0
    ]
    body = _axis(left, 14, inner_w, inner_h, ticks)
    for number, (name, line) in enumerate(series):
        points = []
        for at, value in enumerate(line):
            share = 0.0 if value == 0 else (math.log10(value) - low + 1) / (high - low + 1)
            points.append((left + inner_w * (at + 0.5) / length, 14 + inner_h * (1 - share)))
        stroke = colour(1 + number % (COLOURS - 1))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.8" fill="{stroke}"/>' for x, y in points)
        line_of_it = f'<polyline class="line" stroke="{stroke}" points="{path}"/>'
        body += f"<g><title>{escape(name)}</title>{line_of_it}{dots}</g>"
    body += _x_labels(left, height - bottom, inner_w, length, caption, height)
    return _svg(width, height, body, "largest difference of logprobs by token position")


def _axis(left: float, top: float, width: float, height: float, ticks: Sequence[tuple[float, str]]) -> str:
    lines = ""
    for share, text in ticks:
        y = top + height * (1 - share)
        lines += f'<line class="grid" x1="{left:g}" x2="{left + width:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        lines += f'<text class="tick" x="{left - 6:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    return lines


def _x_labels(left: float, y: float, width: float, length: int, caption: str, height: float) -> str:
    step = next((one for one in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if length / one <= 8), 2000)
    body = "".join(
        f'<text class="tick" x="{left + width * (at + 0.5) / max(1, length):.1f}" y="{y + 14:g}" '
        f'text-anchor="middle">{at}</text>'
        for at in range(0, max(1, length), step)
    )
    middle = left + width / 2
    return body + f'<text class="tick" x="{middle:g}" y="{height - 3:g}" text-anchor="middle">{escape(caption)}</text>'


@dataclass
class _Branch:
    """Answers that agree up to `end`, the position where they part (or the end of the picture)."""

    members: list[int]
    start: int
    end: int
    children: list[_Branch]


def river(sequences: Sequence[Sequence[object]], counts: Sequence[int], width: float = 960, css: str = "river") -> str:
    """Answers as one stream that splits where they part.

    sequences: the distinct answers as tokens, the first one first. counts: how many gave each. A band is as thick as
    the number of answers in it; from left to right run the token positions.
    """
    length = max((len(sequence) for sequence in sequences), default=0)
    if not length:
        return ""
    order = list(range(len(sequences)))
    tree = _grow(order, sequences, 0, length)
    total = sum(counts)
    leaves = len(sequences)
    height = max(120.0, min(520.0, 90 + 14.0 * leaves))
    gap = min(7.0, (height - 70) * 0.45 / max(1, leaves - 1)) if leaves > 1 else 0.0
    scale = (height - 44 - gap * (leaves - 1)) / total
    left, inner = 12.0, width - 24

    def x(position: int) -> float:
        return left + inner * position / length

    tops: dict[int, float] = {}
    y = 10.0
    for member in _leaf_order(tree):
        tops[member] = y
        y += counts[member] * scale + gap

    body = ""
    for branch, parent in _walk(tree, None):
        top, thick = _band(branch, tops, counts, scale)
        fill = colour(min(branch.members))
        start = x(branch.start)
        title = f"{sum(counts[one] for one in branch.members)} of {total} answers"
        if parent is not None:
            # Where it left its parent: stacked in the parent's order, then eased over to its own place.
            parent_top, _ = _band(parent, tops, counts, scale)
            before = sum(
                sum(counts[one] for one in sister.members) * scale
                for sister in parent.children[: parent.children.index(branch)]
            )
            from_y, reach = parent_top + before, min(26.0, max(4.0, (x(branch.end) - start) * 0.7))
            middle = start + reach / 2
            body += (
                f'<path fill="{fill}" d="M{start:.1f},{from_y:.1f} C{middle:.1f},{from_y:.1f} {middle:.1f},{top:.1f} '
                f"{start + reach:.1f},{top:.1f} V{top + thick:.1f} C{middle:.1f},{top + thick:.1f} {middle:.1f},"
                f'{from_y + thick:.1f} {start:.1f},{from_y + thick:.1f} Z"/>'
            )
            start += reach
            title += f", apart from token {branch.start}"
        long = max(0.5, x(branch.end) - start + 0.6)
        place = f'x="{start - 0.3:.1f}" y="{top:.1f}" width="{long:.1f}" height="{max(thick, 0.75):.2f}"'
        body += f'<rect fill="{fill}" {place}><title>{title}</title></rect>'
    body += _x_labels(left, height - 30, inner, length, "token", height)
    return _svg(width, height, body, f"{total} answers, {leaves} distinct, and where they part", css)


def _grow(members: list[int], sequences: Sequence[Sequence[object]], start: int, length: int) -> _Branch:
    """Splits members where the first of them is left by another; each part is split further on its own."""
    if len(members) == 1:
        return _Branch(members, start, length, [])
    at = start
    while True:
        parts: dict[object, list[int]] = {}
        for member in members:
            sequence = sequences[member]
            parts.setdefault(sequence[at] if at < len(sequence) else None, []).append(member)
        if len(parts) > 1 or at >= length:
            break
        at += 1
    if len(parts) == 1:
        # The same tokens with other logprobs: they run side by side to the end.
        return _Branch(members, start, length, [])
    return _Branch(members, start, at, [_grow(part, sequences, at, length) for part in parts.values()])


def _leaf_order(branch: _Branch) -> Iterator[int]:
    if not branch.children:
        yield from branch.members
    for child in branch.children:
        yield from _leaf_order(child)


def _walk(branch: _Branch, parent: _Branch | None) -> Iterator[tuple[_Branch, _Branch | None]]:
    yield branch, parent
    for child in branch.children:
        yield from _walk(child, branch)


def _band(branch: _Branch, tops: dict[int, float], counts: Sequence[int], scale: float) -> tuple[float, float]:
    """Top and thickness: as thick as its answers, in the middle of where its leaves lie."""
    first, last = (
        min(tops[one] for one in branch.members),
        max(tops[one] + counts[one] * scale for one in branch.members),
    )
    thick = sum(counts[one] for one in branch.members) * scale
    return (first + last - thick) / 2, thick
