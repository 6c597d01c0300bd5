"""What the files of a durable replay store say: a manifest, and records of changes by slot.

A record holds "slots", what the policy knows of them ("known/..."), and the rows of the last of
them ("rows/..."): an update of priorities has fewer rows than slots, an addition as many. Its head
has the counters. The records of the generations that the manifest names, in order, give the state;
no policy is needed to read them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tessera.data.records import Record, RecordReader
from tessera.data.rows import Column, Index
from tessera.errors import CheckpointError
from tessera.files import write_whole

__all__ = ["MANIFEST", "Image", "read_manifest", "schema_of", "write_manifest"]

MANIFEST = "manifest.json"
_VERSION = 1
_DTYPES = {str(d)[6:]: d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_MOST_ELEMENTS = 1 << 40
_ROWS_AT_ONCE = 4096


def write_manifest(folder: Path, settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """Say which generations count, oldest first; one step, flushed to the disk.

    Raises:
        StorageError: It could not be written.
    """
    content = {
        "store": "tessera replay",
        "version": _VERSION,
        "settings": dict(settings),
        "generations": list(names),
    }
    write_whole(folder / MANIFEST, json.dumps(content | {"checksum": _checksum(content)}).encode())


def read_manifest(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings of the store in this folder, and its generations.

    Raises:
        CheckpointError: There is none, it is damaged, or of a newer version.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{folder} is no replay store: {MANIFEST} cannot be read ({error.strerror}). Give the "
            "path of a folder that ReplayBuffer made, or of none yet"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Restore it from a copy") from error
    if not isinstance(content, dict) or content.get("store") != "tessera replay":
        raise CheckpointError(f"{path} is not of a replay store")
    if content.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has version {content.get('version')!r}, this Tessera reads {_VERSION}; "
            "install a newer one"
        )
    checksum = content.pop("checksum", None)
    try:
        settings, names = dict(content["settings"]), list(content["generations"])
        intact = checksum == _checksum(content) and names == sorted(set(names))
        intact = intact and all(_number(name) >= 0 for name in names)
    except (KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is damaged: it does not have its checksum. Restore a copy")
    return settings, names


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _number(name: str) -> int:
    """Of a generation file.

    Raises:
        ValueError: It is no such name.
    """
    if len(name) != 12 or not name[:8].isdigit() or not name.endswith(".rec"):
        raise ValueError(name)
    return int(name[:8])


def schema_of(columns: Sequence[Column]) -> list[list[Any]] | None:
    """Dtype and row shape of each column, as JSON; None before the first row."""
    return [[str(c.dtype)[6:], list(c.row_shape)] for c in columns] or None


@final
class Image:
    """The state that records give, with the rows left in the mapped files.

    Args:
        settings: Of the store.

    Attributes:
        names: Of the generations read.
        readers: By their names.
        sweep: [slots logged again, slots to log] in the last generation: it stands alone when
            these are equal.
        counters: "seen", "draws", "carry"; empty before the first record.
        schema: As `schema_of`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.fields: list[str] = settings["fields"]
        self.names: list[str] = []
        self.readers: dict[str, RecordReader] = {}
        self.sweep = [0, 0]
        self.counters: dict[str, Any] = {}
        self.schema: list[list[Any]] | None = None
        self._capacity: int = settings["capacity"]
        self._rule: dict[str, Any] = {}
        self._known: dict[str, npt.NDArray[Any]] = {}
        # Of each slot: the number of the generation its row is in (0: in none), and where there.
        self._number = np.zeros(self._capacity, np.int64)
        self._starts: list[npt.NDArray[np.int64]] = []

    @property
    def seen(self) -> int:
        """Rows ever added."""
        return int(self.counters.get("seen", 0))

    @property
    def held(self) -> int:
        """How many of them there are, in the first slots."""
        return min(self.seen, self._capacity)

    def follow(self, folder: Path, names: list[str]) -> None:
        """Take in what these generations say beyond what was read of them.

        Args:
            folder: They are in it.
            names: As the manifest has them; the first was read before, or stands alone.

        Raises:
            CheckpointError: One is missing or damaged; this image is of no more use.
        """
        readers: dict[str, RecordReader] = {}
        before: RecordReader | None = None
        for name in names:
            path = folder / name
            reader = readers[name] = self.readers.get(name) or RecordReader(path)
            for record in reader:
                if record.sequence == 0:
                    self._begin(record, before, path)
                self._take(record, _number(name), path)
            if not reader.count:
                raise CheckpointError(f"{path} is damaged: its first record cannot be read")
            before = reader
        self.names, self.readers = names, readers
        if not np.isin(self._number[: self.held], [_number(name) for name in names]).all():
            raise CheckpointError(
                f"{folder} is damaged: {names} do not hold all {self.held} rows. Restore a copy"
            )

    def _begin(self, record: Record, before: RecordReader | None, path: Path) -> None:
        """Check that a generation follows on the end of the one before it."""
        expected = None if before is None else [before.path.name, before.count, before.stop]
        after = record.head.get("after")
        if expected and (after != expected or (before and before.torn_bytes)):
            raise CheckpointError(
                f"{_folder_of(before)} is damaged: {expected} are its whole records and bytes, "
                f"{path.name} was begun after {after}. Restore it from a copy"
            )
        self._rule = {}

    def _take(self, record: Record, number: int, path: Path) -> None:
        try:
            self._apply(record, number)
        except (
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            OverflowError,
        ) as error:
            raise CheckpointError(
                f"{path}: record {record.sequence} has its checksum and is no change of a replay "
                f"buffer with {self.settings} ({type(error).__name__}: {error})"
            ) from error

    def _apply(self, record: Record, number: int) -> None:
        head, arrays = record.head, record.arrays
        if "schema" in head:
            self._set_schema(head["schema"])
        counters = {name: head[name] for name in ("seen", "draws", "carry")}
        sweep = [int(n) for n in head["sweep"]]
        seen, slots = counters["seen"], arrays["slots"]
        if type(seen) is not int or seen < 0 or slots.dtype != np.int64 or slots.ndim != 1:
            raise ValueError("counters or slots")
        if len(slots) and not 0 <= slots.min() <= slots.max() < min(seen, self._capacity):
            raise ValueError(f"slots {slots.min()} .. {slots.max()}")
        for name, values in arrays.items():
            if name.startswith("known/"):
                known = self._known.get(name[6:])
                if known is None:
                    known = self._known[name[6:]] = np.zeros(self._capacity, values.dtype)
                if values.dtype != known.dtype or values.shape != slots.shape:
                    raise ValueError(name)
                known[slots] = values
        for field, kind, starts in zip(self.fields, self.schema or (), self._starts, strict=False):
            rows = arrays[f"rows/{field}"]
            word, width = _layout(kind)
            count = len(arrays[f"rows/{self.fields[0]}"])
            if rows.dtype != word or rows.shape != (count, width) or count > len(slots):
                raise ValueError(f"rows/{field}")
            moved = slots[len(slots) - count :]
            step = width * word.itemsize
            starts[moved] = record.starts[f"rows/{field}"] + np.arange(count) * step
            self._number[moved] = number
        for name, value in head["rule"].items():
            if isinstance(value, dict):  # of one with whole numbers as keys, what has changed
                value = self._rule.get(name, {}) | {int(k): int(v) for k, v in value.items()}
            self._rule[name] = value
        self.counters, self.sweep = counters, sweep

    def _set_schema(self, schema: list[list[Any]] | None) -> None:
        if schema is not None:
            for kind in schema:
                _layout(kind)
            if len(schema) != len(self.fields):
                raise ValueError("schema")
        if schema != self.schema:
            self.schema = schema
            self._starts = [np.zeros(self._capacity, np.int64) for _ in schema or ()]

    def state(self) -> tuple[dict[str, Any], tuple[Column, ...]]:
        """As `ReplayBuffer.state_dict` has it, and the columns whose memory its rows share."""
        columns, rows = [], {}
        for name, kind in zip(self.fields, self.schema or (), strict=False):
            word, width = _layout(kind)
            store = np.empty((self._capacity, width), word)
            column = Column(dtype=_DTYPES[kind[0]], row_shape=tuple(kind[1]), store=store)
            columns.append(column)
            shared = torch.from_numpy(store[: self.held].reshape(self.held, *kind[1]))
            rows[name] = shared.view(column.dtype)
        for start in range(0, self.held, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, self.held)
            for field, column in enumerate(columns):
                column.store[start:stop] = self._words(field, np.arange(start, stop))
        known = {
            name: torch.from_numpy(
                array[: self.held].view(np.int64)
                if array.dtype == np.uint64
                else array[: self.held]
            )
            for name, array in self._known.items()
        }
        state = {**self.settings, **self.counters, "slots": known, "rule": self._rule, "rows": rows}
        return state, tuple(columns)

    def rows(self, index: Index) -> tuple[Tensor, ...]:
        """A copy of the rows in these slots, a tensor [n, ...] a field."""
        return tuple(
            torch.from_numpy(self._words(field, index).reshape(len(index), *kind[1])).view(
                _DTYPES[kind[0]]
            )
            for field, kind in enumerate(self.schema or ())
        )

    def _words(self, field: int, index: Index) -> npt.NDArray[Any]:
        """The rows of a field in these slots, as the integers that the file holds."""
        assert self.schema is not None
        word, width = _layout(self.schema[field])
        out = np.empty((len(index), width), word)
        numbers, starts = self._number[index], self._starts[field][index] // word.itemsize
        for name in self.names:
            here = np.flatnonzero(numbers == _number(name))
            if len(here):
                mapped = self.readers[name].mapped
                size = word.itemsize
                # Every place in the file as if a row started there; those that do are taken.
                windows: npt.NDArray[Any] = np.ndarray(
                    (len(mapped) // size - width + 1, width), word, mapped, 0, (size, size)
                )
                out[here] = windows[starts[here]]
        return out


def _folder_of(reader: RecordReader | None) -> str:
    return "" if reader is None else str(reader.path)


def _layout(kind: list[Any]) -> tuple[np.dtype[Any], int]:
    """The words of a row and how many there are.

    Raises:
        ValueError: No field is like that.
    """
    name, shape = kind
    if name not in _DTYPES or not all(type(n) is int and 0 < n < _MOST_ELEMENTS for n in shape):
        raise ValueError(f"rows of {name!r} {str(shape)[:80]}")
    width = 1
    for n in shape:
        width *= n
    if width > _MOST_ELEMENTS:
        raise ValueError(f"rows of {width} elements")
    return np.dtype(f"<i{_DTYPES[name].itemsize}"), width
