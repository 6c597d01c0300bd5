"""Run a recipe on a benchmark, from the settings to the result."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from tessera import checkpoint, data, trees
from tessera.errors import CheckpointError, InputError, MetricError, UnknownNameError, unknown_name
from tessera.recipes import baselines, generative, lora, lora_ogd, penalties, replay
from tessera.recipes.loading import load_function
from tessera.recipes.run import Progress, Run, reseed
from tessera.recipes.settings import Settings

__all__ = ["RECIPES", "Recipe", "find_recipe", "learn", "saved_settings"]

Recipe: TypeAlias = Callable[[Run], None]
R = TypeVar("R")

RECIPES: Mapping[str, Recipe] = {
    "finetune": baselines.finetune,
    "joint": baselines.joint,
    "ewc": penalties.ewc,
    "online-ewc": penalties.online_ewc,
    "si": penalties.si,
    "lwf": penalties.lwf,
    "l2sp": penalties.l2sp,
    "er": replay.er,
    "der": replay.der,
    "er+ewc": replay.er_ewc,
    "generative": generative.generative,
    "lora": lora.lora,
    "lora+ogd": lora_ogd.lora_ogd,
}


def learn(
    settings: Settings,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    every: int | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Learn a stream of tasks with one recipe and measure it.

    The same settings give the same weights, bit for bit, whether or not the run was killed and
    resumed on the way.

    Args:
        settings: What to learn and how.
        folder: Where to keep ``checkpoint.safetensors``; None keeps nothing.
        resume: Go on from the checkpoint in `folder`, if there is one.
        every: Steps between checkpoints; None: every second, or less often where saving would
            take more than a tenth of the time.
        watch: Called after every step.

    Returns:
        JSON-ready: "recipe", "stream", "scenario", "seed", "num_tasks", "accuracy_matrix" (row 0
        is the untrained model), "average_accuracy", "backward_transfer", "forward_transfer",
        "forgetting" (None where undefined, as for "joint"), "curve", "seconds",
        "weights_sha256", "settings".

    Raises:
        UnknownNameError: No such recipe, scenario, stream or model function.
        MissingDataError: The stream's files are not on this machine.
        InputError: A setting or the data is out of range.
        CheckpointError: The checkpoint is damaged, too new, or of another run.
        StorageError: The checkpoint cannot be written.
        NonFiniteError: The loss diverged.

    Example:
        >>> result = learn(Settings(recipe="finetune", epochs=1))
        >>> result["recipe"], len(result["accuracy_matrix"])
        ('finetune', 6)
    """
    recipe = find_recipe(settings.recipe)
    bench = data.benchmark(
        settings.stream,
        settings.scenario,
        num_tasks=settings.num_tasks,
        path=settings.data,
        seed=settings.seed,
        validation=settings.validation,
    )
    settings = settings.resolved()
    place = Path(folder) if folder is not None else None
    before = resumable(place, settings.to_dict(), resume)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            model = build(settings.model, settings.seed, bench.input_shape, bench.num_classes)
            run = Run(model, bench, settings, folder=place, every=every, watch=watch)
            if before is not None:
                run.restore(before)
            if not run.finished:
                recipe(run)
    finally:
        torch.set_num_threads(threads)
    return _result(run)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or the function ``recipe`` in that file.

    Args:
        name: A key of `RECIPES`, or the path of a Python file, which is run.

    Raises:
        UnknownNameError: Neither exists, or the file has no function ``recipe``.

    Example:
        >>> find_recipe("er").__name__
        'er'
    """
    return named(name, RECIPES)


def named(name: str, known: Mapping[str, Callable[[R], None]]) -> Callable[[R], None]:
    """The function of that name, or the function ``recipe`` in that file.

    Raises:
        UnknownNameError: Neither exists, or the file has no function ``recipe``.
    """
    if name in known:
        return known[name]
    if not name.endswith(".py"):
        raise unknown_name("recipe", name, [*known, "FILE.py with def recipe(run)"])
    if not Path(name).is_file():
        raise UnknownNameError(f"there is no recipe file {name!r}")
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, "recipe", None)
    if not callable(found):
        raise UnknownNameError(
            f"{name} defines no function named recipe; write: def recipe(run): ..., "
            "starting from one in tessera.recipes"
        )
    recipe: Callable[[R], None] = found
    return recipe


def build(name: str, seed: int, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The model that PKG:FUNC makes, with weights that are a function of the seed.

    Raises:
        UnknownNameError: No such function.
        InputError: It makes no module, or one that does not fit.
    """
    try:
        build = load_function(name)
    except (InputError, UnknownNameError) as error:
        raise UnknownNameError(
            f"there is no model function {name!r} ({error}); name it PKG:FUNC, a "
            "function of (input_shape, num_classes), importable from here"
        ) from error
    reseed(seed, "init")
    model = build(shape, num_classes)
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} returned {type(model).__name__}, not an nn.Module")
    model.eval()
    with torch.no_grad():
        out = model(torch.zeros(2, *shape))
    if not isinstance(out, torch.Tensor) or out.shape != (2, num_classes):
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise InputError(
            f"{name} must map [n, {', '.join(map(str, shape))}] to [n, {num_classes}] "
            f"logits; for 2 rows it gave {got}"
        )
    return model.train()


