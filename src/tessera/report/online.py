"""The page of a prequential run: accuracy over the stream, with the drifts marked."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tessera.errors import InputError
from tessera.files import write_whole
from tessera.report.chart import Line, Span
from tessera.report.parts import both, command_line, document, figure, scroll, section, table
from tessera.report.svg import escape, percent, tag

__all__ = ["write_online"]

_ADVICE = "Choose a folder that can be written to, or make room in it, and write the report again"
_KEYS = (
    *("recipe", "stream", "seed", "rows", "accuracy", "no_change", "majority", "kappa_temporal"),
    *("curve", "drifts", "steps", "cpu_seconds", "weights_sha256", "settings"),
)
_COLOURS = (("#0072b2", "#56b4e9"), ("#d55e00", "#f0803c"), ("#008a67", "#22b991"))
_FLOOR = ("#777777", "#9a9a9a")
_TERMS = (
    (
        "accuracy",
        "prequential: every row is predicted before it is learned; the share that was right. Gama, "
        "Sebastiao & Rodrigues 2013, Machine Learning 90(3).",
    ),
    ("no-change", "what answering with the label before would have got."),
    ("majority", "what answering with the most frequent label so far would have got."),
    (
        "kappa-temporal",
        "(accuracy - no-change) / (1 - no-change): 0 is no better than no-change, 1 is perfect. "
        "Zliobaite et al. 2015, Machine Learning 98(3).",
    ),
)


def write_online(
    results: Sequence[Mapping[str, Any]], folder: str | os.PathLike[str]
) -> pathlib.Path:
    """Write a prequential run and those beside it as a self-contained page, `folder/index.html`.

    Args:
        results: As `recipes.learn_online` returns them, the main one first.
        folder: Created if it does not exist; a report already there is replaced in one move.

    Returns:
        The path of the page.

    Raises:
        InputError: There is no result, or one lacks a key or is of another stream.
        StorageError: The page could not be written; an older one is unchanged.

    Example:
        >>> import tempfile
        >>> result = {
        ...     "recipe": "online", "stream": "sea", "seed": 0, "rows": 400, "accuracy": 0.8,
        ...     "no_change": 0.5, "majority": 0.6, "kappa_temporal": 0.6, "drifts": [200],
        ...     "curve": [[200, 0.7, 0.5, 0.6], [400, 0.9, 0.5, 0.6]], "steps": 40,
        ...     "cpu_seconds": 0.1, "weights_sha256": "5e88", "settings": {},
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     "80.0 %" in write_online([result], folder).read_text(encoding="utf-8")
        True
    """
    _check(results)
    path = pathlib.Path(folder) / "index.html"
    write_whole(path, _page(results).encode("utf-8", errors="replace"), advice=_ADVICE)
    return path


def _check(results: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(results, Mapping) or not results:
        raise InputError("report.write_online needs a list with at least one result")
    for index, result in enumerate(results):
        if lacking := [key for key in _KEYS if key not in result]:
            raise InputError(
                f"report.write_online needs the key {lacking[0]!r} in results[{index}]; pass what "
                "recipes.learn_online returned, or `tessera learn --online --json` wrote"
            )
        if (result["stream"], result["rows"]) != (results[0]["stream"], results[0]["rows"]):
            raise InputError(
                "report.write_online compares results on one stream, but results[0] is of "
                f"{results[0]['stream']} and results[{index}] of {result['stream']}: write one "
                "report each"
            )


def _page(results: Sequence[Mapping[str, Any]]) -> str:
    main = results[0]
    floor = max(main["no_change"], main["majority"])
    name = "no-change" if floor == main["no_change"] else "majority"
    return document(
        f"{main['recipe']} on {main['stream']}",
        f"{main['recipe']} on {main['stream']}: {percent(main['accuracy'])} % of "
        f"{main['rows']:,} rows right before they were learned",
        f"The better of the predictors that learn nothing, {name}, gets {percent(floor)} %. "
        f"{_drifts(main)}",
        section("Summary", "", _summary(results)),
        section("Accuracy over the stream", "", _chart(results)),
        section("How to reproduce", "", *_reproduce(results)),
    )


def _drifts(main: Mapping[str, Any]) -> str:
    rows = main["drifts"]
    if not rows:
        return "No drift was seen."
    shown = ", ".join(f"{row:,}" for row in rows[:12])
    times = "once" if len(rows) == 1 else f"{len(rows)} times"
    return f"Drift was seen {times}: after row {shown}{' ...' if len(rows) > 12 else ''}."


def _summary(results: Sequence[Mapping[str, Any]]) -> str:
    names = ("accuracy, %", "kappa-temporal", "drifts seen", "steps", "CPU seconds")
    heads = [f'<th scope="col">{name}</th>' for name in ("", *names)]
    rows = []
    for index, result in enumerate(results):
        figures = (
            percent(result["accuracy"]),
            f"{result['kappa_temporal']:.2f}",
            f"{len(result['drifts'])}",
            f"{result['steps']:,}",
            f"{result['cpu_seconds']:,.2f}",
        )
        rows.append(_row(result["recipe"], figures, main=index == 0))
    for key in ("no_change", "majority"):
        rows.append(_row(key.replace("_", "-"), (percent(results[0][key]), *("–",) * 4)))
    terms = [tag("dt", {}, name) + tag("dd", {}, escape(words)) for name, words in _TERMS]
    return scroll(table("figures", heads, rows)) + tag("dl", {}, *terms)


def _row(name: str, figures: Sequence[str], *, main: bool = False) -> str:
    cells = [tag("td", {}, escape(f)) for f in figures]
    head = tag("th", {"scope": "row"}, escape(name))
    return tag("tr", {"class": "main"} if main else {}, head, *cells)


def _chart(results: Sequence[Mapping[str, Any]]) -> str:
    main = results[0]
    if not main["curve"]:
        return tag("p", {"class": "note"}, "The stream is too short for a curve.")
    lines = [
        _line(name, main["curve"], column, _FLOOR, dashes)
        for name, column, dashes in (("no-change", 2, "2 3"), ("majority", 3, "7 3"))
    ]
    for index, result in reversed(list(enumerate(results))):
        colour = _COLOURS[index % len(_COLOURS)]
        kind = "thin" if index else "bold"
        lines.append(_line(result["recipe"], result["curve"], 1, colour, kind=kind))
    ends = [0, *main["drifts"], main["rows"]]
    spans = [Span("", a, b) for a, b in pairwise(ends)]
    every = main["curve"][0][0]
    caption = (
        f"Each point is the accuracy over the last {every:.0f} rows, before they were learned."
    )
    if main["drifts"]:
        caption += f" Dotted rules: where {main['recipe']} saw the stream drift."
    names = ", ".join(line.name for line in lines)
    summary = f"Prequential accuracy over the rows of {main['stream']}: {names}."
    return figure("Test, then learn", caption, both(lines, spans, summary, unit="row"))


def _line(
    name: str,
    curve: Sequence[Sequence[float]],
    column: int,
    colour: tuple[str, str],
    dashes: str = "",
    *,
    kind: str = "thin",
) -> Line:
    points = tuple((point[0], point[column]) for point in curve)
    return Line(
        name=name,
        points=points,
        light=colour[0],
        dark=colour[1],
        kind=kind,
        dashes=dashes,
        tooltip=f"{name}: {percent(points[-1][1])} % at the end",
    )


def _reproduce(results: Sequence[Mapping[str, Any]]) -> list[str]:
    command = results[0]["settings"].get("command")
    heads = [f'<th scope="col">{name}</th>' for name in ("recipe", "seed", "weights, SHA-256")]
    rows = [
        tag(
            "tr",
            {},
            tag("th", {"scope": "row"}, escape(r["recipe"])),
            tag("td", {}, escape(r["seed"])),
            tag("td", {}, tag("code", {}, escape(r["weights_sha256"]))),
        )
        for r in results
    ]
    shown = [tag("pre", {}, tag("code", {}, command_line(command)))] if command else []
    return [*shown, scroll(table("settings", heads, rows))]
