"""Charts as SVG for the dashboard's pages: no colours, no styles, those are the style sheet's.

A chart fills the room it has. Its curves are drawn on a sheet that is stretched; whatever must
keep its shape (dots, limits, words) is placed beside them in percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from markupsafe import Markup

from tessera.serve.dashboard_words import Z
from tessera.serve.gates_statistics import wilson

__all__ = ["Dot", "Mark", "bar", "chart", "course", "interval", "spark"]

_WIDE, _HIGH = 1000.0, 200.0

Points = Sequence[float | None]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dot:
    """A share over time.

    Attributes:
        time_s: When.
        right: Of so many.
        n: That many, at least 1.
        tip: Words for the mouse.
    """

    time_s: float
    right: int
    n: int
    tip: str


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mark:
    """Something that happened.

    Attributes:
        time_s: When.
        kind: A class of the style sheet: "drift" or "swap".
        label: A word beside it; "": none.
        tip: Words for the mouse.
    """

    time_s: float
    kind: str
    label: str
    tip: str


def chart(lines: Sequence[Points], *, top: float, summary: str, tips: Sequence[str] = ()) -> Markup:
    """Lines over equal steps; words stand beside it in HTML.

    Args:
        lines: Values in [0, top]; None leaves a gap. The last is drawn on top. The ground under a
            line that is alone is tinted.
        top: The value at the upper edge, > 0.
        summary: What it shows, for those who do not see it.
        tips: For each step, shown where the mouse is.

    Returns:
        An SVG element.

    Example:
        >>> str(chart([[0.0, 5.0]], top=10.0, summary="a & b"))[:52]
        '<svg class="plot" role="img" aria-label="a &amp; b">'
    """
    steps = max((len(line) for line in lines), default=0)
    parts: list[Markup] = []
    for number, line in enumerate(lines):
        for piece in _pieces(line, steps, top, _WIDE, _HIGH):
            if len(lines) == 1 and "L" in piece:
                begin, end = piece[1:].split(" ")[0], piece.rsplit("L")[-1].split(" ")[0]
                ground = f"{piece}L{end} 200L{begin} 200Z"
                parts.append(Markup('<path class="ground" d="{0}"/>').format(ground))
            parts.append(Markup('<path class="line l{0}" d="{1}"/>').format(number, piece))
    wide = 100 / max(1, steps)
    hover = [
        Markup('<rect class="tip" x="{0}%" width="{1}%" height="100%">{2}</rect>').format(
            f"{step * wide:.3f}", f"{wide:.3f}", _title(tip)
        )
        for step, tip in enumerate(tips)
    ]
    return _svg("plot", summary, _grid(3), _sheet(parts), *hover)


def course(dots: Sequence[Dot], marks: Sequence[Mark], *, summary: str) -> Markup:
    """Shares over time from 0 to 1, with their 95 % limits (Wilson), and what happened meanwhile.

    Args:
        dots: By time, at least one.
        marks: What lies outside of the dots' time is left out.
        summary: What it shows, for those who do not see it.

    Example:
        >>> dots = [Dot(time_s=float(t), right=9, n=10, tip=f"at {t}") for t in range(3)]
        >>> mark = Mark(time_s=1.0, kind="drift", label="", tip="worse")
        >>> drawn = course(dots, [mark], summary="accuracy")
        >>> drawn.count("<circle"), drawn.count('class="drift"')
        (3, 1)
    """
    begin, end = dots[0].time_s, dots[-1].time_s
    room = max(end - begin, 1.0)

    def x(time_s: float) -> float:
        return 1.5 + 97 * (time_s - begin) / room if end > begin else 50.0

    path = "L".join(f"{10 * x(d.time_s):.1f} {_HIGH * (1 - d.right / d.n):.1f}" for d in dots)
    line = Markup('<path class="line l0" d="M{0}"/>').format(path if len(dots) > 1 else f"{path}h0")
    parts, labelled = [], -math.inf
    for mark in marks:
        if begin <= mark.time_s <= end:
            at = x(mark.time_s)
            label = mark.label if at - labelled > 7 else ""
            labelled = at if label else labelled
            parts.append(_mark(mark, at, label))
    for dot in dots:
        low, high = wilson(dot.right, dot.n, Z)
        there, share = f"{x(dot.time_s):.2f}%", dot.right / dot.n
        parts.append(
            Markup(
                '<g class="dot"><line class="limits" x1="{0}" x2="{0}" y1="{1}%" y2="{2}%"/>'
                '<circle cx="{0}" cy="{3}%" r="3"/>{4}</g>'
            ).format(there, _down(high), _down(low), _down(share), _title(dot.tip))
        )
    return _svg("plot", summary, _grid(5), _sheet([line]), *parts)


def _mark(mark: Mark, at: float, label: str) -> Markup:
    side, gap = ("end", -5) if at > 80 else ("start", 5)
    words = Markup('<text x="{0}%" y="100%" dx="{1}" dy="-6" text-anchor="{2}">{3}</text>')
    return Markup(
        '<g class="{0}"><line x1="{1}%" x2="{1}%" y2="100%"/>'
        '<svg x="{1}%" y="0" overflow="visible"><path d="M-5 -4H5L0 4Z"/></svg>{2}{3}</g>'
    ).format(
        mark.kind,
        f"{at:.2f}",
        words.format(f"{at:.2f}", gap, side, label) if label else "",
        _title(mark.tip),
    )


def interval(
    limits: tuple[float, float, float],
    *,
    scale: tuple[float, float],
    marks: Sequence[tuple[float, str]] = (),
    kind: str = "",
    summary: str,
) -> Markup:
    """A value and its limits, as a bar.

    Args:
        limits: (lower limit, value, upper limit).
        scale: The values at the left and the right edge; what lies beyond is drawn at the edge.
        marks: (value, class of the style sheet) of lines across: "zero", "asked".
        kind: A class of the style sheet: "good", "bad", "l1", ...
        summary: What it shows, in words.

    Example:
        >>> drawn = interval((-0.1, 0.0, 0.1), scale=(-0.2, 0.2), summary="none")
        >>> 'x1="25.00%" x2="75.00%"' in drawn
        True
    """
    left, right = scale

    def x(value: float) -> str:
        return f"{100 * max(0.0, min(1.0, (value - left) / (right - left))):.2f}%"

    low, middle, high = limits
    across = Markup('<line class="{0}" x1="{1}" x2="{1}" y1="0" y2="100%"/>')
    end = Markup('<line class="range" x1="{0}" x2="{0}" y1="28%" y2="72%"/>')
    return _svg(
        f"interval {kind}".strip(),
        summary,
        _title(summary),
        *(across.format(name, x(value)) for value, name in marks),
        Markup('<line class="range" x1="{0}" x2="{1}" y1="50%" y2="50%"/>').format(x(low), x(high)),
        end.format(x(low)),
        end.format(x(high)),
        Markup('<circle cx="{0}" cy="50%" r="4"/>').format(x(middle)),
    )


def bar(parts: Sequence[tuple[float, str]], *, summary: str) -> Markup:
    """Shares of a whole, side by side.

    Args:
        parts: (share of 1, class of the style sheet), from the left; the rest stays empty.
        summary: What it shows, in words.

    Example:
        >>> str(bar([(0.25, "spent")], summary="a quarter")).count("<rect")
        1
    """
    drawn, at = [], 0.0
    for share, kind in parts:
        wide = max(0.0, min(share, 1 - at))
        rect = Markup('<rect class="{0}" x="{1}%" width="{2}%" height="100%"/>')
        drawn.append(rect.format(kind, f"{100 * at:.2f}", f"{100 * wide:.2f}"))
        at += wide
    return _svg("bar", summary, _title(summary), *drawn)


def spark(line: Points, *, summary: str, top: float = 0.0) -> Markup:
    """A line as small as a word.

    Args:
        line: Values >= 0; None leaves a gap.
        summary: What it shows, for those who do not see it.
        top: The value at the upper edge; 0: the largest.

    Example:
        >>> spark([0.0, 1.0], summary="rising").count("path")
        1
        >>> spark([], summary="nothing").count("path")
        0
    """
    top = top or max((v for v in line if v is not None), default=0.0) or 1.0
    pieces = _pieces(line, len(line), top, 96.0, 22.0)
    drawn = [Markup('<path class="line l0" d="{0}"/>').format(p) for p in pieces]
    return Markup(
        '<svg class="spark" viewBox="0 -1 96 24" preserveAspectRatio="none" role="img" '
        'aria-label="{0}">{1}</svg>'
    ).format(summary, Markup("").join(drawn))


def _svg(kind: str, summary: str, *parts: Markup) -> Markup:
    return Markup('<svg class="{0}" role="img" aria-label="{1}">{2}</svg>').format(
        kind, summary, Markup("").join(parts)
    )


def _title(words: str) -> Markup:
    return Markup("<title>{0}</title>").format(words)


def _sheet(parts: Sequence[Markup]) -> Markup:
    """What may be stretched, 1000 by 200 units over all the room there is."""
    return Markup(
        '<svg width="100%" height="100%" viewBox="0 0 1000 200" preserveAspectRatio="none" '
        'overflow="visible">{0}</svg>'
    ).format(Markup("").join(parts))


def _grid(lines: int) -> Markup:
    line = Markup('<line class="grid" x2="100%" y1="{0}%" y2="{0}%"/>')
    return Markup("").join(line.format(f"{100 * n / (lines - 1):g}") for n in range(lines))


def _down(share: float) -> str:
    return f"{100 * (1 - share):.2f}"


def _pieces(line: Points, steps: int, top: float, wide: float, high: float) -> list[str]:
    """Paths of the unbroken runs; a single point becomes a dot."""
    runs: list[list[str]] = [[]]
    for step, value in enumerate(line):
        if value is None or not math.isfinite(value):
            runs.append([])
            continue
        x, y = (step + 0.5) * wide / steps, high * (1.0 - min(value, top) / top)
        runs[-1].append(f"{x:.1f} {y:.1f}")
    return [f"M{'L'.join(run)}{'' if len(run) > 1 else 'h.1'}" for run in runs if run]
