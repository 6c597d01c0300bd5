"""What a recipe is given: the tasks in order, and the bookkeeping around its own loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tessera import arch, checkpoint, random
from tessera.data import Batch, Benchmark, Task
from tessera.errors import InputError
from tessera.metrics import AccuracyMatrix
from tessera.recipes.saving import S, Saver
from tessera.recipes.settings import Settings

__all__ = ["Progress", "Run"]

_CURVE_ROWS = 500  # test rows a task for a point of the curve; the matrix uses all of them
_CURVE_POINTS = 10  # a task


V = TypeVar("V")


def _known(name: str, value: V | None) -> V:
    if value is None:
        raise InputError(f"a Run needs {name}: give it settings.resolved()")
    return value


def reseed(seed: int, *path: str | int) -> None:
    """Set PyTorch's process-wide generators to the key of `path`, as dropout will draw from them.

    As `torch.manual_seed` does, which takes 0.8 ms where CUDA is not in use: it notes down who
    called, in case it will be.
    """
    key = random.key(seed, *path) >> 1
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types for it
        torch.cuda.manual_seed_all(key)


def _plain(delta: arch.Delta) -> dict[str, Any]:
    """What a delta holds, as a checkpoint holds it."""
    names = ("kind", "tensors", "scales", "base_hash", "info")
    return {name: getattr(delta, name) for name in names}


def _delta(values: Mapping[str, Any]) -> arch.Delta:
    """The delta again, trainable."""
    return arch.Delta(**values).trainable()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Progress:
    """Where a run stands, for whoever shows it.

    Attributes:
        task: Being learned, from 1.
        num_tasks: In all.
        step: Done in the whole run.
        num_steps: In the whole run.
        loss: Of the newest step that was logged, NaN before the first.
        accuracy: Mean over the tasks seen so far at the last look, NaN before the first.

    Example:
        >>> Progress(task=1, num_tasks=5, step=3, num_steps=90, loss=0.7, accuracy=0.5).step
        3
    """

    task: int
    num_tasks: int
    step: int
    num_steps: int
    loss: float
    accuracy: float


class Run:
    """One continual-learning run, as a recipe sees it.

    A recipe loops over `tasks` and, within, over `batches`, and does its own learning in between::

        def recipe(run):
            for task in run.tasks():
                optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr))

                @tg.training_step(optimizer=optimizer)
                def step(batch):
                    return T.cross_entropy(run.mask(run.model(batch.x), batch.y), batch.y)

                for batch in run.batches(task):
                    run.log(step(batch))

    Between two batches the run may save itself, and after each task it measures every task. What
    must survive an interruption is either the model, in `anchors`, in `deltas`, or given to `keep`.

    Attributes:
        model: The module in training.
        bench: The tasks and what is known of them.
        settings: Resolved: nothing in it is None but `data`.
        seed: Of everything random.
        lr: The learning rate.
        lam: The strength of the recipe's penalty.
        buffer: Rows the replay may hold.
        anchors: Yours to append to; saved with the run.
        deltas: Yours to add to, by name; saved with the run as they are then.
        answer: How the run answers when it is measured: (x, which task, or None where that is not
            told) -> logits. The model does unless a recipe sets it.
        matrix: Accuracy on every task after every task.
        epoch: The pass over the current task, from 1.
        step: Steps done in the whole run.

    Example:
        >>> from tessera import data, recipes
        >>> settings = Settings(recipe="finetune", epochs=1).resolved()
        >>> bench = data.benchmark("digits", "class")
        >>> run = Run(recipes.mlp(bench.input_shape, 10), bench, settings)
        >>> batch = next(run.batches(next(run.tasks())))
        >>> batch.x.shape
        torch.Size([32, 1, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        bench: Benchmark,
        settings: Settings,
        *,
        folder: Path | None = None,
        every: int | None = None,
        watch: Callable[[Progress], None] | None = None,
    ) -> None:
        self.model = model
        self.bench = bench
        self.settings = settings
        self.seed = settings.seed
        self.lr = settings.lr
        self.lam = _known("lam", settings.lam)
        self.buffer = _known("buffer", settings.buffer)
        self._epochs = _known("epochs", settings.epochs)
        self._batch_size = _known("batch_size", settings.batch_size)
        self.anchors: list[arch.Anchor] = []
        self.deltas: dict[str, arch.Delta] = {}
        self.answer: Callable[[Tensor, int | None], Tensor] = lambda x, _: self.model(x)
        self.matrix = AccuracyMatrix(len(bench))
        self.curve: list[dict[str, Any]] = []
        self.epoch = 1
        self.step = 0
        self.seconds = 0.0
        self.finished = False
        self._saver, self._watch = Saver(folder, every), watch
        self._task = 0  # tasks completed
        self._batch = 0  # batches done in the current epoch
        self._inside = False  # between the yield of a task and the next
        self._in_task: set[str] = set()
        self._loss: Tensor | None = None
        self._clock = time.perf_counter()
        self._num_steps = 0

    def mask(self, logits: Tensor, y: Tensor) -> Tensor:
        """-inf at the classes that do not compete with each row's label.

        In the task scenario these are the other tasks' classes; elsewhere nothing changes.
        """
        if self.bench.mask is None:
            return logits
        return logits.masked_fill(~self.bench.mask.to(y.device)[y], float("-inf"))

    def head(self, task: Task) -> Callable[[Tensor], Tensor]:
        """The logits of one task, for ``arch.anchor_from(..., logits=run.head(task))``."""
        if self.bench.mask is None:
            return lambda z: z
        off = ~self.bench.mask[task.classes[0]]
        return lambda z: z.masked_fill(off.to(z.device), float("-inf"))

    def seen_classes(self, task: Task) -> list[int]:
        """The output classes of the tasks before this one."""
        before = [t.classes for t in self.bench.tasks if t.id < task.id]
        return sorted({c for classes in before for c in classes})

    def keep(self, name: str, thing: S) -> S:
        """Save `thing` with the run, and restore it now if the run is being resumed.

        What is kept inside the loop over `tasks` belongs to its task; what is kept before it
        belongs to the run.
        """
        if self._inside:
            self._in_task.add(name)
        return self._saver.keep(name, thing)

    def tasks(self, *, joint: bool = False) -> Iterator[Task]:
        """The tasks that are left, in order; each is measured when its turn is over.

        Args:
            joint: One task in place of all: the union of their data.
        """
        todo = (self.bench.joint(),) if joint else self.bench.tasks
        self._num_steps = sum(self._steps(t) for t in todo)
        if self._task == 0 and self.step == 0:
            self._measure(0)
        for task in todo:
            if task.id <= self._task:
                continue
            self._inside = True
            yield task
            self._inside = False
            self._saver.pending.clear()
            for name in self._in_task:
                self._saver.drop(name)
            self._in_task.clear()
            self._task, self.epoch, self._batch = task.id, 1, 0
            self._measure(task.id)
            self.finished = task is todo[-1]
            self._save()
        self.finished = True

    def batches(self, task: Task) -> Iterator[Batch]:
        """The batches of the task that are left, over all epochs, freshly shuffled in each.

        The order is a function of (seed, task, epoch). PyTorch's global generator is set from
        (seed, step) before each batch, so that dropout resumes exactly as well.
        """
        size = self._batch_size
        rows = len(task.train.x)
        look = max(1, self._steps(task) // _CURVE_POINTS)
        while self.epoch <= self._epochs:
            order = random.permutation(rows, self.seed, "order", task.id, self.epoch)
            while self._batch * size < rows:
                index = order[self._batch * size : (self._batch + 1) * size]
                reseed(self.seed, "step", self.step)
                yield Batch(task.train.x[index], task.train.y[index])
                self._batch += 1
                self.step += 1
                if self.step % look == 0:
                    self._look(task)
                self._show(task)
                if self._saver.due(self.step):
                    self._save()
            self.epoch, self._batch = self.epoch + 1, 0

    def examples(self, task: Task, rows: int = 2000) -> list[Batch]:
        """A fixed random subset of the task's training data, for a Fisher."""
        index = random.permutation(len(task.train.x), self.seed, "fisher", task.id)[:rows]
        return [Batch(task.train.x[index], task.train.y[index])]

    def log(self, loss: Tensor) -> None:
        """Show this loss from now on."""
        self._loss = loss

    def accuracy(self, task: Task, *, rows: int | None = None) -> float:
        """Fraction of the task's test rows that are answered right, the model in eval mode.

        Which task they are of is told in the scenario "task" alone.
        """
        x, y = task.test.x[:rows], task.test.y[:rows]
        head, told = self.head(task), None if self.bench.mask is None else task.id
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            right = [
                (head(self.answer(a, told)).argmax(-1) == b).sum()
                for a, b in zip(torch.split(x, 1000), torch.split(y, 1000), strict=True)
            ]
        self.model.train(training)
        return int(torch.stack(right).sum()) / max(1, len(y))

    def elapsed(self) -> float:
        """Seconds of this run so far, interruptions left out."""
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        return self.seconds

    def _steps(self, task: Task) -> int:
        return -(-len(task.train.x) // self._batch_size) * self._epochs

    def _measure(self, after: int) -> None:
        for t in self.bench.tasks:
            self.matrix.record(after, t.id, self.accuracy(t))

    def _look(self, task: Task) -> None:
        last = self.bench.tasks if task.id == len(self.bench) else self.bench.tasks[: task.id]
        known: list[float | None] = [self.accuracy(t, rows=_CURVE_ROWS) for t in last]
        known += [None] * (len(self.bench) - len(known))
        self.curve.append({"step": self.step, "task": task.id, "accuracy": known})

    def _show(self, task: Task) -> None:
        if self._watch is None:
            return
        seen = [a for a in self.curve[-1]["accuracy"] if a is not None] if self.curve else []
        self._watch(
            Progress(
                task=task.id,
                num_tasks=len(self.bench),
                step=self.step,
                num_steps=self._num_steps,
                loss=float("nan") if self._loss is None else self._loss.item(),
                accuracy=sum(seen) / len(seen) if seen else float("nan"),
            )
        )

    def _save(self) -> None:
        self._saver.save(self.step, self._state)

    def _state(self, kept: dict[str, Any]) -> checkpoint.State:
        return checkpoint.State(
            weights=self.model.state_dict(),
            optimizer=kept.pop("optimizer", None),
            anchors=tuple(self.anchors),
            deltas={name: _plain(delta) for name, delta in self.deltas.items()},
            replay=kept.pop("replay", None),
            stream={"task": self._task, "epoch": self.epoch, "batch": self._batch},
            counters={
                "settings": self.settings.to_dict(),
                "matrix": self.matrix.rows,
                "curve": self.curve,
                "seconds": self.elapsed(),
                "finished": self.finished,
                "kept": kept,
            },
            step=self.step,
        )

    def restore(self, state: checkpoint.State) -> None:
        """Take over a saved run; the recipe then goes on from there."""
        self.model.load_state_dict(dict(state.weights))
        self.anchors = [a for a in state.anchors if isinstance(a, arch.Anchor)]
        for a in self.anchors:
            a.bind(self.model)
        saved = state.deltas if isinstance(state.deltas, Mapping) else {}  # none, in older ones
        self.deltas = {name: _delta(values) for name, values in saved.items()}
        counters: Mapping[str, Any] = state.counters or {}
        self._saver.restored(state, counters["kept"])
        where: Mapping[str, Any] = state.stream or {}
        self._task, self.epoch, self._batch = where["task"], where["epoch"], where["batch"]
        self.matrix = AccuracyMatrix.from_rows(counters["matrix"])
        self.curve = list(counters["curve"])
        self.seconds, self.finished = counters["seconds"], counters["finished"]
        self.step = state.step