def saved_settings(folder: str | os.PathLike[str]) -> Settings | None:
    """The settings of the run saved in `folder`; None if there is none.

    Example:
        >>> saved_settings("no/such/folder") is None
        True
    """
    state = saved(Path(folder))
    return Settings.from_dict((state.counters or {})["settings"]) if state is not None else None


def saved(folder: Path, kind: str = "settings") -> checkpoint.State | None:
    """The checkpoint in `folder`, of a run whose settings are its counter `kind`.

    Raises:
        CheckpointError: It is of another kind, or damaged.
    """
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return None
    state = checkpoint.load(path)
    counters = state.counters
    if not isinstance(counters, Mapping) or kind not in counters:
        what = "`tessera learn --online`" if kind == "online" else "`tessera learn`"
        raise CheckpointError(f"{path} is a Tessera checkpoint, but not of {what}")
    return state


def resumable(
    folder: Path | None, mine: Mapping[str, Any], resume: bool, *, kind: str = "settings"
) -> checkpoint.State | None:
    """The state to go on from, if there is one and these settings are its own.

    Raises:
        InputError: An unfinished run would be overwritten, or `resume` names no folder.
        CheckpointError: It is of other settings, or damaged.
    """
    if folder is None:
        if resume:
            raise InputError("resume needs the folder of the checkpoint: --checkpoint DIR")
        return None
    state = saved(folder, kind)
    if state is None:
        return None
    counters = state.counters or {}
    if not resume:
        if counters["finished"]:
            return None
        raise InputError(
            f"{folder} holds an unfinished run (step {state.step}). Go on with it by --resume, or "
            "choose another folder"
        )
    theirs = counters[kind]
    differ = [
        f"{k}: {theirs[k]!r} there, {mine[k]!r} here" for k in mine if theirs.get(k) != mine[k]
    ]
    if differ:
        raise CheckpointError(
            f"{folder} holds a run with other settings ({'; '.join(differ)}); leave them out to "
            "go on with it, or choose another folder"
        )
    return state


def _result(run: Run) -> dict[str, Any]:
    def defined(metric: Callable[[], float]) -> float | None:
        try:
            return metric()
        except MetricError:
            return None

    m = run.matrix
    rows = [[None if math.isnan(a) else a for a in row] for row in m.rows]
    return {
        "recipe": run.settings.recipe,
        "stream": run.settings.stream,
        "scenario": run.settings.scenario,
        "seed": run.settings.seed,
        "num_tasks": m.num_tasks,
        "accuracy_matrix": rows,
        "average_accuracy": m.average_accuracy(),
        "backward_transfer": defined(m.backward_transfer),
        "forward_transfer": defined(m.forward_transfer),
        "forgetting": defined(m.forgetting),
        "curve": run.curve,
        "seconds": run.elapsed(),
        "weights_sha256": trees.sha256(_weights(run)),
        "settings": run.settings.to_dict(),
    }


def _weights(run: Run) -> dict[str, Tensor]:
    """All that was learned: the model's, and those of every delta over it."""
    found = dict(run.model.state_dict())
    for task, delta in run.deltas.items():
        found |= {f"{task}:{name}": tensor for name, tensor in delta.tensors.items()}
    return found
