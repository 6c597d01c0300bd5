"""The model that a run has trained, without the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tessera import data
from tessera.errors import MissingDataError
from tessera.recipes.learn import build, saved
from tessera.recipes.settings import Settings

__all__ = ["trained_model"]


def trained_model(folder: str | os.PathLike[str]) -> nn.Module:
    """The model of the run that ``learn(folder=...)`` saved, as far as it has come, in eval mode.

    Args:
        folder: The run's checkpoint folder.

    Raises:
        MissingDataError: There is no checkpoint.
        CheckpointError: It is damaged, or of another kind of run.
        UnknownNameError: The function that builds the model cannot be imported.

    Example:
        >>> import tempfile
        >>> from tessera.recipes import learn
        >>> folder = tempfile.mkdtemp()
        >>> result = learn(Settings(recipe="finetune", epochs=1, num_tasks=2), folder=folder)
        >>> type(trained_model(folder)).__name__
        'Sequential'
    """
    state = saved(Path(folder))
    if state is None:
        raise MissingDataError(
            f"there is no checkpoint in {os.fspath(folder)}; tessera learn --checkpoint DIR writes "
            "one"
        )
    settings = Settings.from_dict((state.counters or {})["settings"])
    bench = data.benchmark(
        settings.stream,
        settings.scenario,
        num_tasks=settings.num_tasks,
        path=settings.data,
        seed=settings.seed,
    )
    with torch.random.fork_rng(devices=[]):
        model = build(settings.model, settings.seed, bench.input_shape, bench.num_classes)
    weights: Any = state.weights
    model.load_state_dict(weights)
    return model.eval()
