"""The report: one HTML file that needs nothing else to be read."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tessera.files import write_whole
from tessera.report.curves import mean_lines, task_lines, task_spans
from tessera.report.heatmap import heat_map, legend
from tessera.report.parts import both, command_line, document, figure, scroll, section, table
from tessera.report.result import Result, parse
from tessera.report.svg import escape, percent, tag

__all__ = ["write"]

_ADVICE = "Choose a folder that can be written to, or make room in it, and call report.write again"

_COLUMNS = (
    (
        "ACC",
        "average accuracy: mean accuracy on all tasks after the last one; higher is better. "
        "Lopez-Paz & Ranzato 2017, eq. 2 (arXiv:1706.08840).",
    ),
    (
        "BWT",
        "backward transfer: how much accuracy on a task changed from right after it was learned "
        "to the end, mean over all but the last task; negative is forgetting. "
        "Lopez-Paz & Ranzato 2017, eq. 3.",
    ),
    (
        "FWT",
        "forward transfer: accuracy on a task just before it is learned, minus that of the "
        "untrained model, mean over all but the first task; positive is help from earlier tasks. "
        "Lopez-Paz & Ranzato 2017, eq. 4.",
    ),
    (
        "forgetting",
        "best accuracy a task ever had before the last task, minus its final one, mean over all "
        "but the last task; lower is better. Chaudhry et al. 2018, eq. 3 (arXiv:1801.10112).",
    ),
    ("time", "wall-clock seconds of the run, evaluation included, on the machine that ran it."),
)


def write(results: Sequence[Mapping[str, Any]], folder: str | os.PathLike[str]) -> pathlib.Path:
    """Write a run and its baselines as a self-contained page, `folder/index.html`.

    The page holds no date and no machine name: equal results give equal bytes.

    Args:
        results: Mappings as `tessera learn --json` writes them, the main result first, then the
            baselines to compare it with. All on one stream and scenario.
        folder: Created if it does not exist. A report already there is replaced in one move, so a
            reader never sees half a page.

    Returns:
        The path of the page.

    Raises:
        InputError: There is no result, a key is missing, or a figure is out of range.
        StorageError: The page could not be written; an older one is unchanged.

    Example:
        >>> import tempfile
        >>> result = {
        ...     "recipe": "finetune", "scenario": "class", "stream": "digits", "seed": 0,
        ...     "num_tasks": 1, "accuracy_matrix": [[0.1], [0.9]], "average_accuracy": 0.9,
        ...     "backward_transfer": None, "forward_transfer": None, "forgetting": None,
        ...     "seconds": 1.5, "weights_sha256": "5e88", "settings": {"lr": 0.1}, "curve": [],
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write([result], folder)
        ...     path.name, "90.0 %" in path.read_text(encoding="utf-8")
        ('index.html', True)
    """
    page = _page(parse(results))
    path = pathlib.Path(folder) / "index.html"
    # A lone surrogate, legal in JSON, cannot be encoded: it becomes "?" rather than an error.
    write_whole(path, page.encode("utf-8", errors="replace"), advice=_ADVICE)
    return path


def _page(results: Sequence[Result]) -> str:
    main = results[0]
    return document(
        f"{main.label} on {main.stream}",
        _unbroken(_headline(results)),
        _lede(main),
        section("Summary", "", _summary(results)),
        _matrices(results),
        _over_time(results),
        section("Settings", "", _settings(results)),
        _reproduce(results),
    )


def _headline(results: Sequence[Result]) -> str:
    main, baselines = results[0], results[1:]
    kind = main.scenario
    if kind in ("class", "task", "domain"):
        kind += "-incremental"
    tasks = "1 task" if main.num_tasks == 1 else f"{main.num_tasks} tasks"
    outcome = f"{_share(main.average_accuracy)} average accuracy after {tasks}"
    others = ", ".join(f"{other.label} {_share(other.average_accuracy)}" for other in baselines)
    return f"{main.label} on {main.stream}, {kind}: {outcome}" + (f"; {others}" if others else "")


def _unbroken(text: str) -> str:
    """The text with a number and what it counts kept on one line."""
    return re.sub(r"(?<=\d) (?=%|tasks?\b)|(?<=\(seed) (?=\d)", "\u00a0", text)


def _share(value: float | None) -> str:
    return "undefined" if value is None else f"{percent(value)} %"


def _lede(main: Result) -> str:
    parts = []
    if main.forgetting is not None and main.num_tasks > 1:
        points = percent(abs(main.forgetting))
        side = "below" if main.forgetting > 0 else "above"
        where = "at" if points == "0.0" else f"{points} points {side}"
        parts.append(f"On average, an earlier task ends {where} its best.")
    if main.seconds is not None:
        parts.append(f"The run took {main.seconds:,.1f} s with seed {main.seed}.")
    return " ".join(parts)


def _summary(results: Sequence[Result]) -> str:
    units = ("ACC", "%"), ("BWT", "points"), ("FWT", "points"), ("forgetting", "points")
    heads = [
        f'<th scope="col">{name}<small>{unit}</small></th>'
        for name, unit in (*units, ("time", "s"))
    ]
    rows = []
    for index, result in enumerate(results):
        figures = [
            percent(result.average_accuracy),
            _points(result.backward_transfer),
            _points(result.forward_transfer),
            _points(result.forgetting).removeprefix("+"),
            "–" if result.seconds is None else f"{result.seconds:,.1f}",
        ]
        cells = [tag("td", {}, escape(figure)) for figure in figures]
        name = tag("th", {"scope": "row"}, escape(result.label))
        rows.append(tag("tr", {} if index else {"class": "main"}, name, *cells))
    terms = [tag("dt", {}, name) + tag("dd", {}, escape(words)) for name, words in _COLUMNS]
    return scroll(table("figures", ['<th scope="col">recipe</th>', *heads], rows)) + tag(
        "dl", {}, *terms
    )


def _points(value: float | None) -> str:
    if value is None:
        return "–"
    # The sign of what is shown: -0.0004 rounds to 0.0, which has none.
    figure = f"{100 * value:+.1f}".replace("-", "\u2212")
    return "0.0" if figure in ("+0.0", "\u22120.0") else figure


def _matrices(results: Sequence[Result]) -> str:
    note = (
        "Accuracy in percent. Each row is the model after one more task; read down a column to see "
        "how a task fares once it is learned."
    )
    maps = [
        tag(
            "figure",
            {},
            tag("h3", {}, escape(result.label)),
            scroll(heat_map(result.rows, label=result.label)),
        )
        for result in results
        if result.sequential
    ]
    if not maps:
        return section("Accuracy matrix", "No result learned the tasks one by one.")
    rest = [result.label for result in results if not result.sequential]
    if rest:
        note += f" All tasks at once, so without a matrix: {', '.join(rest)}."
    key = scroll(legend())
    if results[0].num_tasks > 8:
        hint = "On a narrow screen, scroll the matrix sideways to see every task."
        key += tag("p", {"class": "note narrow"}, hint)
    return section("Accuracy matrix", note, key, tag("div", {"class": "maps"}, *maps))


def _over_time(results: Sequence[Result]) -> str:
    main = results[0]
    tasks, means = task_lines(main.curve, sequential=main.sequential), mean_lines(results)
    spans = task_spans(main.curve) if main.sequential else []
    figures = []
    if tasks:
        caption = "Accuracy on the task during training."
        if main.num_tasks > 1 and not main.sequential:
            caption = "One line per task, all learned at once; the bold line is their mean."
        elif main.num_tasks > 1:
            caption = (
                "One line per task, from when its learning starts. The bold line is the mean over "
                "the tasks seen so far; dotted rules mark where one task ends and the next begins."
            )
        figures.append(
            figure(
                main.label,
                caption,
                both(tasks, spans, f"Accuracy of {main.label} on each task over training steps."),
            )
        )
    # A single result has its mean in the first chart already.
    if means and len(results) > 1:
        levels = [line.name for line in means if line.kind == "level"]
        caption = "Mean accuracy over the tasks seen so far."
        if levels:
            caption += f" For {', '.join(levels)}, the level is the final average accuracy."
        about = "Mean accuracy over the tasks seen so far, of " + ", ".join(x.name for x in means)
        figures.append(figure("All results", caption, both(means, spans, about + ".")))
    if not figures:
        return section("Accuracy over time", "No curve was recorded during training.")
    return section("Accuracy over time", "", *figures)


def _settings(results: Sequence[Result]) -> str:
    names = dict.fromkeys(name for result in results for name in result.settings)
    names.pop("command", None)
    if not names:
        return tag("p", {"class": "note"}, "No settings were recorded.")
    heads = ['<th scope="col">setting</th>'] + [
        tag("th", {"scope": "col"}, escape(result.label)) for result in results
    ]
    rows = [
        tag(
            "tr",
            {},
            tag("th", {"scope": "row"}, escape(name)),
            *(tag("td", {}, escape(_value(result.settings.get(name)))) for result in results),
        )
        for name in names
    ]
    return scroll(table("settings", heads, rows))


def _value(value: object) -> str:
    return "–" if value is None else str(value)


def _reproduce(results: Sequence[Result]) -> str:
    commands = [
        command if isinstance(command, str) else shlex.join(map(str, command))
        for result in results
        if (command := result.settings.get("command"))
    ]
    note = "On one machine, the same command and seed give the same weights: compare the hashes."
    if not commands:
        note = "No command line was recorded. " + note.replace("command", "settings")
    heads = [f'<th scope="col">{name}</th>' for name in ("recipe", "seed", "weights, SHA-256")]
    rows = [
        tag(
            "tr",
            {},
            tag("th", {"scope": "row"}, escape(result.label)),
            tag("td", {}, str(result.seed)),
            tag("td", {}, tag("code", {}, escape(result.weights_sha256 or "–"))),
        )
        for result in results
    ]
    # Baselines of one `learn` call share its command: show it once.
    shown = [tag("pre", {}, tag("code", {}, command_line(c))) for c in dict.fromkeys(commands)]
    return section("How to reproduce", note, *shown, scroll(table("settings", heads, rows)))
