"""Append-only files of records, each whole or not there: the durable store and the journal.

A file starts with what it is and a random mark of its own, 24 bytes. A record is a fixed header
that starts with the mark, a head of JSON and a body of arrays; one checksum guards the header, one
the rest. No data can look like a record, since no data knows the mark. What a killed writer left
half done at the end is cut off by the next one. A damaged record that has whole ones after it was
acknowledged once: it is never skipped, the file is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from tessera.data.lock import Lock
from tessera.errors import CheckpointError, InputError, StorageError

__all__ = ["Lock", "Record", "RecordReader", "RecordWriter"]

_FILE = b"TESSREC\x01"
# What it is, its mark, the checksum of both, nothing.
_PREFIX = struct.Struct("<8s8sI4x")
# The file's mark, sequence number, length of the body, of the head, checksum of head and body; then
# the checksum of these, so that a length is believed before what it measures has been read.
_HEADER = struct.Struct("<8sQQII")
_HEADER_BYTES = _HEADER.size + 8  # the checksum, and 4 bytes so that arrays are aligned
_MOST_HEAD_BYTES = 1 << 24
_CHUNK = 1 << 20
_KINDS = {f"{kind}{size}" for kind, sizes in {"i": "1248", "u": "1248", "f": "248"}.items()
          for size in sizes}  # fmt: skip

Array = npt.NDArray[Any]


class Record(NamedTuple):
    """One record as it was read.

    Attributes:
        sequence: 0, 1, 2, ... in the file.
        head: What `RecordWriter.append` was given.
        arrays: Likewise; read-only views of the mapped file.
        stop: Where in the file it ends, in bytes.
        starts: Where in the file each array starts, in bytes; a multiple of 8.
    """

    sequence: int
    head: dict[str, Any]
    arrays: dict[str, Array]
    stop: int
    starts: dict[str, int]


@final
class RecordReader:
    """The whole records of a file, from the first.

    Args:
        path: As `RecordWriter` writes it; it may be growing.

    Raises:
        CheckpointError: It is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        """How many whole records were read."""
        self.stop = _PREFIX.size
        """Where the last of them ends, in bytes."""
        self._size = 0
        with _opened(path) as file:
            self._mark = _mark_of(path, os.pread(file, _PREFIX.size, 0))
            self._look(file)

    def __iter__(self) -> Iterator[Record]:
        """The records that were not given yet, up to the first that is not whole.

        Raises:
            CheckpointError: A record is damaged and whole ones follow it.
        """
        with _opened(self.path) as file:
            self._look(file)
            while True:
                while (record := self._read(file, self.stop)) is not None:
                    if record.sequence != self.count:
                        raise CheckpointError(
                            f"{self.path} is damaged: record {record.sequence} stands where record "
                            f"{self.count} belongs"
                        )
                    self.count, self.stop = self.count + 1, record.stop
                    yield record
                # Read once more: a writer may just have replaced what it had failed to write.
                if not self._follows(file) or self._read(file, self.stop) is None:
                    break
            if self._follows(file):
                raise CheckpointError(
                    f"{self.path} is damaged at byte {self.stop}: record {self.count} cannot be "
                    "read, and whole ones follow it. Restore the file from a copy"
                )

    @property
    def torn_bytes(self) -> int:
        """Bytes after the last whole record, as far as was read."""
        return self._size - self.stop

    @property
    def mapped(self) -> npt.NDArray[np.uint8]:
        """The file as it was when it was last read; only whole records never change in it."""
        return np.frombuffer(self._map, np.uint8)

    def _look(self, file: int) -> None:
        """How long the file is by now. What a writer appends later is not looked at."""
        size = os.fstat(file).st_size
        if size < self.stop:
            raise CheckpointError(
                f"{self.path} has {size} bytes, and had {self.stop}; restore it from a copy"
            )
        if size != self._size:
            self._size = size
            self._map = mmap.mmap(file, size, access=mmap.ACCESS_READ)

    def _follows(self, file: int) -> bool:
        """Whether a whole record starts after a place where none can be read."""
        at = self.stop + 1
        while at < self._size:
            # The file is read, not touched in the map: what is torn may be cut off at any time.
            chunk = os.pread(file, _CHUNK, at)
            found = chunk.find(self._mark)
            while found >= 0:
                if self._read(file, at + found) is not None:
                    return True
                found = chunk.find(self._mark, found + 1)
            if len(chunk) < _CHUNK:
                break
            at += _CHUNK - len(self._mark)  # a mark may lie across two chunks
        return False

    def _read(self, file: int, start: int) -> Record | None:
        """The record at `start`; None where none is whole."""
        body = start + _HEADER_BYTES
        if body > self._size:
            return None
        # Most records are small: one read for all of it.
        first = os.pread(file, 1 << 14, start)
        fixed = first[: _HEADER.size]
        if len(first) < _HEADER_BYTES or first[_HEADER.size : _HEADER_BYTES] != _checked(fixed):
            return None
        mark, sequence, body_bytes, head_bytes, checksum = _HEADER.unpack(fixed)
        stop = body + head_bytes + body_bytes
        if mark != self._mark or head_bytes > _MOST_HEAD_BYTES or stop > self._size:
            return None
        found = zlib.crc32(memoryview(first)[_HEADER_BYTES : stop - start])
        for at in range(start + len(first), stop, _CHUNK):
            found = zlib.crc32(os.pread(file, min(_CHUNK, stop - at), at), found)
        if found != checksum:
            return None
        try:
            head = json.loads(self._map[body : body + head_bytes])
            arrays, starts = self._arrays(head.pop("arrays"), body + head_bytes, body_bytes)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path}: record {sequence} has its checksum and is no record of Tessera's "
                f"({type(error).__name__}: {error})"
            ) from error
        return Record(sequence, head, arrays, stop, starts)

    def _arrays(
        self, listed: list[list[Any]], start: int, size: int
    ) -> tuple[dict[str, Array], dict[str, int]]:
        arrays: dict[str, Array] = {}
        starts: dict[str, int] = {}
        at = 0
        if start % 8:
            raise ValueError("its arrays are not aligned")
        for name, kind, shape in listed:
            if kind not in _KINDS or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
                raise ValueError(f"array {name!r} of {kind!r} {str(shape)[:80]}")
            if not isinstance(name, str) or name in arrays or len(shape) > 32:
                raise ValueError(f"array {name!r} twice, or of {len(shape)} dimensions")
            dtype = np.dtype(f"<{kind}")
            count = math.prod(shape)
            if at + count * dtype.itemsize > size:
                raise ValueError(f"array {name!r} of {kind} {shape} is longer than the record")
            arrays[name] = np.frombuffer(self._map, dtype, count, start + at).reshape(shape)
            starts[name] = start + at
            at += _padded(count * dtype.itemsize)
        if at != size:
            raise ValueError(f"its arrays have {at} bytes, its body {size}")
        return arrays, starts


