"""Numbers and times as words, for the dashboard's pages."""

from __future__ import annotations

import math
import time

from markupsafe import Markup, escape

from tessera.serve.gates_statistics import wilson

__all__ = [
    "Z",
    "ago",
    "count",
    "duration",
    "energy",
    "gain",
    "limits",
    "moment",
    "nice",
    "number",
    "percent",
    "sentence",
    "size",
    "span",
]

Z = 1.959964  # of limits of 95 %, two-sided


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
    """How long ago, roughly; clocks may differ, so the nearest future is now.

    Example:
        >>> ago(-3), ago(125), ago(7300), ago(200000), ago(-125)
        ('just now', '2 min ago', '2 h ago', '2 days ago', 'in 2 min')
    """
    ahead = seconds <= -60
    length_s = abs(seconds) if ahead else seconds
    for unit, length in (("day", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if length_s >= length:
            many = int(length_s // length)
            words = f"{many} {unit}{'s' if unit == 'day' and many > 1 else ''}"
            return f"in {words}" if ahead else f"{words} ago"
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


def percent(share: float) -> str:
    """A share in percent: whole where it is far from 0 and 100, finer where it is near.

    Example:
        >>> percent(0.876), percent(0.0005), percent(0.1), percent(1.0), percent(0.998)
        ('88 %', '0.05 %', '10 %', '100 %', '99.8 %')
    """
    value = 100 * share
    if 0 < value < 2 or 98 < value < 100:
        return f"{value:.3g} %" if value >= 98 else f"{value:.2g} %"
    return f"{value:.0f} %"


def limits(right: int, n: int) -> str:
    """The limits of a share, 95 % (Wilson).

    Example:
        >>> limits(81, 263)
        '26 % to 37 %'
    """
    low, high = wilson(right, n, Z)
    return f"{percent(low)} to {percent(high)}"


def gain(change: float) -> str:
    """A difference of two shares, in percentage points.

    Example:
        >>> gain(0.0312), gain(-0.2), gain(0.0)
        ('+3.1 pp', '−20.0 pp', '0.0 pp')
    """
    value = round(100 * change, 1)
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{abs(value):.1f} pp"


def span(seconds: float) -> str:
    """A length of time.

    Example:
        >>> span(90), span(3600), span(0.25), span(86400)
        ('90 s', '1 h', '0.25 s', '1 day')
    """
    for unit, length in (("day", 86400.0), ("h", 3600.0), ("min", 60.0)):
        many = seconds / length
        if many >= 1 and (seconds % length == 0 or many >= 2):
            return f"{number(many)} {unit}{'s' if unit == 'day' and many != 1 else ''}"
    return f"{number(seconds)} s"


def energy(joules: float) -> str:
    """Joules.

    Example:
        >>> energy(0.5), energy(42_000.0)
        ('0.5 J', '42 kJ')
    """
    return f"{number(joules / 1000)} kJ" if joules >= 10_000 else f"{number(joules)} J"


def sentence(words: str) -> str:
    """Words as a sentence.

    Example:
        >>> sentence("the slice de lost"), sentence("")
        ('The slice de lost.', '')
    """
    return words and words[:1].upper() + words[1:] + ("" if words[-1] in ".!?" else ".")
