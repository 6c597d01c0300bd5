"""Run an online recipe on a stream, from the settings to the result."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import torch

from tessera import data, trees
from tessera.data import Batch
from tessera.data.readers import read_stream
from tessera.errors import CheckpointError, InputError
from tessera.recipes import online
from tessera.recipes.learn import build, named, resumable, saved
from tessera.recipes.prequential import OnlineProgress, OnlineRun, OnlineSettings

__all__ = [
    "ONLINE_RECIPES",
    "OnlineRecipe",
    "find_online_recipe",
    "learn_online",
    "saved_online_settings",
]

OnlineRecipe: TypeAlias = Callable[[OnlineRun], None]

ONLINE_RECIPES: Mapping[str, OnlineRecipe] = {"online": online.online, "steady": online.steady}

_GENERATORS = {"sea": data.sea, "stagger": data.stagger}


def learn_online(
    settings: OnlineSettings,
    *,
    rows: Batch | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    every: int | None = None,
    watch: Callable[[OnlineProgress], None] | None = None,
) -> dict[str, Any]:
    """Test a model on a stream and teach it the same, batch by batch, once.

    The same settings give the same weights, bit for bit, whether or not the run was killed and
    resumed on the way, unless a budget makes them depend on the clock.

    Args:
        settings: What to learn and how.
        rows: The stream itself, in its order, in place of the one that `settings.stream` names.
        folder: Where to keep ``checkpoint.safetensors``; None keeps nothing.
        resume: Go on from the checkpoint in `folder`, if there is one.
        every: Steps between checkpoints; None: every second, or less often where saving would
            take more than a tenth of the time.
        watch: Called after every batch of the stream.

    Returns:
        JSON-ready: "kind" ("prequential"), "recipe", "stream", "seed", "rows", "num_classes",
        "accuracy", "no_change", "majority", "kappa_temporal", "curve" (of [rows, accuracy,
        no-change, majority], each over the rows since the point before), "drifts", "steps",
        "seconds", "cpu_seconds", "weights_sha256", "settings".

    Raises:
        UnknownNameError: No such recipe, stream or model function.
        MissingDataError: The stream's files are not on this machine.
        InputError: A setting or the data is out of range.
        CheckpointError: The checkpoint is damaged, too new, or of another run.
        StorageError: The checkpoint cannot be written.
        NonFiniteError: The loss diverged.

    Example:
        >>> result = learn_online(OnlineSettings(stream="stagger", rows=2000))
        >>> result["rows"], result["accuracy"] > result["no_change"]
        (2000, True)
    """
    recipe = find_online_recipe(settings.recipe)
    place = Path(folder) if folder is not None else None
    before = resumable(place, settings.to_dict(), resume, kind="online")
    stream, shape, num_classes = _opened(settings, rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            model = build(settings.model, settings.seed, shape, num_classes)
            run = OnlineRun(
                model, stream, num_classes, settings, folder=place, every=every, watch=watch
            )
            if before is not None:
                run.restore(before)
            if not run.finished:
                recipe(run)
    finally:
        torch.set_num_threads(threads)
    return _result(run, num_classes)


def saved_online_settings(folder: str | os.PathLike[str]) -> OnlineSettings | None:
    """The settings of the online run saved in `folder`; None if there is none.

    Raises:
        CheckpointError: It is of another kind of run, or damaged.

    Example:
        >>> saved_online_settings("no/such/folder") is None
        True
    """
    state = saved(Path(folder), "online")
    if state is None:
        return None
    values = dict((state.counters or {})["online"])
    if strangers := set(values) - {f.name for f in fields(OnlineSettings)}:
        raise CheckpointError(
            f"the run in {folder} has settings this Tessera does not know: {sorted(strangers)}; "
            "go on with the version that saved it"
        )
    return OnlineSettings(**values)


def find_online_recipe(name: str) -> OnlineRecipe:
    """The online recipe of that name, or the function ``recipe`` in that file.

    Raises:
        UnknownNameError: Neither exists, or the file has no function ``recipe``.

    Example:
        >>> find_online_recipe("online").__name__
        'online'
    """
    return named(name, ONLINE_RECIPES)


def _opened(
    settings: OnlineSettings, rows: Batch | None
) -> tuple[data.Stream, tuple[int, ...], int]:
    """The stream, the shape of one example, and the number of classes."""
    rows = rows if rows is not None else _named(settings)
    shards: Any = settings.stream if rows is None else [rows]
    stream = data.Stream(
        shards, settings.window, batch_size=settings.batch_size, seed=settings.seed
    )
    if rows is not None:
        if not len(rows.y):
            raise InputError(f"the stream {settings.stream!r} has no rows")
        count = settings.num_classes or max(2, int(rows.y.max()) + 1)
        return stream, tuple(rows.x.shape[1:]), count
    if settings.num_classes is None:
        raise InputError(
            f"how many classes has {settings.stream!r}? Say num_classes=C, on the command line "
            "--classes C; labels are 0 .. C-1"
        )
    first = next(data.Stream(shards, 1, batch_size=1), None)
    if first is None:
        raise InputError(f"the stream {settings.stream!r} has no rows")
    return stream, tuple(first.x.shape[1:]), settings.num_classes


def _named(settings: OnlineSettings) -> Batch | None:
    name = settings.stream
    quarters = [settings.rows * k // 4 for k in (1, 2, 3)]
    if name in _GENERATORS:
        return _GENERATORS[name](settings.rows, drifts=quarters, seed=settings.seed)
    if name == "hyperplane":
        return data.hyperplane(settings.rows, seed=settings.seed)
    if name in ("digits", "fashion_mnist"):
        return read_stream(name, None)[0]
    return None


def _result(run: OnlineRun, num_classes: int) -> dict[str, Any]:
    seconds, cpu_seconds = run.elapsed()
    score = run.score
    return {
        "kind": "prequential",
        "recipe": run.settings.recipe,
        "stream": run.settings.stream,
        "seed": run.settings.seed,
        "rows": score.rows,
        "num_classes": num_classes,
        "accuracy": score.accuracy(),
        "no_change": score.no_change(),
        "majority": score.majority(),
        "kappa_temporal": score.kappa_temporal(),
        "curve": score.curve,
        "drifts": list(run.drifts),
        "steps": run.step,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "weights_sha256": trees.sha256(run.model.state_dict()),
        "settings": run.settings.to_dict(),
    }
