"""Pieces of the dashboard's pages: figures, charts, and what other rooms of the server show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from tessera.errors import InputError
from tessera.serve.dashboard_chart import chart, count, duration, nice, number
from tessera.serve.dashboard_traffic import Figures, Step

__all__ = [
    "PLACES",
    "Context",
    "Facts",
    "Panel",
    "held",
    "latency_chart",
    "panel_chart",
    "rate_chart",
    "tile",
    "tiles",
]

PLACES = ("overview", "tenant", "alias", "delta")

Context = dict[str, Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Facts:
    """What a panel shows; at least one of the two.

    Attributes:
        note: A sentence.
        columns: Heads of a table.
        rows: Its rows, text.
        lines: Name -> values over time, None where there was none: a chart.
    """

    note: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    lines: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Panel:
    """A part of a page that another room of the server fills: a split, evidence, drift, a budget.

    Attributes:
        place: One of PLACES.
        title: Its heading.
        read: (tenant, name of the alias or hash of the delta; "" where there is none) -> what there
            is to show. None: nothing, and the panel is not there.

    Example:
        >>> Panel(place="tenant", title="Budget", read=lambda tenant, name: None).title
        'Budget'
    """

    place: str
    title: str
    read: Callable[[str, str], Facts | None]

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise InputError(f"a panel's place is one of {PLACES}, got {self.place!r}")


def held(tenants: int, deltas: int | None, aliases: int) -> str:
    """What the server holds, in words.

    Example:
        >>> held(1, 2, 3), held(1, None, 1)
        ('1 tenant, 2 deltas, 3 aliases', '1 tenant, 1 alias')
    """
    parts = [count(tenants, "tenant"), count(aliases, "alias", "aliases")]
    if deltas is not None:
        parts.insert(1, count(deltas, "delta"))
    return ", ".join(parts)


def tile(label: str, value: str, note: str, mark: str = "") -> Context:
    """A figure and its label; `mark` is a class of the style sheet."""
    return {"label": label, "value": value, "note": note, "mark": mark}


def tiles(figures: Figures | None) -> list[Context]:
    """The figures of one tenant, or of all."""
    if figures is None or (not figures.requests and not figures.per_minute):
        return [tile("Requests a minute", "0", "none in the last 5 minutes")]
    over = "last 5 min" if figures.over_s > 290 else f"last {max(1, round(figures.over_s))} s"
    p50, p95, p99 = figures.seconds or (None, None, None)
    share = figures.failed / figures.requests if figures.requests else 0.0
    refused = f"{figures.refused:,} refused (4xx), {over}"
    return [
        tile("Requests a minute", number(figures.per_minute), f"{figures.requests:,} in {over}"),
        tile("Latency p50", duration(p50), over),
        tile("p95", duration(p95), over),
        tile("p99", duration(p99), over),
        tile("Errors", f"{100 * share:.2g} %", refused, mark="bad" if figures.failed else ""),
    ]


def _span(steps: Sequence[Step]) -> str:
    """How long ago a chart begins."""
    begin_s = 2 * steps[0].ago_s - steps[1].ago_s
    return f"{begin_s / 60:.0f} min ago" if begin_s >= 100 else f"{begin_s:.0f} s ago"


def _when(step: Step) -> str:
    return f"{step.ago_s / 60:.0f} min ago" if step.ago_s >= 60 else "now"


def rate_chart(steps: Sequence[Step]) -> Context:
    """Requests a minute over the last hour."""
    rates = [s.per_minute for s in steps]
    top = nice(max(rates))
    tips = [f"{_when(s)}: {number(s.per_minute)} a minute, {s.failed} failed" for s in steps]
    summary = f"Requests a minute, at most {number(max(rates))}"
    return {
        "title": "Requests a minute",
        "names": (),
        "ticks": (number(top), number(top / 2), "0"),
        "span": _span(steps),
        "svg": chart([rates], top=top, summary=summary, tips=tips),
    }


def latency_chart(steps: Sequence[Step]) -> Context:
    """p50, p95 and p99 over the last hour."""
    lines = [[None if s.seconds is None else s.seconds[i] for s in steps] for i in range(3)]
    finite = [v for v in lines[2] if v is not None and v < math.inf]
    top = nice(max(finite, default=0.0)) if finite else 0.01
    tips = [
        f"{_when(s)}: " + (", ".join(map(duration, s.seconds)) if s.seconds else "no request")
        for s in steps
    ]
    return {
        "title": "Latency",
        "names": ("p50", "p95", "p99"),
        "ticks": (duration(top), duration(top / 2), "0"),
        "span": _span(steps),
        "svg": chart(lines, top=top, summary="Latency: p50, p95 and p99", tips=tips),
    }


def panel_chart(facts: Facts) -> Context | None:
    """The lines of a panel; None where it has none."""
    values = [v for line in facts.lines.values() for v in line if v is not None]
    if not values:
        return None
    top = nice(max(values))
    names = tuple(facts.lines)[:3]
    lines = [facts.lines[name] for name in names]
    return {
        "title": "",
        "names": names,
        "ticks": (number(top), number(top / 2), "0"),
        "span": "",
        "svg": chart(lines, top=top, summary=", ".join(names)),
    }
