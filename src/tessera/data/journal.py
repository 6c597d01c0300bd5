"""The journal: rows as they came, appended by a server and read back by a stream.

A journal is a folder of segments, each named by its first row. A segment is a file of records
(`tessera.data.records`): one with the schema, then one a call of `append`.
"""

from __future__ import annotations

import json
import os
import threading
import time as clock
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from tessera.data.checks import is_count
from tessera.data.lock import Lock
from tessera.data.records import RecordWriter
from tessera.data.rows import row_problem
from tessera.data.segments import Segment, encoded, segment_paths
from tessera.data.shards import as_rows
from tessera.errors import InputError, StorageError
from tessera.files import sync_name

__all__ = ["Journal"]

_MOST_TAG_BYTES = 1 << 20


@final
class Journal:
    """An append-only record of rows and when they came, with one writer and any readers.

    What `append` has returned from survives the end of the process at any instant; after `flush`,
    that of the machine. Readers (`Stream.from_journal`, `JournalShard`) need no lock.

    Args:
        path: A folder; created if missing. What a killed writer left half done is cut off.
        segment_bytes: A file that has reached this size is followed by a new one, >= 1.

    Raises:
        InputError: `path` is a file, or a setting is out of range.
        StorageError: Another writer has it, or it cannot be written.
        CheckpointError: It is damaged.

    Example:
        >>> import tempfile, torch
        >>> with Journal(tempfile.mkdtemp()) as journal:
        ...     first = journal.append(torch.zeros(2, 3), torch.tensor([0, 1]))
        ...     second = journal.append(torch.zeros(1, 3), torch.tensor([1]), tags={"who": "a"})
        ...     first, second, journal.rows
        (0, 2, 3)
    """

    def __init__(self, path: str | os.PathLike[str], *, segment_bytes: int = 1 << 28) -> None:
        if not is_count(segment_bytes) or segment_bytes < 1:
            raise InputError(f"Journal needs segment_bytes >= 1, got {segment_bytes!r}")
        self.path = Path(path)
        self._most = segment_bytes
        self._turn = threading.Lock()
        self._rows = self._last_ns = 0
        self._schema: list[list[Any]] | None = None
        self._writer: RecordWriter | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise InputError(f"a journal is a folder, {path} is a file") from error
        except OSError as error:
            raise StorageError(f"could not make the folder {path}: {error.strerror}") from error
        self._lock = Lock(self.path, "the journal")
        try:
            self._reopen()
        except BaseException:
            self._release()
            raise

    def _reopen(self) -> None:
        """Find out what is there; what a killed writer had not finished is cut off."""
        paths = segment_paths(self.path)
        last: Segment | None = None
        for path in reversed(paths):  # a segment whose writer was killed early has no schema
            segment = Segment(path).scan()
            last = last or segment
            if segment.schema is not None:
                self._schema, self._last_ns = segment.schema, segment.last_ns
                break
        if last is not None:
            self._rows = last.first + last.rows
            self._writer = RecordWriter(last.path, last.reader)

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return self._rows

    def append(
        self,
        x: Any,
        y: Any,
        *,
        time: int | None = None,
        tags: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> int:
        """Add rows; any thread may.

        Args:
            x: Tensor or array [n, ...], finite; dtype and row shape as at the first append.
            y: Likewise, as many rows; whole numbers become int64.
            time: When they came, nanoseconds since 1970; None asks the clock. One that goes
                backwards is held: the last time is recorded, with a flag.
            tags: Plain values to find them by.

        Returns:
            The number of the first of them: how many rows there were.

        Raises:
            InputError: They are no such rows; nothing was written.
            StorageError: They could not be written; the journal is as it was.
        """
        rows = as_rows(x, y, "Journal.append")
        schema = [[str(t.dtype).removeprefix("torch."), list(t.shape[1:])] for t in rows]
        for name, value in zip("xy", rows, strict=True):
            if problem := row_problem(value):
                raise InputError(f"Journal.append cannot keep {name}: it {problem}")
        if time is not None and not is_count(time):
            raise InputError(f"Journal.append needs time= in whole nanoseconds, got {time!r}")
        checked = _checked(tags)
        arrays = {name: encoded(value) for name, value in zip("xy", rows, strict=True)}
        with self._turn:
            self._check_open()
            self._check_schema(schema)
            if not len(rows.x):
                return self._rows
            now = clock.time_ns() if time is None else int(time)
            head: dict[str, Any] = {"row": self._rows, "time_ns": max(now, self._last_ns)}
            if now < self._last_ns:
                head["held"] = True
            if checked:
                head["tags"] = checked
            self._ready(schema).append(head, arrays)
            first, self._rows = self._rows, self._rows + len(rows.x)
            self._last_ns = head["time_ns"]
            return first

    def _check_schema(self, schema: list[list[Any]]) -> None:
        for name, own, got in zip("xy", self._schema or schema, schema, strict=True):
            if own != got:
                raise InputError(
                    f"Journal.append got {name} of {got[0]}, rows {got[1]}; the journal "
                    f"{self.path} holds {own[0]}, rows {own[1]}, since its first append; convert "
                    "it, or begin another journal"
                )

    def _ready(self, schema: list[list[Any]]) -> RecordWriter:
        """The segment that the next record goes to."""
        old = self._writer
        if old is None or (old.bytes >= self._most and old.count > 1):
            if old is not None:
                old.sync()  # only the last segment may be torn by a power cut
            self._writer = RecordWriter(self.path / f"journal-{self._rows:016d}.rec")
            sync_name(self._writer.path)
            if old is not None:
                old.close()
        writer = self._writer
        assert writer is not None
        if not writer.count:
            head = {"journal": 1, "schema": schema, "last_ns": self._last_ns}
            writer.append(head, {})
            self._schema = schema
        return writer

    def flush(self) -> None:
        """Have the disk hold what was appended.

        Raises:
            StorageError: It could not; a power cut may lose what came since the last flush.
        """
        with self._turn:
            self._check_open()
            if self._writer is not None:
                self._writer.sync()

    def close(self) -> None:
        """Flush, and let the next writer in. Closing twice is fine.

        Raises:
            StorageError: It could not be flushed; it is closed nevertheless.
        """
        try:
            if self._lock.held:
                self.flush()
        finally:
            self._release()

    def _release(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._lock.close()

    def _check_open(self) -> None:
        if not self._lock.held:
            raise InputError(
                f"the journal {self.path} is not open for writing here: it was closed, or opened "
                "before this process was forked off. Read it with Stream.from_journal"
            )

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _checked(tags: Mapping[str, Any] | None) -> dict[str, Any]:
    """Tags that a record can hold: checked before anything is written, the schema included."""
    try:
        text = json.dumps(dict(tags or {}), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the tags of a journal must be plain JSON: {error}") from error
    if len(text) > _MOST_TAG_BYTES:
        raise InputError(f"the tags of a call have {len(text)} bytes, at most {_MOST_TAG_BYTES}")
    own: dict[str, Any] = json.loads(text)
    return own
