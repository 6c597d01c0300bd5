"""Small charts as SVG, and numbers as words, for the dashboard's pages."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from markupsafe import Markup, escape

__all__ = ["ago", "chart", "count", "duration", "moment", "nice", "number", "size", "spark"]

_WIDE, _HIGH = 1000.0, 200.0

Points = Sequence[float | None]


def chart(lines: Sequence[Points], *, top: float, summary: str, tips: Sequence[str] = ()) -> Markup:
    """Lines over equal steps, stretched to whatever room there is; words stand beside it in HTML.

    Args:
        lines: Values in [0, top]; None leaves a gap. The last is drawn on top.
        top: The value at the upper edge, > 0.
        summary: What it shows, for those who do not see it.
        tips: For each step, shown where the mouse is.

    Returns:
        An SVG element without colours or styles of its own: those are the style sheet's.

    Example:
        >>> str(chart([[0.0, 5.0]], top=10.0, summary="a & b"))[:64]
        '<svg class="plot" viewBox="0 0 1000 200" preserveAspectRatio="no'
    """
    steps = max((len(line) for line in lines), default=0)
    parts = [
        Markup('<path class="grid" d="M0 {0}H1000"/>').format(f"{y:g}")
        for y in (0.0, _HIGH / 2, _HIGH)
    ]
    for number, line in enumerate(lines):
        for piece in _pieces(line, steps, top, _WIDE, _HIGH):
            parts.append(Markup('<path class="line l{0}" d="{1}"/>').format(number, piece))
    wide = _WIDE / max(1, steps)
    for step, tip in enumerate(tips):
        parts.append(
            Markup('<rect class="tip" x="{0}" y="0" width="{1}" height="200">{2}</rect>').format(
                f"{step * wide:.1f}", f"{wide:.1f}", Markup("<title>{0}</title>").format(tip)
            )
        )
    return Markup(
        '<svg class="plot" viewBox="0 0 1000 200" preserveAspectRatio="none" role="img" '
        'aria-label="{0}">{1}</svg>'
    ).format(summary, Markup("").join(parts))


def spark(line: Points, *, summary: str) -> Markup:
    """A line as small as a word.

    Example:
        >>> "0,23" in spark([0.0, 1.0], summary="rising")
        False
        >>> spark([], summary="nothing").count("path")
        0
    """
    top = max((v for v in line if v is not None), default=0.0) or 1.0
    pieces = _pieces(line, len(line), top, 96.0, 22.0)
    drawn = [Markup('<path class="line l0" d="{0}"/>').format(p) for p in pieces]
    return Markup(
        '<svg class="spark" viewBox="0 -1 96 24" preserveAspectRatio="none" role="img" '
        'aria-label="{0}">{1}</svg>'
    ).format(summary, Markup("").join(drawn))


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


def nice(value: float) -> float:
    """The next number whose half is round too; 1 for what is not above 0.

    Example:
        >>> nice(0.0), nice(37.0), nice(0.0042), nice(100.0)
        (1.0, 40.0, 0.005, 100.0)
    """
    if not 0.0 < value < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    for lead in (1.0, 1.2, 1.6, 2.0, 2.4, 3.0, 4.0, 5.0, 6.0, 8.0):
        if value <= lead * power * (1 + 1e-9):
            return float(f"{lead * power:.12g}")
    return 10.0 * power


def number(value: float) -> str:
    """Three digits that matter, and none that do not.

    Example:
        >>> number(0), number(0.25), number(12.34), number(12345.6)
        ('0', '0.25', '12.3', '12,346')
    """
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def count(value: int, one: str, many: str = "") -> str:
    """A number and its noun.

    Example:
        >>> count(1, "delta"), count(2000, "delta"), count(0, "alias", "aliases")
        ('1 delta', '2,000 deltas', '0 aliases')
    """
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def duration(seconds: float | None) -> str:
    """A latency.

    Example:
        >>> duration(0.00423), duration(1.25), duration(None), duration(math.inf)
        ('4.23 ms', '1.25 s', '–', '> 30 s')
    """
    if seconds is None:
        return "–"
    if math.isinf(seconds):
        return "> 30 s"
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1e3 * seconds)} ms"


def size(value: int) -> str:
    """Bytes.

    Example:
        >>> size(12), size(4096), size(5 << 20)
        ('12 B', '4 KiB', '5 MiB')
    """
    amount, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{number(amount)} {unit}"


def ago(seconds: float) -> str:
    """How long ago, roughly; clocks may differ, so the future is now.

    Example:
        >>> ago(-3), ago(125), ago(7300), ago(200000)
        ('just now', '2 min ago', '2 h ago', '2 days ago')
    """
    for unit, length in (("day", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            many = int(seconds // length)
            return f"{many} {unit}{'s' if unit == 'day' and many > 1 else ''} ago"
    return "just now"


def moment(at_s: float, now_s: float) -> Markup:
    """A time as how long ago, with the whole of it for the mouse and for machines.

    Example:
        >>> str(moment(0.0, 61.0))
        '<time datetime="1970-01-01T00:00:00Z" title="1970-01-01 00:00:00 UTC">1 min ago</time>'
    """
    try:
        at = time.gmtime(at_s)
        said, shown = time.strftime("%Y-%m-%dT%H:%M:%SZ", at), time.strftime("%F %T UTC", at)
    except (OverflowError, OSError, ValueError):  # a clock that was far off
        return escape(f"at {at_s:g} s")
    return Markup('<time datetime="{0}" title="{1}">{2}</time>').format(
        said, shown, ago(now_s - at_s)
    )
