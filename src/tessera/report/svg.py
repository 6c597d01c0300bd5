"""The few pieces of markup and colour that the figures and the page are written with."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

__all__ = ["contrast", "escape", "ink", "percent", "ramp", "readable_on", "shorten", "tag"]


def escape(text: object) -> str:
    """Any text from outside as HTML text.

    Example:
        >>> escape("<b>")
        '&lt;b&gt;'
    """
    return html.escape(str(text), quote=True)


def tag(name: str, attributes: Mapping[str, object], *inside: str) -> str:
    """One element; attribute values are escaped, what is inside is markup already.

    Args:
        name: The element, e.g. "rect".
        attributes: Name -> value. Floats are written to a tenth of a pixel.
        inside: Markup, joined. Without any, the element closes itself.

    Returns:
        The markup.

    Example:
        >>> tag("text", {"x": 1.0, "y": 2.26}, escape("a & b"))
        '<text x="1" y="2.3">a &amp; b</text>'
        >>> tag("rect", {"width": 3})
        '<rect width="3"/>'
    """
    written = "".join(
        f' {key}="{_number(value) if isinstance(value, float) else escape(value)}"'
        for key, value in attributes.items()
    )
    return f"<{name}{written}>{''.join(inside)}</{name}>" if inside else f"<{name}{written}/>"


def percent(value: float | None, *, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage without its sign; None is a dash.

    Example:
        >>> percent(0.7123), percent(0.7123, digits=0), percent(None)
        ('71.2', '71', '–')
    """
    return "–" if value is None else f"{100 * value:.{digits}f}"


def shorten(text: str, width: int) -> str:
    """The text, cut to `width` characters with an ellipsis.

    Example:
        >>> shorten("gradient episodic memory", 12)
        'gradient ep…'
    """
    return text if len(text) <= width else text[: width - 1] + "…"


def ramp(stops: Sequence[str], at: float) -> str:
    """The colour a fraction of the way along a scale.

    Args:
        stops: Colours as "#rrggbb", evenly spaced.
        at: In [0, 1].

    Returns:
        A colour as "#rrggbb".

    Example:
        >>> ramp(["#000000", "#ffffff"], 0.5)
        '#808080'
    """
    place = at * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    pairs = zip(_channels(stops[left]), _channels(stops[left + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - left)):02x}" for a, b in pairs)


def contrast(one: str, other: str) -> float:
    """The WCAG 2 contrast ratio of two colours, 1 .. 21; text needs 4.5.

    Example:
        >>> round(contrast("#000000", "#ffffff"))
        21
    """
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def readable_on(fill: str) -> str:
    """White or black, whichever reads better on a fill.

    Example:
        >>> readable_on("#08306b"), readable_on("#e4eef8")
        ('#ffffff', '#000000')
    """
    return max("#ffffff", "#000000", key=lambda text: contrast(text, fill))


def ink(light: str, dark: str) -> str:
    """The `style` of an element of class "ink": its colour on a light and on a dark page.

    Example:
        >>> ink("#111111", "#eeeeee")
        '--l:#111111;--d:#eeeeee'
    """
    return f"--l:{light};--d:{dark}"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _luminance(colour: str) -> float:
    shares = [channel / 255 for channel in _channels(colour)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
