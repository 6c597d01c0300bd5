"""Learn what a server journals, online: drift is noticed, a killed learner goes on exactly.

    python examples/continual/online_journal.py

A "server" appends what it was asked and what turned out to be right to a journal. A learner reads
it as a stream, predicts every row before it learns it, rehearses, and learns faster after a drift.
It saves itself, goes on and is lost, as by a crash; a new one goes on from the checkpoint and ends
with the weights of a learner that was never interrupted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera import checkpoint, data, loss, metrics, opt, recipes, trees
from tessera import graph as tg
from tessera import ops as T

ROWS, DRIFT = 6000, 3000


def serve(folder: Path) -> None:
    """What a server would do, request by request: journal the input and the outcome."""
    with data.Journal(folder) as journal:
        for start in range(0, ROWS, 50):
            happened = data.sea(50, start=start, drifts=[DRIFT], seed=7)
            journal.append(happened.x, happened.y, tags={"tenant": "a"})


class Learner:
    """Everything that learns, and how to save and restore it."""

    def __init__(self, journal: Path) -> None:
        torch.manual_seed(0)
        self.model = recipes.small_mlp((3,), 2)
        self.optimizer = tg.Adam(self.model.parameters(), lr=0.01)
        self.stream = data.Stream.from_journal(journal, 1, batch_size=16)
        self.replay = data.ReplayBuffer(2000, "ring")
        detector = data.PageHinkley(mode="up", min_instances=10, delta=0.02, threshold=0.3)
        self.drift = opt.DriftSchedule(detector, half_life=800, every=32)
        self.score = metrics.Prequential(num_classes=2)

    def learn(self, rows: int) -> None:
        """Go on until so many rows are learned."""

        @tg.training_step(optimizer=self.optimizer)
        def step(batch: data.Batch) -> Tensor:
            x_old, y_old = self.replay.sample_like(batch.x, ratio=4)
            new = T.cross_entropy(self.model(batch.x), batch.y)
            if not len(y_old):
                return new
            old = T.cross_entropy(self.model(x_old), y_old)
            return loss.recency_weighted(new, old, rho=self.drift.between(0.2, 0.5))

        while self.stream.position < rows:
            batch = next(self.stream)
            self.model.eval()
            with tg.no_grad():
                wrong = self.score.update(self.model(batch.x).argmax(-1), batch.y)
            self.model.train()
            if self.drift.update(wrong, rows=len(batch.y)):
                print(f"  drift noticed after row {self.stream.position}")
                self.replay.clear()
            for _ in range(round(self.drift.between(1, 4))):
                step(batch)
            self.replay.add(batch.x, batch.y)

    def save(self, path: Path) -> None:
        kept: dict[str, Any] = {"drift": self.drift, "score": self.score}
        state = checkpoint.State(
            weights=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            replay=self.replay.state_dict(),
            stream=self.stream.state_dict(),
            counters={name: thing.state_dict() for name, thing in kept.items()},
        )
        checkpoint.save(path, state)

    def restore(self, path: Path) -> None:
        state = checkpoint.load(path)
        self.model.load_state_dict(state.weights)
        self.optimizer.load_state_dict(state.optimizer)
        self.replay.load_state_dict(state.replay)
        self.stream.load_state_dict(state.stream)
        self.drift.load_state_dict(state.counters["drift"])
        self.score.load_state_dict(state.counters["score"])


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    serve(folder / "journal")

    print("a learner that is never interrupted")
    whole = Learner(folder / "journal")
    whole.learn(ROWS)

    print("one that is lost after row 3,600, and one that goes on from row 3,040")
    lost = Learner(folder / "journal")
    lost.learn(3040)
    lost.save(folder / "checkpoint.safetensors")
    lost.learn(3600)
    second = Learner(folder / "journal")
    second.restore(folder / "checkpoint.safetensors")
    second.learn(ROWS)

    score = whole.score
    print(
        f"prequential accuracy {score.accuracy():.1%}, no-change {score.no_change():.1%}, ", end=""
    )
    print(f"majority {score.majority():.1%}")
    same = trees.sha256(whole.model.state_dict()) == trees.sha256(second.model.state_dict())
    print(f"the same weights, bit for bit: {same}")


if __name__ == "__main__":
    main()
