"""What a stream reads: shards of rows, in memory or made by an iterator, and what a row must be."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.rows import shown
from tessera.errors import InputError

__all__ = ["IterableShard", "MemoryShard", "Shard", "as_rows", "digest"]


@runtime_checkable
class Shard(Protocol):
    """Rows that can be read by number: the three methods a `Stream` needs of its data.

    Anything that has them is a shard. A shard whose length grows (a journal) must be the last of
    its stream, and its fingerprint must not depend on the length.

    Example:
        >>> class Squares:
        ...     def __len__(self) -> int:
        ...         return 100
        ...     def read(self, start: int, stop: int) -> Batch:
        ...         x = torch.arange(start, stop)
        ...         return Batch(x.float()[:, None], x**2)
        ...     def fingerprint(self) -> str:
        ...         return "squares of 0..99"
        >>> isinstance(Squares(), Shard)
        True
    """

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`, as a copy or as a view that nobody writes to."""
        ...

    def fingerprint(self) -> str:
        """A short text that another content would not have; cheap, and without times of change."""
        ...


@final
class MemoryShard:
    """Rows that are in memory already.

    Args:
        x: Tensor or array [n, ...]; its dtype is kept.
        y: Tensor or array [n, ...]; whole numbers become int64.

    Raises:
        InputError: They are no rows, or differ in number.

    Example:
        >>> shard = MemoryShard(np.zeros((5, 2), np.float32), np.arange(5, dtype=np.uint8))
        >>> len(shard), shard.read(1, 3).y
        (5, tensor([1, 2]))
    """

    name = "rows in memory"

    def __init__(self, x: Any, y: Any) -> None:
        self._rows = as_rows(x, y, self.name)

    def __len__(self) -> int:
        return len(self._rows.x)

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`, as a view."""
        return Batch(self._rows.x[start:stop], self._rows.y[start:stop])

    def fingerprint(self) -> str:
        """Of shapes, dtypes, and the first and the last row."""
        parts: list[bytes] = [shown(t).encode() for t in self._rows]
        for t in self._rows:
            parts += [_bytes(t[:1]), _bytes(t[-1:])]
        return digest(*parts)


@final
class IterableShard:
    """Rows from an iterator, finite or endless: the adapter for what cannot be read by number.

    A stream that is resumed counts forward: the rows before its place are drawn once more and
    dropped. An endless shard must be the last of its stream.

    Args:
        rows: A function that returns a new iterator of rows ``(x, y)``, the same each time, such
            as a generator function; or an iterable. A lone iterator can be read once, so a stream
            over it resumes only in a process where nothing was drawn from it yet.
        fingerprint: A text that says which rows these are; a resume compares it.

    Example:
        >>> def rows():
        ...     for i in range(3):
        ...         yield [float(i)], i
        >>> shard = IterableShard(rows)
        >>> shard.pull(2), shard.read(0, 2).x.tolist(), shard.pull(9)
        (2, [[0.0], [1.0]], 3)
    """

    name = "rows of an iterable"

    def __init__(
        self,
        rows: Callable[[], Iterator[tuple[Any, Any]]] | Iterable[tuple[Any, Any]],
        fingerprint: str = "iterable",
    ) -> None:
        if not callable(rows) and not isinstance(rows, Iterable):
            raise InputError(
                "IterableShard needs an iterable of rows (x, y), or a function that returns an "
                f"iterator of them, got {type(rows).__name__}"
            )
        self._source = rows
        self._text = fingerprint
        self._begin()

    def _begin(self) -> None:
        self._rows = iter(self._source() if callable(self._source) else self._source)
        self._held: deque[tuple[Any, Any]] = deque()
        self._pulled = 0

    def __len__(self) -> int:
        return self._pulled

    def pull(self, rows: int) -> int:
        """Draw until there are `rows` of them or no more; how many were drawn in all."""
        while self._pulled < rows:
            try:
                self._held.append(next(self._rows))
            except StopIteration:
                break
            self._pulled += 1
        return self._pulled

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`; those before `stop` are dropped.

        Raises:
            InputError: A row is no (x, y) of numbers, of other shapes than its neighbour, or gone.
        """
        if start < self._pulled - len(self._held):
            if self._source is self._rows:
                raise InputError(
                    f"row {start} of an iterator is gone: it can be read once. Give IterableShard "
                    "a function that returns a new iterator, such as a generator function"
                )
            self._begin()
        taken: list[tuple[Any, Any]] = []
        first = self._pulled - len(self._held)
        for row in range(first, stop):
            if not self._held and self.pull(row + 1) <= row:
                raise InputError(f"the iterable ended at row {row}, {stop} are needed")
            pair = self._held.popleft()
            if row >= start:
                taken.append(pair)
        try:
            xs, ys = zip(*taken, strict=True)
            x = torch.stack([_tensor(v, self.name) for v in xs])
            y = torch.stack([_tensor(v, self.name) for v in ys])
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"rows {start} .. {stop - 1} of an iterable must be pairs (x, y) of numbers, all "
                f"of one shape and dtype: {error}"
            ) from error
        return as_rows(x, y, self.name)

    def fingerprint(self) -> str:
        """What was given as such."""
        return self._text


def as_rows(x: Any, y: Any, where: str) -> Batch:
    """Inputs and labels as tensors: x as it is, whole numbers in y as int64.

    Args:
        x: Tensor, array or nested list [n, ...].
        y: Likewise, with as many rows.
        where: The name of what they are from, for the message.

    Raises:
        InputError: They are no rows of numbers, or differ in number.

    Example:
        >>> as_rows(np.zeros((2, 3), np.uint8), np.ones(2, np.int16), "a file").y
        tensor([1, 1])
    """
    a, b = _tensor(x, where), _tensor(y, where)
    for name, value in (("x", a), ("y", b)):
        if value.ndim < 1 or value.is_complex() or value.layout is not torch.strided:
            raise InputError(f"{where}: {name} must be dense rows [n, ...], got {shown(value)}")
    if len(a) != len(b):
        raise InputError(
            f"{where}: x and y differ in rows: x is {shown(a)}, y is {shown(b)}; save as many"
        )
    return Batch(a, b if b.is_floating_point() else b.to(torch.int64))


def _tensor(value: Any, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"dtype {array.dtype}")
        if array.dtype == np.float64 and not isinstance(value, np.ndarray | np.generic):
            array = array.astype(np.float32)  # Python's floats, as torch.tensor takes them
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        # A map or a view of bytes is read-only, which torch does not know.
        if not array.flags.writeable or any(step < 0 for step in array.strides):
            array = array.copy()
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: rows must be numbers of one shape ({error})") from error


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(*parts: bytes) -> str:
    """A fingerprint of these bytes: 16 letters.

    Example:
        >>> digest(b"ab", b"c") == digest(b"a", b"bc")
        False
    """
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()
