"""Where a stream stands in its shards: reads on, waits for more, and goes back to a saved place."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.rows import shown
from tessera.data.shards import IterableShard, Shard
from tessera.data.sources import Item, items_of
from tessera.data.stream_state import check_rows, check_shards, runs
from tessera.errors import InputError

__all__ = ["Cursor"]

_LEAST_ROWS, _MOST_ROWS = 256, 4096
_READ_BYTES = 1 << 25


class _Opened(NamedTuple):
    """A shard that was reached: of `rows` rows, the first of which is row `first` of the stream."""

    name: str
    first: int
    rows: int
    fingerprint: str


@final
class Cursor:
    """Reads shards one after the other; the rows of all of them are numbered from 0.

    Args:
        shards: As `Stream` takes them.
        follow: Whether more may come.

    Raises:
        InputError: Something is no shard.
        MissingDataError: A path has no shards.

    Example:
        >>> import torch
        >>> cursor = Cursor([Batch(torch.zeros(2, 1), torch.tensor([3, 4]))], follow=False)
        >>> cursor.load(10, 0).y, cursor.load(10, 0), cursor.row
        (tensor([3, 4]), None, 2)
    """

    def __init__(self, shards: Any, *, follow: bool) -> None:
        self._shards, self._follow = shards, follow
        self._items: list[Item] = items_of(shards, follow=follow)
        self._opened: list[_Opened] = []
        self._shard: Shard | None = None  # the last opened; None: open it again
        self.row = 0
        """The row that is read next."""
        self.schema: list[list[Any]] | None = None
        """dtype and shape of the rows of x and of y, once one was read."""

    def load(self, need: int, row_bytes: int) -> Batch | None:
        """Rows of one shard that follow, at most some more than `need`; None if there are none.

        Raises:
            InputError: A shard is damaged, or its rows are not like those before.
            MissingDataError: A shard is not there. After either this stands where it stood, and
                opens the shard again when it is asked again.
        """
        while True:
            if self._opened:
                at = self._opened[-1]
                shard, start = self._last(), self.row - at.first
                if isinstance(shard, IterableShard):
                    # No further than needed: its rows may come slowly.
                    at = self._known(rows=shard.pull(start + min(need, _MOST_ROWS)))
                if start < at.rows:
                    stop = min(at.rows, start + _block(max(need, _LEAST_ROWS), row_bytes))
                    rows = self._read(shard, at.name, start, stop)
                    self.row += len(rows.x)
                    return rows
            if len(self._opened) < len(self._items):
                self._open(self._items[len(self._opened)])
            elif not self._follow or not self._refresh():
                return None

    def _read(self, shard: Shard, name: str, start: int, stop: int) -> Batch:
        try:
            rows = shard.read(start, stop)
            self._check(rows, name, stop - start)
        except BaseException:
            self._shard = None  # whoever repairs the file wants it opened again
            raise
        return rows

    def _check(self, rows: Any, name: str, count: int) -> None:
        if not isinstance(rows, tuple) or not all(isinstance(t, Tensor) for t in rows):
            raise InputError(f"shard {name!r} must read a Batch, got {type(rows).__name__}")
        x, y = rows
        if x.ndim < 1 or y.ndim < 1 or not len(x) == len(y) == count:
            raise InputError(
                f"shard {name!r} was asked for {count} rows and gave x {shown(x)}, y {shown(y)}"
            )
        schema = [[str(t.dtype).removeprefix("torch."), list(t.shape[1:])] for t in rows]
        if self.schema is None:
            self.schema = schema
        for field, own, got in zip("xy", self.schema, schema, strict=True):
            if own != got:
                raise InputError(
                    f"shard {name!r} has rows {field} of {got[0]} {got[1]}, the stream's are "
                    f"{own[0]} {own[1]} since its first shard; convert the shard and go on"
                )

    def _open(self, item: Item) -> None:
        shard = item.open()
        self._opened.append(_Opened(item.name, self.row, len(shard), shard.fingerprint()))
        self._shard = shard

    def _last(self) -> Shard:
        """The shard that was opened last."""
        if self._shard is None:
            at = self._opened[-1]
            shard = self._items[len(self._opened) - 1].open()
            if not isinstance(shard, IterableShard):
                check_rows(at.name, self.row - at.first, len(shard), last=True)
            self._known(rows=len(shard), fingerprint=shard.fingerprint())
            self._shard = shard
        return self._shard

    def _known(self, **new: Any) -> _Opened:
        self._opened[-1] = self._opened[-1]._replace(**new)
        return self._opened[-1]

    def _refresh(self) -> bool:
        """Whether there are more rows or more shards than a moment ago."""
        if self._opened and (rows := len(self._last())) > self._opened[-1].rows:
            # A journal that was empty has got its mark with its first rows.
            self._known(rows=rows, fingerprint=self._last().fingerprint())
            return True
        known = {item.path for item in self._items}
        new = [item for item in items_of(self._shards, follow=True) if item.path not in known]
        last_path = max((item.path for item in self._items if item.path), default=None)
        for item in new:
            if item.path is not None and last_path is not None and item.path < last_path:
                raise InputError(
                    f"the new shard {item.name!r} sorts before {last_path.name!r}, which the "
                    "stream has read or will read; give it a name that comes later, then go on"
                )
        self._items.extend(new)
        return bool(new)

    def reached(self, entered: int) -> list[list[Any]]:
        """Name, rows and fingerprint of the shards that the first `entered` rows are from."""
        return [[o.name, o.rows, o.fingerprint] for o in self._opened if o.first < entered]

    @property
    def count(self) -> int | None:
        """How many shards there are; None while more may come."""
        return None if self._follow else len(self._items)

    def restore(
        self, state: Mapping[str, Any], rows: Sequence[int], row_bytes: int
    ) -> Iterator[tuple[int, Batch]]:
        """Stand where a state was saved, and read these rows, ascending, once more.

        Yields:
            (the first row's number, rows), without gaps inside.

        Raises:
            CheckpointError: A shard has changed.
            MissingDataError: A shard is not there.
        """
        check_shards(state, self._items, follow=self._follow)
        self.schema = state["schema"]
        for number, (name, count, fingerprint) in enumerate(state["shards"]):
            first, last = self.row, number == len(state["shards"]) - 1
            stop = min(first + count, state["entered"])
            own = rows[bisect.bisect_left(rows, first) : bisect.bisect_left(rows, stop)]
            self._opened.append(_Opened(name, first, count, fingerprint))
            if own or last:
                self._shard = shard = self._items[number].open()
                if not isinstance(shard, IterableShard):
                    check_rows(name, count, len(shard), last=last)
                    self._known(rows=len(shard))
                for start, end in runs(own, _block(_MOST_ROWS, row_bytes)):
                    yield start, self._read(shard, name, start - first, end - first)
            self.row = stop


def _block(rows: int, row_bytes: int) -> int:
    return max(1, min(rows, _MOST_ROWS, _READ_BYTES // max(1, row_bytes)))
