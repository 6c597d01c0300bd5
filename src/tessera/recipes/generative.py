"""A recipe that rehearses what a network learned to draw, and keeps no row."""

from __future__ import annotations

from torch import Tensor

from tessera import graph as tg
from tessera import loss
from tessera import ops as T
from tessera.data import Batch
from tessera.data.generative import GenerativeReplay
from tessera.recipes.run import Run

__all__ = ["generative"]


def generative(run: Run) -> None:
    """Generative replay: every step learns the new rows and as many drawings of old classes."""
    replay = run.keep("replay", GenerativeReplay(run.bench.num_classes, seed=run.seed))
    for task in run.tasks():
        optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr))

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            new = T.cross_entropy(run.mask(run.model(batch.x), batch.y), batch.y)
            if not replay.classes:
                return new
            x, y = replay.sample_like(batch.x)
            old = T.cross_entropy(run.mask(run.model(x), y), y)
            return loss.recency_weighted(new, old, rho=1 / task.id)

        for batch in run.batches(task):
            run.log(step(batch))
            replay.add(batch.x, batch.y)
        replay.consolidate()
