"""Reading a journal: its segments, and all of it as a shard that may grow."""

from __future__ import annotations

import bisect
import datetime
import math
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.records import Array, Record, RecordReader
from tessera.data.shards import digest
from tessera.errors import CheckpointError, InputError, MissingDataError

__all__ = [
    "PREFIX_BYTES",
    "JournalRecord",
    "JournalShard",
    "Segment",
    "encoded",
    "is_journal",
    "segment_paths",
]

PREFIX_BYTES = 24  # of a file of records, before the first
_VERSION = 1
_DTYPES = {str(d)[6:]: d for d in vars(torch).values() if isinstance(d, torch.dtype)}
# What numpy has too; others are kept as integers of their size.
_NATIVE = {"uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"}
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class JournalRecord(NamedTuple):
    """What one call of `Journal.append` wrote.

    Attributes:
        row: The number of its first row.
        time_ns: When it came, nanoseconds since 1970; never less than the record before.
        held: Whether the clock said less, so that the time before was taken.
        tags: As given to `append`.
        rows: As given to `append`.

    Example:
        >>> import tempfile
        >>> from tessera.data.journal import Journal
        >>> with Journal(tempfile.mkdtemp()) as journal:
        ...     _ = journal.append(torch.zeros(2, 1), torch.tensor([0, 1]), time=7, tags={"a": 1})
        ...     [(r.row, r.time_ns, r.tags) for r in JournalShard(journal.path).records()]
        [(0, 7, {'a': 1})]
    """

    row: int
    time_ns: int
    held: bool
    tags: dict[str, Any]
    rows: Batch


def segment_paths(folder: Path) -> list[Path]:
    """The segments of a journal, oldest first."""
    return sorted(folder.glob("journal-*.rec"))


def is_journal(folder: Path) -> bool:
    """Whether there is a segment in this folder.

    Example:
        >>> import tempfile
        >>> is_journal(Path(tempfile.mkdtemp()))
        False
    """
    return any(folder.glob("journal-*.rec"))


def encoded(value: Tensor) -> Array:
    """A tensor as numbers that numpy has."""
    plain = value.detach().resolve_neg()
    if str(value.dtype)[6:] not in _NATIVE:
        plain = plain.contiguous().view(_WORDS[value.element_size()])
    return plain.numpy(force=True)


@final
class Segment:
    """One file of a journal.

    Args:
        path: Named by its first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.first = int(path.stem.removeprefix("journal-"))
        except ValueError as error:
            raise CheckpointError(f"{path} is no segment of a journal; move it away") from error
        self.rows = 0
        """How many were found by `scan`."""
        self.schema: list[list[Any]] | None = None
        self.last_ns = 0
        self.before_ns = 0
        """When the last row before this segment came."""
        self.reader: RecordReader | None = None
        self._firsts = array("q")  # of each record its first row, and where x and y start
        self._starts = (array("q"), array("q"))

    def scan(self) -> Segment:
        """Look for records that have come since the last scan.

        Raises:
            CheckpointError: The file is damaged.
        """
        for _ in self._noted():
            pass
        return self

    def records(self) -> Iterator[JournalRecord]:
        """Those that have come since the last scan.

        Raises:
            CheckpointError: The file is damaged.
        """
        for record in self._noted():
            head = record.head
            x, y = (self._tensor(i, record.arrays[name]) for i, name in enumerate("xy"))
            held, tags = bool(head.get("held", False)), dict(head.get("tags", {}))
            yield JournalRecord(head["row"], head["time_ns"], held, tags, Batch(x, y))

    def _noted(self) -> Iterator[Record]:
        """New records with rows, once it is noted where they lie."""
        if self.reader is None:
            try:
                size = self.path.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
            if size < PREFIX_BYTES:  # its writer has not begun, or was killed before it had
                return
            self.reader = RecordReader(self.path)
        for record in self.reader:
            try:
                if not self._note(record):
                    continue
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{self.path}: record {record.sequence} is not one of a journal ({error!r})"
                ) from error
            yield record

    def _note(self, record: Record) -> bool:
        """Note a record; whether it has rows: the first has the schema."""
        head = record.head
        if self.schema is None:
            if head["journal"] != _VERSION:
                raise ValueError(f"format {head['journal']!r}, this Tessera reads {_VERSION}")
            self.before_ns = self.last_ns = int(head["last_ns"])
            self.schema = [[str(kind), [int(n) for n in shape]] for kind, shape in head["schema"]]
            return False
        count = len(record.arrays["x"])
        if head["row"] != self.first + self.rows or count < 1:
            raise ValueError(f"row {head['row']} where row {self.first + self.rows} belongs")
        for name, (kind, shape) in zip("xy", self.schema, strict=True):
            found = record.arrays[name]
            if list(found.shape) != [count, *shape] or found.dtype != _stored(kind):
                raise ValueError(f"{name} is {found.dtype} {found.shape}")
        self._firsts.append(head["row"])
        for starts, name in zip(self._starts, "xy", strict=True):
            starts.append(record.starts[name])
        self.rows += count
        self.last_ns = int(head["time_ns"])
        return True

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1` of the journal, which lie in this segment."""
        if self.reader is None or self.schema is None or stop > self.first + self.rows:
            raise CheckpointError(
                f"{self.path} has {self.rows} whole rows from row {self.first} on, row {stop - 1} "
                "should be there: it is damaged. Restore it from a copy"
            )
        mapped = self.reader.mapped
        pieces: tuple[list[Array], list[Array]] = ([], [])
        number = bisect.bisect_right(self._firsts, start) - 1
        while start < stop:
            first, after = self._firsts[number], self.first + self.rows
            if number + 1 < len(self._firsts):
                after = self._firsts[number + 1]
            end = min(stop, after)
            for starts, (kind, shape), own in zip(self._starts, self.schema, pieces, strict=True):
                dtype = _stored(kind)
                width = math.prod(shape) * dtype.itemsize
                at = starts[number] + (start - first) * width
                raw = mapped[at : at + (end - start) * width]
                own.append(raw.view(dtype).reshape(end - start, *shape))
            start, number = end, number + 1
        x, y = (self._tensor(i, np.concatenate(own)) for i, own in enumerate(pieces))
        return Batch(x, y)

    def _tensor(self, field: int, stored: Array) -> Tensor:
        assert self.schema is not None
        # A map is read-only, which torch does not know.
        own = stored if stored.flags.writeable else stored.copy()
        return torch.from_numpy(own).view(_DTYPES[self.schema[field][0]])


