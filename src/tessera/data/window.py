"""The order of a stream: a shuffle within a window, as references, and the rows they refer to."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt

from tessera import random
from tessera.data.batch import Batch
from tessera.data.draws import Words
from tessera.data.rows import Column, Index

__all__ = ["RowPool", "Window"]


@final
class RowPool:
    """Rows that wait for their turn, each in a slot; it grows as rows come and is never full.

    Example:
        >>> import torch
        >>> pool = RowPool()
        >>> slots = pool.put(Batch(torch.tensor([[1.0], [2.0]]), torch.tensor([3, 4])))
        >>> pool.take(slots[1:]).y
        tensor([4])
    """

    def __init__(self) -> None:
        self._columns: list[Column] = []
        self._free: list[int] = []
        self._size = 0

    @property
    def row_bytes(self) -> int:
        """Of one row; 0 before the first."""
        return sum(c.store.dtype.itemsize * c.store.shape[1] for c in self._columns)

    def put(self, rows: Batch) -> list[int]:
        """Copy rows in; the slots they have now."""
        count = len(rows.x)
        if not self._columns:
            self._columns = [Column.like(t, 0) for t in rows]
        if len(self._free) < count:
            self._grow(count)
        slots = self._free[-count:] if count else []
        del self._free[len(self._free) - count :]
        place, whole = _place(slots), slice(0, count)
        for column, value in zip(self._columns, rows, strict=True):
            column.put(place, value, whole)
        return slots

    def take(self, slots: Sequence[int]) -> Batch:
        """A copy of the rows in these slots, which are free from now on."""
        place = _place(slots)
        x, y = (column.rows(place) for column in self._columns)
        self._free.extend(slots)
        return Batch(x, y)

    def _grow(self, count: int) -> None:
        size = max(2 * self._size, self._size + count)
        grown = []
        for column in self._columns:
            store = np.empty((size, column.store.shape[1]), column.store.dtype)
            store[: self._size] = column.store
            grown.append(Column(dtype=column.dtype, row_shape=column.row_shape, store=store))
        self._columns = grown
        self._free.extend(range(self._size, size))
        self._size = size


def _place(slots: Sequence[int]) -> Index | slice:
    first = slots[0] if slots else 0
    if slots == list(range(first, first + len(slots))):
        return slice(first, first + len(slots))  # one memcpy
    return np.array(slots, np.intp)


@final
class Window:
    """Which row comes next: of the first `size` rows not yet given, one at random.

    Row after row: the window is filled up to `size` in the order of the shards, one of it is given,
    the last takes its place. The draw at position t is a function of (seed, t), so the order is one
    of (seed, rows, size), however it is cut into batches.

    Args:
        size: Rows, >= 1.
        seed: Of the order.

    Example:
        >>> def order(size, cuts):
        ...     window, given = Window(size, seed=0), []
        ...     for row in range(10):
        ...         window.enter([row])
        ...     for count in cuts:
        ...         given += window.draw(count)
        ...     return given
        >>> order(1, [10]) == list(range(10)), order(4, [10]) == order(4, [3, 1, 6])
        (True, True)
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self.size = size
        self.position = 0
        """How many rows were given."""
        self._words = Words(random.key(seed, "stream", "order"))
        self.held: list[int] = []
        """The rows of the window, in its order."""
        self.queue: deque[int] = deque()
        """The rows that come into it next."""

    def enter(self, rows: Sequence[int]) -> None:
        """Rows that follow the last."""
        self.queue.extend(rows)

    @property
    def waiting(self) -> int:
        """How many rows have entered and were not given."""
        return len(self.held) + len(self.queue)

    def draw(self, count: int) -> list[int]:
        """The next `count` rows; at most as many as there are."""
        held, queue, size = self.held, self.queue, self.size
        words: npt.NDArray[np.uint64] = self._words.read(self.position, count)
        self.position += count
        if size == 1:
            given = [queue.popleft() for _ in range(count - len(held))]
            given, self.held = held + given, []
            return given
        given = []
        for word in words.tolist():
            while len(held) < size and queue:
                held.append(queue.popleft())
            chosen = word % len(held)
            given.append(held[chosen])
            held[chosen] = held[-1]
            held.pop()
        return given
