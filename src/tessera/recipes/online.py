"""Recipes for a stream without tasks: every batch is tested, then learned, once."""

from __future__ import annotations

from torch import Tensor

from tessera import data, loss, opt
from tessera import graph as tg
from tessera import ops as T
from tessera.data import Batch
from tessera.recipes.prequential import OnlineRun

__all__ = ["online", "steady"]

REPLAYED = 4  # old rows a new one
CALM, DRIFTED = 0.2, 0.5  # rho: the weight of the new rows


def online(run: OnlineRun) -> None:
    """Rehearse while the stream is calm; at a drift drop the old world, and learn much harder."""
    # Told of the error in every 32 rows: a rise by a third of it within some batches is a drift.
    detector = data.PageHinkley(mode="up", min_instances=10, delta=0.02, threshold=0.3, alpha=1.0)
    drift = run.keep("drift", opt.DriftSchedule(detector, half_life=800, every=32))
    replay = run.keep("replay", data.ReplayBuffer(run.buffer, "ring", seed=run.seed))
    optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr))

    @tg.training_step(optimizer=optimizer)
    def step(batch: Batch) -> Tensor:
        n = len(batch.y)
        x_old, y_old = replay.sample_like(batch.x, ratio=REPLAYED)
        logits = run.model(T.concat([batch.x, x_old]))
        new = T.cross_entropy(logits[:n], batch.y)
        if not len(y_old):
            return new
        rho = drift.between(CALM, DRIFTED)
        return loss.recency_weighted(new, T.cross_entropy(logits[n:], y_old), rho=rho)

    for batch in run.batches():
        wrong = run.test(batch)
        if drift.update(wrong, rows=len(batch.y)):
            replay.clear()
            run.mark_drift()
        drift.set_rate(optimizer, calm=run.lr, drifted=2 * run.lr)
        for _ in run.steps(round(drift.between(1, 4))):
            run.log(step(batch))
        replay.add(batch.x, batch.y)


def steady(run: OnlineRun) -> None:
    """The same with one step a batch, a constant rho and no detector: what drift costs."""
    replay = run.keep("replay", data.ReplayBuffer(run.buffer, "ring", seed=run.seed))
    optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr))

    @tg.training_step(optimizer=optimizer)
    def step(batch: Batch) -> Tensor:
        n = len(batch.y)
        x_old, y_old = replay.sample_like(batch.x, ratio=REPLAYED)
        logits = run.model(T.concat([batch.x, x_old]))
        new = T.cross_entropy(logits[:n], batch.y)
        if not len(y_old):
            return new
        return loss.recency_weighted(new, T.cross_entropy(logits[n:], y_old), rho=CALM)

    for batch in run.batches():
        run.test(batch)
        for _ in run.steps(1):
            run.log(step(batch))
        replay.add(batch.x, batch.y)