def _stored(kind: str) -> np.dtype[Any]:
    return np.dtype(kind if kind in _NATIVE else f"i{_DTYPES[kind].itemsize}")


@final
class JournalShard:
    """The rows of a journal, as many as there are by now.

    Args:
        path: The journal's folder; it may have a writer.
        since: The row to begin at; or a time with a time zone: the first row that is not older, of
            those there are.

    Raises:
        MissingDataError: There is no such folder.
        InputError: `since` is out of range.
        CheckpointError: The journal is damaged.

    Example:
        >>> import tempfile
        >>> from tessera.data.journal import Journal
        >>> with Journal(tempfile.mkdtemp()) as journal:
        ...     for label in range(3):
        ...         _ = journal.append(torch.zeros(1, 2), torch.tensor([label]))
        ...     shard = JournalShard(journal.path)
        ...     len(shard), shard.read(1, 3).y
        (3, tensor([1, 2]))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        since: int | datetime.datetime | None = None,
    ) -> None:
        self.path, self.name = Path(path), str(path)
        if not self.path.is_dir():
            raise MissingDataError(f"there is no journal {path}; data.Journal(path) begins one")
        self._segments: list[Segment] = []
        self._since = 0
        if isinstance(since, datetime.datetime):
            if since.tzinfo is None:
                raise InputError(
                    f"since={since} has no time zone; say datetime(..., tzinfo=timezone.utc)"
                )
            self._since = self.row_at(_nanoseconds(since))
        elif since is not None:
            if isinstance(since, bool) or not isinstance(since, int) or since < 0:
                raise InputError(f"since= is a row >= 0 or a datetime, got {since!r}")
            self._since = since

    def _look(self) -> None:
        known = {s.path for s in self._segments}
        self._segments += [Segment(p) for p in segment_paths(self.path) if p not in known]
        if self._segments:
            self._segments[-1].scan()

    def __len__(self) -> int:
        self._look()
        if not self._segments:
            return 0
        last = self._segments[-1]
        return max(0, last.first + last.rows - self._since)

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`, counted from `since`.

        Raises:
            CheckpointError: A segment is damaged.
        """
        parts = []
        at, end = start + self._since, stop + self._since
        last = self._segments[-1] if self._segments else None
        if last is None or last.first + last.rows < end:
            self._look()
        while at < end:
            number = bisect.bisect_right([s.first for s in self._segments], at) - 1
            if number < 0:
                raise CheckpointError(f"the journal {self.path} has no row {at}: a file is missing")
            segment = self._segments[number]
            after = end
            if number + 1 < len(self._segments):
                after = self._segments[number + 1].first
                if segment.first + segment.rows < after:  # it has grown since it was the last
                    segment.scan()
            parts.append(segment.read(at, min(end, after)))
            at = min(end, after)
        if len(parts) == 1:
            return parts[0]
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        return Batch(x, y)

    def records(self) -> Iterator[JournalRecord]:
        """All records there are by now, whatever `since`, with their times and tags.

        Raises:
            CheckpointError: A segment is damaged.
        """
        for path in segment_paths(self.path):
            yield from Segment(path).records()

    def row_at(self, time_ns: int) -> int:
        """The first row that came at this time or later; how many there are if none did."""
        paths = segment_paths(self.path)
        for number in range(len(paths) - 1, -1, -1):
            segment = Segment(paths[number])
            rows = segment.first
            for record in segment.records():
                if record.time_ns >= time_ns:
                    rows = record.row
                    break
                rows = record.row + len(record.rows.x)
            if segment.schema is not None and (segment.before_ns < time_ns or not number):
                return rows
        return 0

    def fingerprint(self) -> str:
        """Of the random mark of its first segment, and of `since`; it grows without changing."""
        paths = segment_paths(self.path)
        try:
            start = b""
            if paths:
                with paths[0].open("rb") as file:
                    start = file.read(PREFIX_BYTES)
        except OSError as error:
            raise MissingDataError(f"{paths[0]} cannot be read: {error.strerror}") from error
        return digest(b"journal", start, str(self._since).encode())


def _nanoseconds(time: datetime.datetime) -> int:
    since = time - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1_000
