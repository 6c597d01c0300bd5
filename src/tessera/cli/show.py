"""What `tessera learn` shows: progress while it works, tables when it is done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from tessera.recipes import Progress

__all__ = ["Watch", "show_results"]


class Watch:
    """A line that moves: task, step, loss, accuracy so far, time left.

    Where the output is no terminal, one line a task instead.

    Example:
        >>> watch = Watch(quiet=True)
        >>> with watch.showing("er"):
        ...     watch.update(
        ...         Progress(task=1, num_tasks=2, step=1, num_steps=9, loss=0.5, accuracy=0.9)
        ...     )
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console()
        self._bar: Bar | None = None
        self._id: TaskID | None = None
        self._name = ""
        self._printed = 0

    @contextmanager
    def showing(self, name: str) -> Iterator[None]:
        """Show the run of the recipe `name` while this is open."""
        self._name, self._printed = name, 0
        if self._quiet or not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.fields[recipe]:>10}"),
            BarColumn(),
            TextColumn("task {task.fields[at]}  step {task.completed:>5.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]:.3f}  accuracy so far {task.fields[accuracy]}"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=self._console) as self._bar:
            self._id = self._bar.add_task(
                "", total=1, recipe=name, at="1", loss=math.nan, accuracy="-"
            )
            yield
        self._bar = self._id = None

    def update(self, p: Progress) -> None:
        """Take one step's news."""
        if self._bar is not None and self._id is not None:
            self._bar.update(
                self._id,
                completed=p.step,
                total=p.num_steps,
                at=f"{p.task}/{p.num_tasks}",
                loss=p.loss,
                accuracy=_percent(p.accuracy),
            )
        elif not self._quiet and p.task != self._printed:
            self._printed = p.task
            print(f"{self._name}: task {p.task}/{p.num_tasks}, step {p.step}/{p.num_steps}")


def show_results(
    results: Sequence[Mapping[str, Any]],
    *,
    page: Path | None = None,
    checkpoint: str | None = None,
    json_file: str | None = None,
) -> None:
    """Print the first result's accuracy matrix, all results' metrics, and where things are.

    Args:
        results: As `recipes.learn` returns them; the first is the main one.
        page: The HTML report, if one was written.
        checkpoint: The folder of the checkpoint, if there is one.
        json_file: The result's file, if one was written.

    Example:
        >>> from tessera.recipes import Settings, learn
        >>> show_results([learn(Settings(recipe="finetune", epochs=1))])  # doctest: +ELLIPSIS
        <BLANKLINE>
        ...
    """
    console = Console()
    main = results[0]
    console.print()
    console.print(_matrix(main))
    console.print()
    console.print(_metrics(results))
    console.print()
    if page is not None:
        console.print(f"report       {page}", soft_wrap=True)
    if checkpoint is not None:
        console.print(f"checkpoint   {Path(checkpoint) / 'checkpoint.safetensors'}", soft_wrap=True)
    if json_file is not None:
        console.print(f"result       {json_file}", soft_wrap=True)
    console.print(f"next         {_next(main)}", soft_wrap=True)


def _matrix(result: Mapping[str, Any]) -> Table:
    title = (
        f"{result['recipe']} on {result['stream']}, {result['scenario']}-incremental: accuracy %"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for task in range(1, result["num_tasks"] + 1):
        table.add_column(f"on task {task}", justify="right")
    for after, row in enumerate(result["accuracy_matrix"]):
        if all(a is None for a in row):
            continue
        name = "untrained" if after == 0 else f"after task {after}"
        cells = [_percent(a) for a in row]
        shown = [
            f"[bold]{c}[/]" if 0 < t <= after else f"[dim]{c}[/]" for t, c in enumerate(cells, 1)
        ]
        table.add_row(name, *shown)
    return table


def _metrics(results: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe")
    for name in ("ACC %", "BWT", "FWT", "forgetting", "seconds"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            str(r["recipe"]),
            _percent(r["average_accuracy"]),
            _percent(r["backward_transfer"], "+"),
            _percent(r["forward_transfer"], "+"),
            _percent(r["forgetting"]),
            f"{r['seconds']:.1f}",
        )
    return table


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:{sign}.1f}"


def _next(main: Mapping[str, Any]) -> str:
    if main["stream"] == "digits":
        return (
            "tessera learn --stream fashion_mnist --recipe der --report report-fashion   "
            "(after: apt install dataset-fashion-mnist)"
        )
    other = "er" if main["recipe"] != "er" else "der"
    words = f"--stream {main['stream']} --scenario {main['scenario']} --recipe {other}"
    return f"tessera learn {words} --report report-{other}"
