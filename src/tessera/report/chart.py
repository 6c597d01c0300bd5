"""A line chart of accuracy over training steps, labelled at the ends of its lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tessera.report.svg import escape, ink, percent, shorten, tag

__all__ = ["Line", "Span", "line_chart", "spread", "ticks"]

_GAP = 14.0  # pixels between the base lines of two end labels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    """One line.

    Attributes:
        name: Its label.
        points: (step, accuracy in [0, 1]), by step, at least one.
        light: Its colour on a light page.
        dark: Its colour on a dark page.
        kind: CSS class: "thin", "bold" or "level" (a dashed reference level).
        dashes: SVG dash pattern, "" for solid.
        tooltip: Shown on hover; read out by screen readers.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    light: str
    dark: str
    kind: str
    dashes: str = ""
    tooltip: str = ""


class Span(NamedTuple):
    """The steps during which one task is learned; a rule is drawn at its end."""

    name: str
    start: float
    end: float


class _Frame(NamedTuple):
    """Where the plot lies and how far off its labels are, in pixels; which steps it spans."""

    left: float
    right: float
    top: float
    bottom: float
    leader: float
    steps: float

    def x(self, step: float) -> float:
        return self.left + (self.right - self.left) * step / self.steps

    def y(self, accuracy: float) -> float:
        return self.bottom - (self.bottom - self.top) * accuracy


def line_chart(
    lines: Sequence[Line],
    spans: Sequence[Span],
    *,
    width: int,
    summary: str,
    unit: str = "training step",
) -> str:
    """Accuracy over training steps.

    Args:
        lines: Drawn in this order, the last on top; at least one.
        spans: One per task; their ends become vertical rules.
        width: In pixels. Text keeps its size, so a phone gets its own, narrower drawing.
        summary: What the chart shows, for those who do not see it.
        unit: What the steps are, at the axis.

    Returns:
        An SVG element with one polyline per line.

    Example:
        >>> ends = ((0, 0.1), (9, 0.8))
        >>> line = Line(name="er", points=ends, light="#000", dark="#fff", kind="bold")
        >>> line_chart([line], [], width=600, summary="er").count("<polyline")
        1
    """
    longest = 12 if width < 500 else 22
    labels = [shorten(line.name, longest) for line in lines]
    leader = 12.0 if len(lines) < 10 else 30.0
    margin = leader + 10 + 7.4 * max(map(len, labels))
    height = max(230.0 if width < 500 else 300.0, _GAP * len(lines) + 16)
    frame = _Frame(
        left=34,
        right=width - margin,
        top=36,
        bottom=36 + height,
        leader=leader,
        steps=max([1.0, *(step for line in lines for step, _ in line.points)]),
    )
    return tag(
        "svg",
        {
            "viewBox": f"0 0 {width} {frame.bottom + 42:.0f}",
            "width": width,
            "height": f"{frame.bottom + 42:.0f}",
            "role": "img",
            "aria-label": summary,
            "class": "chart",
        },
        _axes(frame, unit),
        _rules(frame, spans),
        *(_line(frame, line) for line in lines),
        _end_labels(frame, lines, labels),
    )


