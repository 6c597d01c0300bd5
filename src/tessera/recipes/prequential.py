"""What an online recipe is given: a stream to test and then learn, and the bookkeeping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessera import checkpoint, data
from tessera.data import Batch
from tessera.errors import InputError
from tessera.metrics import Prequential
from tessera.profiler import Budget
from tessera.recipes.run import reseed
from tessera.recipes.saving import S, Saver

__all__ = ["OnlineProgress", "OnlineRun", "OnlineSettings"]


_FIRST_ROWS, _GROWTH = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnlineSettings:
    """Everything that decides the outcome of an online run.

    Attributes:
        recipe: A name in `recipes.ONLINE_RECIPES`, or the path of a file with ``def recipe(run)``.
        stream: "sea", "stagger", "hyperplane", "digits", "fashion_mnist", or the path of a file, a
            folder or a glob of shards as `data.Stream` reads them.
        rows: How many rows "sea", "stagger" and "hyperplane" have; they drift at every quarter.
        num_classes: C, labels are 0 .. C-1; None counts them, in streams that fit in memory.
        model: "PKG:FUNC", called with (input_shape, num_classes).
        batch_size: Rows that are tested together before they are learned, >= 1. The first batches
            of a stream are smaller: an eighth of the rows before them, and at least 4.
        window: Rows the stream is shuffled within; 1 keeps its order.
        lr: Adam's learning rate when calm, > 0.
        buffer: Rows the replay holds, >= 1.
        budget_ms: Milliseconds that learning a batch may take; None sets no cap. With a cap the
            number of steps depends on the machine's speed, so weights are not reproducible.
        budget_joules: Likewise, joules; from the best source there is, as `profiler.measure` says.
        seed: Of the weights, the generators and the replay.
        threads: CPU threads.

    Example:
        >>> OnlineSettings(stream="stagger").batch_size
        16
    """

    recipe: str = "online"
    stream: str = "sea"
    rows: int = 20_000
    num_classes: int | None = None
    model: str = "tessera.recipes:small_mlp"
    batch_size: int = 16
    window: int = 1
    lr: float = 5e-3
    buffer: int = 5000
    budget_ms: float | None = None
    budget_joules: float | None = None
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size", "window", "buffer", "threads"):
            value = getattr(self, name)
            if int(value) != value or value < 1:
                raise InputError(f"{name} must be a whole number >= 1, got {value}")
        for name in ("lr", "budget_ms", "budget_joules"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be a finite number > 0, got {value}")
        if self.num_classes is not None and self.num_classes < 2:
            raise InputError(f"num_classes must be >= 2, got {self.num_classes}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnlineProgress:
    """Where an online run stands, for whoever shows it.

    Attributes:
        rows: Tested and learned so far.
        accuracy: Prequential, over the rows so far.
        no_change: What the label before would have got.
        loss: Of the newest step that was logged, NaN before the first.
        drifts: How many were seen.

    Example:
        >>> OnlineProgress(rows=9, accuracy=0.8, no_change=0.5, loss=0.3, drifts=0).rows
        9
    """

    rows: int
    accuracy: float
    no_change: float
    loss: float
    drifts: int


class OnlineRun:
    """One prequential run, as a recipe sees it.

    A recipe loops over `batches`, tests each, and learns it in its own way::

        def recipe(run):
            optimizer = run.keep("optimizer", tg.Adam(run.model.parameters(), lr=run.lr))

            @tg.training_step(optimizer=optimizer)
            def step(batch):
                return T.cross_entropy(run.model(batch.x), batch.y)

            for batch in run.batches():
                run.test(batch)
                for _ in run.steps(1):
                    run.log(step(batch))

    Between two batches of the stream the run may save itself. What must survive an interruption is
    either the model or given to `keep`.

    Attributes:
        model: The module in training.
        settings: Of the run.
        seed: Of everything random.
        lr: The learning rate when calm.
        buffer: Rows the replay may hold.
        score: Prequential accuracy so far.
        drifts: After how many rows each drift was marked.
        step: Steps of learning done.

    Example:
        >>> from tessera import data, recipes
        >>> settings = OnlineSettings(rows=100)
        >>> stream = data.Stream([data.sea(100)], 1, batch_size=16)
        >>> run = OnlineRun(recipes.small_mlp((3,), 2), stream, 2, settings)
        >>> [len(batch.y) for batch in run.batches()]
        [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 3]
    """

    def __init__(
        self,
        model: nn.Module,
        stream: data.Stream,
        num_classes: int,
        settings: OnlineSettings,
        *,
        folder: Path | None = None,
        every: int | None = None,
        watch: Callable[[OnlineProgress], None] | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.seed, self.lr, self.buffer = settings.seed, settings.lr, settings.buffer
        self.score = Prequential(num_classes)
        self.drifts: list[int] = []
        self.step = 0
        self.seconds = self.cpu_seconds = 0.0
        self.finished = False
        self._stream, self._saver, self._watch = stream, Saver(folder, every), watch
        caps = settings.budget_ms, settings.budget_joules
        self._budget = None if caps == (None, None) else Budget(*caps)
        self._loss: Tensor | None = None
        self._clock, self._cpu = time.perf_counter(), time.process_time()

    def keep(self, name: str, thing: S) -> S:
        """Save `thing` with the run, and restore it now if the run is being resumed."""
        return self._saver.keep(name, thing)

    def batches(self) -> Iterator[Batch]:
        """The batches that are left, in stream order.

        PyTorch's global generator is set from (seed, row) before each, so that dropout resumes
        exactly as well.
        """
        while True:
            rows = self._stream.position
            # A new learner has most to gain from learning early.
            self._stream.batch_size = min(
                self.settings.batch_size, max(_FIRST_ROWS, rows // _GROWTH)
            )
            batch = next(self._stream, None)
            if batch is None:
                break
            reseed(self.seed, "row", rows)
            yield Batch(_floating(batch.x), batch.y)
            if self._watch is not None:
                self._watch(self._progress())
            if self._saver.due(self.step):
                self._save()
        self.finished = True
        self._save()

    def test(self, batch: Batch) -> float:
        """Count what the model says of rows it has not learned; the share it got wrong."""
        self.model.eval()
        with torch.no_grad():
            guess = self.model(batch.x).argmax(-1)
        self.model.train()
        return self.score.update(guess, batch.y)

    def steps(self, count: int) -> Iterator[int]:
        """0 .. count-1, fewer where the budget of the batch does not suffice."""
        for i in range(count) if self._budget is None else self._budget:
            if i >= count:
                break
            yield i
            self.step += 1

    def mark_drift(self) -> None:
        """Put a mark at the rows tested so far; the report shows it."""
        self.drifts.append(self.score.rows)

    def log(self, loss: Tensor) -> None:
        """Show this loss from now on."""
        self._loss = loss

    def elapsed(self) -> tuple[float, float]:
        """(wall, CPU) seconds of this run so far, interruptions left out."""
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        self.cpu_seconds, self._cpu = self.cpu_seconds + cpu - self._cpu, cpu
        return self.seconds, self.cpu_seconds

    def _progress(self) -> OnlineProgress:
        return OnlineProgress(
            rows=self.score.rows,
            accuracy=self.score.accuracy(),
            no_change=self.score.no_change(),
            loss=math.nan if self._loss is None else self._loss.item(),
            drifts=len(self.drifts),
        )

    def _save(self) -> None:
        self._saver.save(self.step, self._state)

    def _state(self, kept: dict[str, Any]) -> checkpoint.State:
        self.elapsed()
        return checkpoint.State(
            weights=self.model.state_dict(),
            optimizer=kept.pop("optimizer", None),
            replay=kept.pop("replay", None),
            stream=self._stream.state_dict(),
            counters={
                "online": self.settings.to_dict(),
                "score": self.score.state_dict(),
                "drifts": list(self.drifts),
                "seconds": [self.seconds, self.cpu_seconds],
                "finished": self.finished,
                "kept": kept,
            },
            step=self.step,
        )

    def restore(self, state: checkpoint.State) -> None:
        """Take over a saved run; the recipe then goes on from there."""
        counters: Mapping[str, Any] = state.counters or {}
        self.model.load_state_dict(dict(state.weights))
        self._stream.load_state_dict(state.stream or {})
        self.score.load_state_dict(counters["score"])
        self._saver.restored(state, counters["kept"])
        self.drifts = list(counters["drifts"])
        self.seconds, self.cpu_seconds = counters["seconds"]
        self.finished = counters["finished"]
        self.step = state.step


def _floating(x: Tensor) -> Tensor:
    """Inputs as float32: images in bytes are scaled to [0, 1], other numbers stay what they are."""
    return x.float() / 255 if x.dtype is torch.uint8 else x.float()