@final
class RecordWriter:
    """Appends records to a file, after what is whole in it.

    A record that `append` has returned from survives the end of the process at any instant; after
    `sync`, that of the machine too.

    Args:
        path: Created if missing; what follows its last whole record is cut off.
        after: One that has read the file to its end; None reads it now.

    Raises:
        CheckpointError: It is no such file, or damaged before its end.
        StorageError: It cannot be opened or cut.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "some.rec"
        >>> writer = RecordWriter(path)
        >>> writer.append({"who": "me"}, {"x": np.arange(3)})
        >>> writer.close()
        >>> [(r.sequence, r.head, r.arrays["x"].tolist()) for r in RecordReader(path)]
        [(0, {'who': 'me'}, [0, 1, 2])]
    """

    def __init__(self, path: Path, after: RecordReader | None = None) -> None:
        self.path = path
        self.count = 0
        """How many records the file holds."""
        self.bytes = 0
        """How long they are, with what stands before them."""
        self._torn = False  # whether more than `bytes` may be in the file
        self._synced = True  # whether every `sync` went well
        self._file = -1
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            size = os.fstat(self._file).st_size
            start = os.pread(self._file, len(_FILE), 0)
            if size < _PREFIX.size and start == _FILE[:size]:
                if size:
                    os.ftruncate(self._file, 0)
                mark = secrets.token_bytes(8)
                fixed = _FILE + mark
                self._write([fixed + _checked(fixed)])
            else:
                if after is None:
                    after = RecordReader(path)
                    for _ in after:
                        pass
                mark = after._mark
                self.count, self.bytes = after.count, after.stop
                os.ftruncate(self._file, self.bytes)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise StorageError(f"could not open {path}: {error.strerror}") from error
            raise
        self._mark = mark

    def append(self, head: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Add a record.

        Args:
            head: Plain values, as JSON has them; not "arrays".
            arrays: Numbers of up to 8 bytes each, by name.

        Raises:
            InputError: A head that is no JSON, or an array of another kind. Nothing was written.
            StorageError: It could not be written whole; the file is as it was.
        """
        parts: list[Any] = []
        listed = []
        for name, array in arrays.items():
            kind = f"{array.dtype.kind}{array.dtype.itemsize}"
            if kind not in _KINDS:
                raise InputError(f"a record holds arrays of numbers, {name} is {array.dtype}")
            listed.append([name, kind, list(array.shape)])
            flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
            if flat.size:
                parts.append(flat.view(np.uint8).data)
                parts.append(bytes(_padded(flat.nbytes) - flat.nbytes))
        if "arrays" in head:
            raise InputError("the head of a record has its arrays under 'arrays'; rename yours")
        try:
            text = json.dumps(
                {**head, "arrays": listed}, allow_nan=False, separators=(",", ":")
            ).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the head of a record must be plain JSON: {error}") from error
        text += b" " * (_padded(len(text)) - len(text))  # so that the arrays are aligned
        if len(text) > _MOST_HEAD_BYTES:
            raise InputError(f"the head of a record has {len(text)} bytes, most {_MOST_HEAD_BYTES}")
        checksum = zlib.crc32(text)
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        body_bytes = sum(len(part) for part in parts)
        fixed = _HEADER.pack(self._mark, self.count, body_bytes, len(text), checksum)
        self._write([fixed + _checked(fixed) + text, *parts], records=1)

    def _write(self, parts: list[Any], records: int = 0) -> None:
        """All of it, or the file as it was."""
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        at, stop = self.bytes, self.bytes + sum(map(len, views))
        try:
            if self._torn:
                os.ftruncate(self._file, self.bytes)
        except OSError as error:
            raise self._failed(error) from error
        self._torn = True
        try:
            while views:
                done = os.pwritev(self._file, views[:512], at)
                at += done
                while views and done >= len(views[0]):
                    done -= len(views.pop(0))
                if done:
                    views[0] = views[0][done:]
        except BaseException as error:
            with contextlib.suppress(OSError):
                # An interrupt may come when all is written: a reader may have seen it by now.
                if os.fstat(self._file).st_size == stop:
                    self.bytes, self.count, self._torn = stop, self.count + records, False
                else:
                    os.ftruncate(self._file, self.bytes)
                    self._torn = False
            if not isinstance(error, OSError):
                raise
            raise self._failed(error) from error
        self.bytes, self.count, self._torn = stop, self.count + records, False

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"could not write to {self.path}: {error.strerror}. What was acknowledged before is "
            "there; make room, then add again"
        )

    def sync(self) -> None:
        """Have the system put on disk what was appended.

        Raises:
            StorageError: It could not; a power cut may now lose what was appended since the last.
                The system forgets what it failed to write, so this goes on until it is reopened.
        """
        try:
            if self._synced:
                self._synced = False
                os.fsync(self._file)
                self._synced = True
                return
            why = "an earlier flush failed"
        except OSError as error:
            why = str(error.strerror)
        raise StorageError(
            f"could not flush {self.path}: {why}. A power cut may lose what was added since the "
            "last flush; see to the disk, then close and open it again"
        )

    def close(self) -> None:
        """Free the file; more cannot be appended."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:
        self.close()


def _checked(fixed: bytes) -> bytes:
    """The checksum that stands behind these bytes, filled up to 8."""
    return zlib.crc32(fixed).to_bytes(8, "little")


def _mark_of(path: Path, prefix: bytes) -> bytes:
    """The mark of the file that starts with these bytes."""
    known, intact = prefix[: len(_FILE)] == _FILE, prefix[16:] == _checked(prefix[:16])
    if known and intact and len(prefix) == _PREFIX.size:
        return prefix[8:16]
    what = "is damaged in its first bytes" if known else "is no file of Tessera records"
    raise CheckpointError(f"{path} {what}; it starts with {prefix[:16]!r}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        yield file
    finally:
        os.close(file)


def _padded(size: int) -> int:
    return -(-size // 8) * 8
