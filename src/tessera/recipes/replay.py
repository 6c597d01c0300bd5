"""Recipes that remember by rehearsing."""

from __future__ import annotations

from torch import Tensor

from tessera import arch, data, loss, opt
from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch
from tessera.recipes.run import Run

__all__ = ["der", "er", "er_ewc"]


def er(run: Run) -> None:
    """Experience replay: every step learns the new rows and as many rehearsed ones."""
    replay = run.keep("replay", data.ReplayBuffer(run.buffer, seed=run.seed))
    for task in run.tasks():
        optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr))

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            x_old, y_old = replay.sample_like(batch.x)
            x, y = T.concat([batch.x, x_old]), T.concat([batch.y, y_old])
            return T.cross_entropy(run.mask(run.model(x), y), y)

        for batch in run.batches(task):
            run.log(step(batch))
            if run.epoch == 1:
                replay.add(batch.x, batch.y)


def er_ewc(run: Run) -> None:
    """Experience replay, with EWC to hold the weights that rehearsal leaves free."""
    replay = run.keep("replay", data.ReplayBuffer(run.buffer, seed=run.seed))
    for task in run.tasks():
        hold = opt.consolidate(run.anchors, lam=run.lam)
        optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr, plugin=hold))

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            x_old, y_old = replay.sample_like(batch.x)
            x, y = T.concat([batch.x, x_old]), T.concat([batch.y, y_old])
            return T.cross_entropy(run.mask(run.model(x), y), y)

        for batch in run.batches(task):
            run.log(step(batch))
            if run.epoch == 1:
                replay.add(batch.x, batch.y)
        run.anchors.append(
            arch.anchor_from(
                run.model, f"task{task.id}", data=run.examples(task), logits=run.head(task)
            )
        )


def der(run: Run) -> None:
    """DER++: rehearse the labels, and the logits the model gave on the day."""
    replay = run.keep(
        "replay", data.ReplayBuffer(run.buffer, seed=run.seed, fields=("x", "y", "logits"))
    )
    for task in run.tasks():
        optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr))
        answered: list[Tensor] = []

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            logits = run.model(batch.x)
            answered[:] = [logits.detach()]
            total = T.cross_entropy(run.mask(logits, batch.y), batch.y)
            if len(replay):
                x, _, stored = replay.sample(len(batch.x))
                total = total + loss.der(run.model(x), stored, alpha=run.lam)
                x, y, _ = replay.sample(len(batch.x))
                total = total + T.cross_entropy(run.mask(run.model(x), y), y)
            return total

        for batch in run.batches(task):
            run.log(step(batch))
            if run.epoch == 1:
                replay.add(batch.x, batch.y, answered[0])
