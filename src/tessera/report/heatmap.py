"""The accuracy matrix as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tessera.report.result import Row
from tessera.report.svg import escape, ink, percent, ramp, readable_on, tag

__all__ = ["heat_map", "legend"]

# One hue, lightness monotone: it reads the same with every kind of colour vision, and in grey.
# On a dark page the scale runs the other way, so "much" is always what stands out.
LIGHT = ("#e6eff8", "#bcd4ea", "#82b3da", "#2f74ad", "#175391", "#0a3370")
DARK = ("#1d2b3a", "#20466b", "#2a6699", "#4a8fc4", "#86bce4", "#cde6fa")


class _Size(NamedTuple):
    width: float
    height: float
    font: float
    digits: int


def heat_map(rows: Sequence[Row], *, label: str) -> str:
    """An accuracy matrix, rows "after task i", columns "on task j".

    Cells above the diagonal, where task j was not learned yet, are hatched instead of coloured;
    the hatch is defined by `legend`, which must stand on the same page.

    Args:
        rows: T + 1 rows of T accuracies in [0, 1]; row 0 is the untrained model.
        label: Whose matrix it is.

    Returns:
        An SVG element.

    Example:
        >>> "after task 1, on task 1: 90.0 %" in heat_map([(0.1,), (0.9,)], label="er")
        True
    """
    num_tasks, size = len(rows) - 1, _size(len(rows) - 1)
    left, top = 96.0, 22.0
    width = left + num_tasks * size.width + 1
    height = top + (num_tasks + 1) * size.height + 7
    parts = [_text(left - 10, top - 8, "on task", "end", "axis")]
    for task in range(1, num_tasks + 1):
        parts.append(_text(left + (task - 0.5) * size.width, top - 8, str(task), "middle", "axis"))
    for after, row in enumerate(rows):
        # A gap sets the untrained model apart: it is the base line, not a step of learning.
        y = top + after * size.height + (6 if after else 0)
        name = f"after task {after}" if after else "untrained"
        parts.append(_text(left - 10, y + size.height / 2 + 4, name, "end", "axis"))
        for task, value in enumerate(row, start=1):
            x = left + (task - 1) * size.width
            parts.append(_cell(x, y, size, value, after=after, task=task))
    last = ", ".join(f"task {j} {percent(v)} %" for j, v in enumerate(rows[-1], start=1))
    return tag(
        "svg",
        {
            "viewBox": f"0 0 {width:.0f} {height:.0f}",
            "width": f"{width:.0f}",
            "height": f"{height:.0f}",
            "style": f"min-width:{0.85 * width:.0f}px",
            "role": "img",
            "aria-label": f"Accuracy matrix of {label}. After the last task: {last}.",
            "class": "heat",
        },
        *parts,
    )


def legend() -> str:
    """The colour scale of every heat map, and the hatch that `heat_map` refers to.

    Returns:
        An SVG element.

    Example:
        >>> "not learned yet" in legend()
        True
    """
    stops = [
        tag(
            "stop",
            {
                "offset": f"{step * 20}%",
                "class": "ink",
                "style": ink(LIGHT[step], DARK[step]),
            },
        )
        for step in range(6)
    ]
    hatch = tag(
        "pattern",
        {
            "id": "unlearned",
            "width": 6,
            "height": 6,
            "patternUnits": "userSpaceOnUse",
            "patternTransform": "rotate(45)",
        },
        tag("line", {"x1": 0, "y1": 0, "x2": 0, "y2": 6, "class": "hatch"}),
    )
    return tag(
        "svg",
        {
            "viewBox": "0 0 340 30",
            "width": 340,
            "height": 30,
            "role": "img",
            "aria-label": "Scale: faint is 0 % accuracy, strong is 100 %; hatched: not learned yet",
            "class": "heat",
        },
        tag("defs", {}, tag("linearGradient", {"id": "scale"}, *stops), hatch),
        tag("rect", {"x": 0.5, "y": 0.5, "width": 160, "height": 11, "fill": "url(#scale)"}),
        _text(0, 26, "0", "start", "axis"),
        _text(80, 26, "50", "middle", "axis"),
        _text(160, 26, "100 %", "end", "axis"),
        tag(
            "rect",
            {"x": 200.5, "y": 0.5, "width": 26, "height": 11, "fill": "url(#unlearned)"},
        ),
        _text(234, 10, "not learned yet", "start", "axis"),
    )


def _size(num_tasks: int) -> _Size:
    if num_tasks <= 10:
        return _Size(46, 30, 12.5, 1)
    return _Size(31, 24, 11.5, 0) if num_tasks <= 20 else _Size(25, 20, 10, 0)


def _cell(x: float, y: float, size: _Size, value: float | None, *, after: int, task: int) -> str:
    learned = 1 <= task <= after
    when = f"after task {after}" if after else "untrained"
    figure = "not measured" if value is None else f"{percent(value)} %"
    tooltip = f"{when}, on task {task}: {figure}" + ("" if learned else " (not learned yet)")
    box: dict[str, object] = {
        "x": x + 0.5,
        "y": y + 0.5,
        "width": size.width - 1,
        "height": size.height - 1,
    }
    number: dict[str, object] = {
        "x": x + size.width / 2,
        "y": y + size.height / 2 + 0.36 * size.font,
        "text-anchor": "middle",
        "font-size": size.font,
    }
    if learned and value is not None:
        light, dark = ramp(LIGHT, value), ramp(DARK, value)
        box |= {"class": "ink cell", "style": ink(light, dark)}
        number |= {"class": "ink", "style": ink(readable_on(light), readable_on(dark))}
    else:
        box |= {"class": "empty" if learned else "ahead"}
        number |= {"class": "muted"}
    return tag(
        "g",
        {},
        tag("title", {}, escape(tooltip)),
        tag("rect", box),
        tag("text", number, percent(value, digits=size.digits)),
    )


def _text(x: float, y: float, words: str, anchor: str, kind: str) -> str:
    return tag("text", {"x": x, "y": y, "text-anchor": anchor, "class": kind}, escape(words))