def ticks(largest: float, *, at_most: int) -> list[int]:
    """Round step numbers from 0 up to `largest`, in steps of 1, 2 or 5 times a power of ten.

    Example:
        >>> ticks(940, at_most=6)
        [0, 200, 400, 600, 800]
    """
    size = 1
    while largest / size + 1 > at_most:
        lead = int(str(size)[0])
        size = size * 5 // 2 if lead == 2 else size * 2
    return list(range(0, math.floor(largest) + 1, size))


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart, within [low, high] if they fit.

    Args:
        wanted: Positions in any order.
        gap: The smallest distance between two.
        low: The smallest position.
        high: The largest position.

    Returns:
        One position per wanted one, in the same order.

    Example:
        >>> spread([5.0, 4.0, 30.0], gap=10.0, low=0.0, high=40.0)
        [10.0, 0.0, 30.0]
    """
    # Groups that touch are merged and centred on what their members wanted, so that no label is
    # pushed further than it must be.
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    groups: list[tuple[float, list[int]]] = []
    for index in order:
        members, start = [index], min(max(wanted[index], low), high)
        while groups and start < groups[-1][0] + gap * len(groups[-1][1]):
            members = groups.pop()[1] + members
            ideal = [wanted[m] - gap * place for place, m in enumerate(members)]
            start = math.fsum(ideal) / len(ideal)
            start = max(low, min(start, high - gap * (len(members) - 1)))
        groups.append((start, members))
    placed = {m: start + gap * i for start, members in groups for i, m in enumerate(members)}
    return [placed[index] for index in range(len(wanted))]


def _axes(frame: _Frame, unit: str) -> str:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = frame.y(share)
        parts.append(_rule(frame.left, y, frame.right, y, "axis-line" if share == 0 else "grid"))
        parts.append(_text(frame.left - 8, y + 4, f"{100 * share:.0f}", "end"))
    parts.append(_text(0, 12, "accuracy, %", "start"))
    wide = frame.right - frame.left
    for step in ticks(frame.steps, at_most=max(4, int(wide / 62))):
        x = frame.x(step)
        parts.append(_rule(x, frame.bottom, x, frame.bottom + 4, "axis-line"))
        parts.append(_text(x, frame.bottom + 18, f"{step:,}", "middle"))
    parts.append(_text(frame.right, frame.bottom + 36, unit, "end"))
    return "".join(parts)


def _rules(frame: _Frame, spans: Sequence[Span]) -> str:
    parts = []
    for number, span in enumerate(spans, start=1):
        left, right = frame.x(span.start), frame.x(span.end)
        if number < len(spans):
            parts.append(_rule(right, frame.top - 4, right, frame.bottom, "boundary"))
        if right - left >= 13:
            name = span.name if right - left >= 50 else span.name.removeprefix("task ")
            parts.append(_text((left + right) / 2, frame.top - 7, name, "middle"))
    return "".join(parts)


def _line(frame: _Frame, line: Line) -> str:
    colour = ink(line.light, line.dark)
    dashes = {"stroke-dasharray": line.dashes} if line.dashes else {}
    where = " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in line.points)
    drawn = tag(
        "polyline",
        {"points": where, "class": f"ink line {line.kind}", "style": colour} | dashes,
        tag("title", {}, escape(line.tooltip or line.name)),
    )
    if len(line.points) > 1:
        return drawn
    # A polyline of one point draws nothing: mark the place.
    (step, value) = line.points[0]
    dot = {"cx": frame.x(step), "cy": frame.y(value), "r": 3, "class": "ink dot", "style": colour}
    return drawn + tag("circle", dot)


def _end_labels(frame: _Frame, lines: Sequence[Line], labels: Sequence[str]) -> str:
    wanted = [frame.y(line.points[-1][1]) for line in lines]
    placed = spread(wanted, gap=_GAP, low=frame.top + 2, high=frame.bottom - 2)
    parts = []
    for line, label, y_line, y in zip(lines, labels, wanted, placed, strict=True):
        edge, start = frame.right + frame.leader, frame.x(line.points[-1][0])
        path = f"M{start + 2:.1f} {y_line:.1f}H{frame.right + 2:.1f}L{edge:.1f} {y:.1f}"
        style = ink(line.light, line.dark)
        parts.append(tag("path", {"d": path, "class": "ink leader", "style": style}))
        words = {"x": edge + 4, "y": y + 4, "class": f"label {line.kind}"}
        full = f"{line.name}: {percent(line.points[-1][1])} %"
        parts.append(tag("text", words, tag("title", {}, escape(full)), escape(label)))
    return "".join(parts)


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return tag("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": kind})


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return tag("text", {"x": x, "y": y, "text-anchor": anchor, "class": "axis"}, escape(words))
