"""What every page is put together from."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tessera.report.chart import Line, Span, line_chart
from tessera.report.style import CSS
from tessera.report.svg import escape, tag

__all__ = ["both", "command_line", "document", "figure", "scroll", "section", "table"]


def document(title: str, headline: str, lede: str, *sections: str) -> str:
    """A page that needs nothing else to be read."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} – Tessera report</title>",
            f"<style>{CSS}</style>",
            "</head>",
            "<body>",
            "<header>",
            tag("h1", {}, escape(headline)),
            tag("p", {"class": "lede"}, escape(lede)),
            "</header>",
            "<main>",
            *sections,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def section(heading: str, note: str, *inside: str) -> str:
    """A section under its heading, with a note that explains it."""
    explained = [tag("p", {"class": "note"}, escape(note))] if note else []
    return tag("section", {}, tag("h2", {}, escape(heading)), *explained, *inside)


def scroll(*inside: str) -> str:
    """What may be wider than the page."""
    return tag("div", {"class": "scroll"}, *inside)


def table(kind: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table of the style sheet's class `kind`."""
    head = tag("thead", {}, tag("tr", {}, *heads))
    return tag("table", {"class": kind}, head, tag("tbody", {}, *rows))


def figure(heading: str, caption: str, drawing: str) -> str:
    """A drawing with its heading and its words."""
    words = tag("figcaption", {}, escape(caption))
    return tag("figure", {}, tag("h3", {}, escape(heading)), drawing, words)


def both(
    lines: Sequence[Line], spans: Sequence[Span], summary: str, *, unit: str = "training step"
) -> str:
    """The chart for a wide page and for a phone; the style sheet shows one of them."""
    return "".join(
        tag(
            "div",
            {"class": kind},
            line_chart(lines, spans, width=width, summary=summary, unit=unit),
        )
        for kind, width in (("wide", 780), ("narrow", 368))
    )


def command_line(command: str) -> str:
    """A command as HTML text whose options stay whole."""
    # Browsers break a line after a hyphen, which would tear "--lr" apart.
    return re.sub(r"\S*-\S*", r'<span class="word">\g<0></span>', escape(command))
