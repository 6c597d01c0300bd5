"""The two ends of the scale: forgetting at will, and all data at once."""

from __future__ import annotations

from torch import Tensor

from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch
from tessera.recipes.run import Run

__all__ = ["finetune", "joint"]


def finetune(run: Run) -> None:
    """Learn one task after the other and do nothing against forgetting: the lower end."""
    for task in run.tasks():
        optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr))

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            return T.cross_entropy(run.mask(run.model(batch.x), batch.y), batch.y)

        for batch in run.batches(task):
            run.log(step(batch))


def joint(run: Run) -> None:
    """Learn all tasks' data at once, shuffled: the upper end, which a stream does not offer."""
    for everything in run.tasks(joint=True):
        optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr))

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            return T.cross_entropy(run.mask(run.model(batch.x), batch.y), batch.y)

        for batch in run.batches(everything):
            run.log(step(batch))
