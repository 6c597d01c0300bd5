"""`tessera learn --online`: test every batch of a stream, then learn it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import tessera.report
from tessera import recipes
from tessera.cli.learning import interrupted, told, words, write_json
from tessera.errors import InputError

__all__ = ["add_options", "refuse_options", "run"]

_OWN = ("rows", "num_classes", "window", "budget_ms", "budget_joules")
_OPTIONS = {"num_classes": "classes", "num_tasks": "tasks"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `tessera learn` takes only with --online."""
    d = recipes.OnlineSettings()
    group = parser.add_argument_group(
        "a stream without tasks",
        "Test, then learn: prequential accuracy beside no-change and majority. Streams: sea,\n"
        "stagger, hyperplane, digits, fashion_mnist, or files as data.Stream reads them.\n"
        f"Defaults here: --recipe {d.recipe} ({'|'.join(recipes.ONLINE_RECIPES)}), "
        f"--stream {d.stream}, --model {d.model},\n"
        f"--batch-size {d.batch_size}, --lr {d.lr}, --buffer {d.buffer}.",
    )
    group.add_argument("--online", action="store_true", help="learn the stream once, in its order")
    group.add_argument("--rows", type=int, help=f"of sea, stagger, hyperplane; default: {d.rows}")
    group.add_argument("--classes", dest="num_classes", type=int, help="needed for files")
    group.add_argument(
        "--window", type=int, help="rows to shuffle within; default: 1, stream order"
    )
    group.add_argument("--budget-ms", type=float, help="most milliseconds to learn a batch in")
    group.add_argument("--budget-joules", type=float, help="most joules to learn a batch with")


def refuse_options(args: argparse.Namespace) -> None:
    """Say which options only --online knows.

    Raises:
        InputError: One was given without it.
    """
    _refuse(args, _OWN, "is for streams without tasks; add --online")


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    given = [n for n in names if getattr(args, n, None) is not None]
    if given:
        option = _OPTIONS.get(given[0], given[0]).replace("_", "-")
        raise InputError(f"--{option} {why}")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    strangers = {f.name for f in fields(recipes.Settings)} - {
        f.name for f in fields(recipes.OnlineSettings)
    }
    _refuse(args, sorted(strangers), "is for a sequence of tasks; leave it out, or --online")
    settings = told(args, recipes.OnlineSettings(), recipes.saved_online_settings)
    compare = ["steady"] if args.compare is None else args.compare
    for name in compare:
        recipes.find_online_recipe(name)
    watch = _Watch(quiet=args.quiet)
    try:
        with watch.showing(settings.recipe):
            main = recipes.learn_online(
                settings,
                folder=args.checkpoint,
                resume=args.resume,
                every=args.checkpoint_every,
                watch=watch.update,
            )
    except KeyboardInterrupt:
        return interrupted(args)
    said = words(settings, recipes.OnlineSettings(), ("recipe", "stream", "seed"))
    main["settings"]["command"] = "tessera " + shlex.join(["learn", "--online", *said])
    results = [main]
    for name in compare:
        if name != settings.recipe:
            with watch.showing(name):
                other = replace(settings, recipe=name)
                results.append(recipes.learn_online(other, watch=watch.update))
    if args.json:
        write_json(args.json, {**main, "baselines": results[1:]})
    page = tessera.report.write_online(results, args.report) if args.report else None
    if not args.quiet:
        _show(results, page, args)
    return 0


class _Watch:
    """A line that moves: rows, accuracy so far, drifts. Not a terminal: one line a 5,000 rows."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._console = quiet, Console()
        self._bar: Bar | None = None
        self._id: TaskID | None = None
        self._name, self._next = "", 0

    @contextmanager
    def showing(self, name: str) -> Iterator[None]:
        """Show the run of the recipe `name` while this is open."""
        self._name, self._next = name, 5000
        if self._quiet or not self._console.is_terminal:
            yield
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.fields[recipe]:>8}  row {task.completed:>9,.0f}"),
            TextColumn("accuracy so far {task.fields[accuracy]:.1%}"),
            TextColumn("(no-change {task.fields[floor]:.1%})  drifts {task.fields[drifts]}"),
            TimeElapsedColumn(),
        )
        with Bar(*columns, console=self._console) as self._bar:
            self._id = self._bar.add_task("", total=None, recipe=name, accuracy=0.0, floor=0.0,
                                          drifts=0)  # fmt: skip
            yield
        self._bar = self._id = None

    def update(self, p: recipes.OnlineProgress) -> None:
        """Take one batch's news."""
        if self._bar is not None and self._id is not None:
            self._bar.update(
                self._id,
                completed=p.rows,
                accuracy=p.accuracy,
                floor=p.no_change,
                drifts=p.drifts,
            )
        elif not self._quiet and p.rows >= self._next:
            self._next += 5000
            print(f"{self._name}: row {p.rows}, accuracy so far {p.accuracy:.1%}")


def _show(
    results: Sequence[Mapping[str, Any]], page: Path | None, args: argparse.Namespace
) -> None:
    console = Console()
    main = results[0]
    title = f"{main['stream']}, {main['rows']:,} rows: every row tested, then learned"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in ("accuracy %", "kappa-temporal", "drifts", "steps", "CPU s"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            str(r["recipe"]),
            f"{100 * r['accuracy']:.1f}",
            f"{r['kappa_temporal']:.2f}",
            str(len(r["drifts"])),
            f"{r['steps']:,}",
            f"{r['cpu_seconds']:.2f}",
        )
    for name in ("no_change", "majority"):
        table.add_row(name.replace("_", "-"), f"{100 * main[name]:.1f}", "", "", "", "")
    console.print()
    console.print(table)
    console.print()
    if main["drifts"]:
        shown = ", ".join(f"{row:,}" for row in main["drifts"][:8])
        more = f" and {len(main['drifts']) - 8} more" if len(main["drifts"]) > 8 else ""
        console.print(f"drifts       after row {shown}{more}", soft_wrap=True)
    if page is not None:
        console.print(f"report       {page}", soft_wrap=True)
    if args.checkpoint is not None:
        file = Path(args.checkpoint) / "checkpoint.safetensors"
        console.print(f"checkpoint   {file}", soft_wrap=True)
    if args.json is not None:
        console.print(f"result       {args.json}", soft_wrap=True)
    if page is None:
        console.print(f"next         {main['settings']['command']} --report report-online",
                      soft_wrap=True)  # fmt: skip
