"""Pieces of the dashboard's pages: figures, and charts of what went through the server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tessera.serve.dashboard_chart import chart
from tessera.serve.dashboard_traffic import Figures, Step
from tessera.serve.dashboard_words import count, duration, nice, number, percent

__all__ = ["Context", "held", "latency_chart", "rate_chart", "tile", "tiles"]

Context = dict[str, Any]

_SOON = "The chart begins with the second reading; one is taken every 10 seconds."


def held(tenants: int, deltas: int, aliases: int) -> str:
    """What the server holds, in words.

    Example:
        >>> held(1, 2, 3)
        '1 tenant, 2 deltas, 3 aliases'
    """
    parts = (count(tenants, "tenant"), count(deltas, "delta"), count(aliases, "alias", "aliases"))
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
        tile("Errors", percent(share), refused, mark="bad" if figures.failed else ""),
    ]


def rate_chart(steps: Sequence[Step]) -> Context:
    """Requests a minute over the last hour."""
    if len(steps) < 2 or not any(s.per_minute for s in steps):
        return _frame("Requests a minute", (), note=_note(steps))
    rates = [s.per_minute for s in steps]
    top = nice(max(rates))
    tips = [f"{_when(s)}: {number(s.per_minute)} a minute, {s.failed} failed" for s in steps]
    summary = f"Requests a minute, now {number(rates[-1])}, at most {number(max(rates))}"
    return _frame(
        "Requests a minute",
        (),
        ticks=(number(top), number(top / 2), "0"),
        span=(_begin(steps), "now"),
        svg=chart([rates], top=top, summary=summary, tips=tips),
        columns=("Until", "A minute", "Failed"),
        rows=[(_when(s), number(s.per_minute), f"{s.failed:,}") for s in reversed(steps)],
    )


def latency_chart(steps: Sequence[Step]) -> Context:
    """p50, p95 and p99 over the last hour."""
    names = ("p50", "p95", "p99")
    if len(steps) < 2 or not any(s.seconds for s in steps):
        return _frame("Latency", names, note=_note(steps))
    lines = [[None if s.seconds is None else s.seconds[i] for s in steps] for i in range(3)]
    finite = [v for v in lines[2] if v is not None and v < math.inf]
    top = nice(max(finite, default=0.0)) if finite else 0.01
    tips = [
        f"{_when(s)}: " + (", ".join(map(_named, names, s.seconds)) if s.seconds else "no request")
        for s in steps
    ]
    return _frame(
        "Latency",
        names,
        ticks=(duration(top), duration(top / 2), "0"),
        span=(_begin(steps), "now"),
        svg=chart(lines, top=top, summary=f"Latency: {tips[-1]}", tips=tips),
        columns=("Until", *names),
        rows=[(_when(s), *map(duration, s.seconds or (None,) * 3)) for s in reversed(steps)],
    )


def _frame(
    title: str,
    names: Sequence[str],
    *,
    ticks: Sequence[str] = ("", "", ""),
    span: Sequence[str] = ("", ""),
    svg: str = "",
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
    note: str = "",
) -> Context:
    return {
        "title": title,
        "names": names,
        "ticks": ticks,
        "span": span,
        "svg": svg,
        "note": note,
        "columns": columns,
        "rows": rows,
    }


def _note(steps: Sequence[Step]) -> str:
    if len(steps) < 2:
        return _SOON
    return f"No request since {_begin(steps)}."


def _named(name: str, seconds: float) -> str:
    return f"{name} {duration(seconds)}"


def _begin(steps: Sequence[Step]) -> str:
    """How long ago a chart begins."""
    begin_s = 2 * steps[0].ago_s - steps[1].ago_s
    return f"{begin_s / 60:.0f} min ago" if begin_s >= 100 else f"{begin_s:.0f} s ago"


def _when(step: Step) -> str:
    return f"{step.ago_s / 60:.0f} min ago" if step.ago_s >= 60 else "now"
