"""Avalanche 0.6.0's own reservoir as a peer; importing this fails if Avalanche is not installed.

It is never a dependency of Tessera. In an environment of its own, from the repository root:

    python -m venv peers
    peers/bin/pip install torch==2.13.0
    peers/bin/pip install -e .
    peers/bin/pip install --no-deps torchvision==0.28.0 avalanche-lib==0.6.0
    peers/bin/pip install pillow psutil gputil matplotlib pytorchcv wandb tensorboard tqdm \
        torchmetrics gdown qpsolvers dill
    peers/bin/python benchmarks/replay.py

PyPI's torchvision is built for CUDA, so beside a CPU build of torch its operators do not load and
its import stops at two of them. Avalanche uses neither: declaring them lets the import pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["NAME", "reservoir"]

try:
    import torchvision  # noqa: F401 - does it import?
except RuntimeError:
    _ops = torch.library.Library("torchvision", "DEF")  # They live as long as this object.
    for _name in ("nms", "qnms"):
        _ops.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of optional solvers.
    import avalanche
    from avalanche.benchmarks.utils.classification_dataset import (
        _make_taskaware_classification_dataset,
    )
    from avalanche.benchmarks.utils.data import make_avalanche_dataset
    from avalanche.training.storage_policy import ReservoirSamplingBuffer

NAME = f"Avalanche {avalanche.__version__}"


def reservoir(
    capacity: int, rows: int, *, labelled: bool
) -> tuple[Callable[[Tensor, Tensor], None], Callable[[], object]]:
    """Add a batch; draw one of `rows` rows.

    A batch goes in as an Avalanche data set: `labelled` with targets and a task label, as those
    of its own benchmarks are, else the least its buffer takes, which also trains its strategies.
    One comes out through a loader as its replay plugin builds it, over the memory alone. The
    buffer is a new data set after each update, so the loader is new each time too.
    """
    buffer = ReservoirSamplingBuffer(capacity)

    def add(x: Tensor, y: Tensor) -> None:
        data = TensorDataset(x, y)
        if labelled:
            targets = y.tolist()
            new = _make_taskaware_classification_dataset(data, targets=targets, task_labels=0)
        else:
            new = make_avalanche_dataset(data)
        buffer.update_from_dataset(new)

    def sample() -> object:
        held = buffer.buffer
        return next(iter(DataLoader(held, rows, shuffle=True, collate_fn=held.collate_fn)))

    return add, sample
