"""One finite pass over shards: batches, shuffled within a window, that resume at the very row."""

from __future__ import annotations

import datetime
import math
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.checks import is_count
from tessera.data.cursor import Cursor
from tessera.data.detectors import (
    DriftDetector,
    check_detector,
    detector_state,
    load_detector,
)
from tessera.data.rows import shown
from tessera.data.segments import JournalShard
from tessera.data.stream_state import (
    STATE_VERSION,
    check_state,
    packed,
)
from tessera.data.window import RowPool, Window
from tessera.errors import InputError

__all__ = ["Stream"]

_POLL_S, _MOST_POLL_S = 0.02, 0.25


@final
class Stream:
    """One finite pass over shards, in batches, shuffled within a window.

    A stream is an iterator: a loop that was left goes on where it was, and what has ended gives
    nothing more. Its order is a function of (seed, shards, window) alone. A state holds references
    to the rows of the window, not the rows; from it the same rows follow, bit for bit, in whatever
    batches.

    Args:
        shards: A path (a file, a folder or a glob, in sorted order), a `Batch`, a pair (x, y) of
            tensors or arrays, a Hugging Face data set, a `Shard`, or a list of these.
        window: Rows among which the next is drawn, >= 1; 1 keeps the order. They lie in memory.
        drift_detector: What `observe` feeds: `update(value)` and `drift_detected`.
        batch_size: Rows of a batch, >= 1; the last one may have fewer.
        seed: Of the order.
        follow: True waits for more shards in a folder, or for more rows of a growing last shard,
            until `stop`; a number ends after so many seconds without any.

    Raises:
        InputError: A setting is out of range, or something is no shard.
        MissingDataError: A path has no shards.

    Example:
        >>> import torch
        >>> rows = Batch(torch.arange(6.0)[:, None], torch.arange(6))
        >>> [batch.y.tolist() for batch in Stream([rows], 1, batch_size=4)]
        [[0, 1, 2, 3], [4, 5]]
        >>> sorted(y for batch in Stream(rows, 3, batch_size=4) for y in batch.y.tolist())
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        shards: Any,
        window: int,
        drift_detector: DriftDetector | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        follow: bool | float = False,
    ) -> None:
        for name, value in (("window", window), ("batch_size", batch_size)):
            if not is_count(value) or value < 1:
                raise InputError(f"Stream needs a whole {name} >= 1, got {value!r}")
        if drift_detector is not None:
            check_detector("Stream", drift_detector)
        if not isinstance(follow, bool | int | float) or not follow >= 0:
            raise InputError(f"Stream needs follow=True, False or seconds >= 0, got {follow!r}")
        self.drift_detector = drift_detector
        self.drifts: list[int] = []
        """After how many rows `observe` found a drift."""
        self.batch_size = int(batch_size)
        self._seed, self._follow = int(seed), follow is True or follow > 0
        self._follow_s = math.inf if follow is True else float(follow)
        self._shards = shards
        self._stopped = threading.Event()
        self._observed = False
        self._cursor = Cursor(shards, follow=self._follow)
        self._window = Window(int(window), seed=self._seed)
        self._pool = RowPool()
        self._row_of: dict[int, int] = {}  # slot in the pool -> number of the row

    @classmethod
    def from_journal(
        cls,
        path: str | os.PathLike[str],
        window: int,
        drift_detector: DriftDetector | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        since: int | datetime.datetime | None = None,
        follow: bool | float = False,
    ) -> Stream:
        """A pass over what a `Journal` holds.

        Args:
            path: The journal's folder; it may have a writer.
            window: As for `Stream`.
            drift_detector: As for `Stream`.
            batch_size: As for `Stream`.
            seed: As for `Stream`.
            since: The row to begin at, as `append` returned it; or a time with a time zone: the
                first row that is not older.
            follow: As for `Stream`: whether to wait for more rows.

        Raises:
            InputError: A setting is out of range.
            MissingDataError: There is no journal.
            CheckpointError: It is damaged.

        Example:
            >>> import tempfile, torch
            >>> from tessera.data.journal import Journal
            >>> folder = tempfile.mkdtemp()
            >>> with Journal(folder) as journal:
            ...     journal.append(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
            0
            >>> next(Stream.from_journal(folder, 1, batch_size=8, since=1)).y
            tensor([1, 2])
        """
        return cls(
            [JournalShard(path, since=since)],
            window,
            drift_detector,
            batch_size=batch_size,
            seed=seed,
            follow=follow,
        )

    # --- reading -----------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """How many rows were given."""
        return self._window.position

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            InputError: A shard is damaged, or its rows are of another kind than those before. The
                stream stands after the last good batch and goes on once the shard is repaired.
            MissingDataError: A shard is not there; likewise.
        """
        window, deadline, pause = self._window, None, _POLL_S
        while not self._stopped.is_set():
            # With so many more, all draws of the batch are from a full window.
            need = window.size - 1 + self.batch_size - window.waiting
            if need <= 0:
                return self._give(self.batch_size)
            rows = self._cursor.load(need, self._pool.row_bytes)
            if rows is not None:
                slots = self._pool.put(rows)
                self._row_of.update(
                    zip(slots, range(self._cursor.row - len(slots), self._cursor.row), strict=True)
                )
                window.enter(slots)
                deadline, pause = None, _POLL_S
                continue
            deadline = deadline if deadline is not None else time.monotonic() + self._follow_s
            left = deadline - time.monotonic()
            if left > 0:
                self._stopped.wait(min(pause, left))
                pause = min(2 * pause, _MOST_POLL_S)
            elif window.waiting:
                return self._give(min(self.batch_size, window.waiting))
            else:
                break
        raise StopIteration

    def stop(self) -> None:
        """End the pass after the batch that is being made; any thread may call it.

        Rows of the window are not given any more: a stream that loads this one's state gives them.
        """
        self._stopped.set()

    def _give(self, count: int) -> Batch:
        slots = self._window.draw(count)
        for slot in slots:
            del self._row_of[slot]
        return self._pool.take(slots)

    # --- drift -------------------------------------------------------------------------------

    def observe(self, loss: float | Tensor) -> bool:
        """Tell the drift detector what the last batch was like; whether it found a drift.

        Args:
            loss: A finite number or 0-d tensor: a loss, or 1 for an error and 0 for none.

        Raises:
            InputError: There is no detector, or the value is no finite number; nothing was changed.

        Example:
            >>> import torch
            >>> from tessera.data.drift import PageHinkley
            >>> rows = Batch(torch.zeros(200, 1), torch.zeros(200, dtype=torch.int64))
            >>> stream = Stream([rows], 1, PageHinkley(threshold=5.0), batch_size=1)
            >>> [t for t, _ in enumerate(stream) if stream.observe(float(t >= 100))]
            [105]
            >>> stream.drifts
            [106]
        """
        detector = self.drift_detector
        if detector is None:
            raise InputError(
                "observe() needs a drift detector: Stream(shards, window, data.ADWIN(), ...)"
            )
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise InputError(f"observe() needs one number, got {shown(loss)}; give its mean()")
        value = float(loss)
        if not math.isfinite(value):
            raise InputError(f"observe() needs a finite loss, got {value}; leave the batch out")
        detector.update(value)
        self._observed = True
        found = bool(detector.drift_detected)
        if found:
            self.drifts.append(self.position)
        return found

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as plain numbers, lists and texts.

        Raises:
            CheckpointError: The detector was fed and has no `state_dict`, as River's: a resumed
                run would not notice what this one does. Take `ADWIN` or `PageHinkley`.
        """
        entered = self._cursor.row - len(self._window.queue)
        return {
            "version": STATE_VERSION,
            "window": self._window.size,
            "seed": self._seed,
            "position": self.position,
            "entered": entered,
            "held": packed([self._row_of[slot] for slot in self._window.held]),
            "shards": self._cursor.reached(entered),
            "of": self._cursor.count,
            "schema": self._cursor.schema,
            "drifts": list(self.drifts),
            "detector": detector_state(self.drift_detector, used=self._observed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; the batch size may be another.

        Raises:
            CheckpointError: The state is damaged, of other settings, or of other data.
            MissingDataError: A shard that the stream had reached is not there. Nothing was changed.

        Example:
            >>> import torch
            >>> rows = Batch(torch.arange(9.0)[:, None], torch.arange(9))
            >>> stream, again = (Stream([rows], 4, batch_size=3) for _ in range(2))
            >>> _ = next(stream)
            >>> again.load_state_dict(stream.state_dict())
            >>> bool((next(again).x == next(stream).x).all())
            True
        """
        held = check_state(state, window=self._window.size, seed=self._seed)
        cursor, pool = Cursor(self._shards, follow=self._follow), RowPool()
        slot_of: dict[int, int] = {}
        for first, rows in cursor.restore(state, sorted(held), self._pool.row_bytes):
            slots = pool.put(rows)
            slot_of.update(zip(range(first, first + len(slots)), slots, strict=True))
        window = Window(self._window.size, seed=self._seed)
        window.position = int(state["position"])
        window.held = [slot_of[row] for row in held]
        load_detector(self.drift_detector, state["detector"])
        self._cursor, self._pool, self._window = cursor, pool, window
        self._row_of = {slot: row for row, slot in slot_of.items()}
        self.drifts = list(state["drifts"])
