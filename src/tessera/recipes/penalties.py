"""Recipes that remember by holding weights, or answers, near where they were."""

from __future__ import annotations

from torch import Tensor

from tessera import arch, loss, opt
from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch
from tessera.recipes.run import Run

__all__ = ["ewc", "l2sp", "lwf", "online_ewc", "si"]


def ewc(run: Run) -> None:
    """EWC: one anchor with the exact Fisher after each task, all of them held."""
    for task in run.tasks():
        hold = opt.consolidate(run.anchors, lam=run.lam)
        optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr, plugin=hold))

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            return T.cross_entropy(run.mask(run.model(batch.x), batch.y), batch.y)

        for batch in run.batches(task):
            run.log(step(batch))
        run.anchors.append(
            arch.anchor_from(
                run.model, f"task{task.id}", data=run.examples(task), logits=run.head(task)
            )
        )


def online_ewc(run: Run) -> None:
    """Online EWC: one anchor in all, at the newest weights, with the Fishers summed."""
    for task in run.tasks():
        hold = opt.consolidate(run.anchors, lam=run.lam)
        optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr, plugin=hold))

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            return T.cross_entropy(run.mask(run.model(batch.x), batch.y), batch.y)

        for batch in run.batches(task):
            run.log(step(batch))
        new = arch.anchor_from(
            run.model, f"task{task.id}", data=run.examples(task), logits=run.head(task)
        )
        for old in run.anchors:
            fisher = {name: f + old.fisher[name] for name, f in new.fisher.items()}
            new = arch.Anchor(new.name, new.params, {**new.stats, "fisher": fisher})
            new.bind(run.model)
        run.anchors[:] = [new]


def si(run: Run) -> None:
    """SI: importance gathered along the way, so no data is needed at a task's end."""
    importance = run.keep("importance", opt.path_integral())
    for task in run.tasks():
        optimizer = run.keep(
            "optimizer", tg.Adam(run.model.parameters(), lr=run.lr, plugin=importance)
        )

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            new = T.cross_entropy(run.mask(run.model(batch.x), batch.y), batch.y)
            return sum((loss.si(run.model, a, c=run.lam) for a in run.anchors), new)

        for batch in run.batches(task):
            run.log(step(batch))
        run.anchors[:] = [arch.anchor_from(run.model, f"task{task.id}", fisher=None)]


def l2sp(run: Run) -> None:
    """L2-SP: every weight held alike near where the last task left it."""
    for task in run.tasks():
        optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr))

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            new = T.cross_entropy(run.mask(run.model(batch.x), batch.y), batch.y)
            return sum((loss.l2sp(run.model, a, lam=run.lam) for a in run.anchors), new)

        for batch in run.batches(task):
            run.log(step(batch))
        run.anchors[:] = [arch.anchor_from(run.model, f"task{task.id}", fisher=None)]


def lwf(run: Run) -> None:
    """LwF: on the new inputs, keep giving the old tasks' classes the answers of before."""
    for task in run.tasks():
        optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr))
        old = run.seen_classes(task)

        @tg.training_step(optimizer=optimizer)
        def step(batch: Batch) -> Tensor:
            logits = run.model(batch.x)
            total = T.cross_entropy(run.mask(logits, batch.y), batch.y)
            for a in run.anchors:
                with tg.no_grad():
                    before = a.model(batch.x)
                total = total + loss.lwf(logits[:, old], before[:, old], lam=run.lam)
            return total

        for batch in run.batches(task):
            run.log(step(batch))
        run.anchors[:] = [arch.anchor_from(run.model, f"task{task.id}", fisher=None)]
