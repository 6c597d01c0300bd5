"""Shards from tar files as WebDataset writes them: neighbouring files of one name are a row."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np

from tessera.data.batch import Batch
from tessera.data.formats import file_fingerprint
from tessera.data.readers import read_npy
from tessera.data.shards import as_rows, digest
from tessera.errors import InputError, MissingDataError

__all__ = ["TarShard"]

_MOST_BYTES = 1 << 30


def _npy(raw: bytes) -> Any:
    return read_npy(raw, "the array")


def _whole(raw: bytes) -> Any:
    return np.int64(int(raw.decode("ascii").strip()))


def _json(raw: bytes) -> Any:
    value = json.loads(raw)
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "npy": _npy,
    "cls": _whole,
    "txt": _whole,
    "json": _json,
}


@final
class TarShard:
    """A plain tar file of samples: ``0001.npy``, ``0001.cls``, ``0002.npy``, ...

    Nothing is unpacked to the disk; where each member lies is noted once. Members of a sample
    follow each other and share their name up to the first dot.

    Args:
        path: The file, not compressed.
        x: Extension of the inputs: "npy", or "json" for a list of numbers. None: "npy" or
            "x.npy", else "json".
        y: Extension of the labels: "cls" or "txt" for a whole number in text, "npy", "json".
            None: "cls", else "y.npy", "txt", "json".

    Raises:
        MissingDataError: The file is not there.
        InputError: It is damaged or compressed, or a sample lacks its inputs or label.

    Example:
        >>> import io, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.tar"
        >>> with tarfile.open(path, "w") as tar:
        ...     for name, raw in (("1.json", b"[1.5, 2]"), ("1.cls", b"7")):
        ...         info = tarfile.TarInfo(name)
        ...         info.size = len(raw)
        ...         tar.addfile(info, io.BytesIO(raw))
        >>> TarShard(path).read(0, 1)
        Batch(x=tensor([[1.5000, 2.0000]]), y=tensor([7]))
    """

    def __init__(self, path: str | Path, x: str | None = None, y: str | None = None) -> None:
        self.path, self.name = Path(path), str(path)
        if not self.path.is_file():
            raise MissingDataError(f"the shard {path} is not there; put it back, or leave it out")
        self._named = (x, y)
        samples = self._index()
        held = sorted({extension for sample in samples for extension in sample[1]})
        self._x = x or _first(("npy", "x.npy", "json"), held)
        self._y = y or _first(("cls", "y.npy", "txt", "json"), held)
        if samples and not {self._x, self._y} <= set(held):
            raise InputError(
                f"{path} holds .{', .'.join(held)}; inputs are .npy or .json, labels .cls, .txt, "
                ".npy or .json: name them, TarShard(path, x='npy', y='cls')"
            )
        for extension in (self._x, self._y):
            if extension.rpartition(".")[2] not in _DECODERS:
                raise InputError(f"TarShard reads .{', .'.join(_DECODERS)}, not .{extension}")
        self._places: list[tuple[str, tuple[int, int], tuple[int, int]]] = []
        for name, members in samples:
            for extension in (self._x, self._y):
                if extension not in members:
                    raise InputError(f"{path}: sample {name!r} has no .{extension}")
            self._places.append((name, members[self._x], members[self._y]))

    def _index(self) -> list[tuple[str, dict[str, tuple[int, int]]]]:
        samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
        seen: set[str] = set()
        size = self.path.stat().st_size
        try:
            end = 0
            with tarfile.open(self.path, "r:") as tar, self.path.open("rb") as raw:
                for member in tar:
                    end = member.offset_data + (
                        -(-member.size // 512) * 512 if member.isreg() else 0
                    )
                    if not member.isreg():
                        continue
                    folder, _, file = member.name.rpartition("/")
                    base, _, extension = file.partition(".")
                    name = f"{folder}/{base}"
                    if member.issparse() or member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"member {member.name} is cut off or sparse")
                    if not samples or samples[-1][0] != name:
                        if name in seen:
                            raise tarfile.ReadError(f"the files of {name} are not neighbours")
                        seen.add(name)
                        samples.append((name, {}))
                    if extension in samples[-1][1]:
                        raise tarfile.ReadError(f"{member.name} is there twice")
                    samples[-1][1][extension] = (member.offset_data, member.size)
                raw.seek(end)
                if raw.read(512) != bytes(512):
                    raise tarfile.ReadError("its end mark is missing: it was cut off")
        except (tarfile.TarError, OSError, ValueError) as error:
            raise InputError(
                f"{self.path} is damaged or no plain tar file ({error}); a compressed one must be "
                "unpacked first: gunzip FILE"
            ) from error
        return samples

    def __len__(self) -> int:
        return len(self._places)

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`.

        Raises:
            InputError: A member is no number or array, or of another shape than its neighbours.
        """
        xs: list[Any] = []
        ys: list[Any] = []
        try:
            with self.path.open("rb") as file:
                for name, *places in self._places[start:stop]:
                    for extension, (at, size), into in zip(
                        (self._x, self._y), places, (xs, ys), strict=True
                    ):
                        file.seek(at)
                        raw = file.read(min(size, _MOST_BYTES))
                        into.append(self._decoded(raw, name, extension))
            return as_rows(np.stack(xs), np.stack(ys), self.name)
        except OSError as error:
            raise MissingDataError(f"{self.path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path}: rows {start} .. {stop - 1}: {error}") from error

    def _decoded(self, raw: bytes, name: str, extension: str) -> Any:
        try:
            return _DECODERS[extension.rpartition(".")[2]](raw)
        except (ValueError, EOFError, OSError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(
                f"{self.path}: {name}.{extension} cannot be read ({error}); labels are whole "
                "numbers, arrays are numbers"
            ) from error

    def fingerprint(self) -> str:
        """Of its size and its ends, and of the extensions that were named."""
        of_file = file_fingerprint("tar", [self.path])
        if self._named == (None, None):
            return of_file
        return digest(of_file.encode(), repr(self._named).encode())


def _first(wanted: tuple[str, ...], held: list[str]) -> str:
    return next((extension for extension in wanted if extension in held), wanted[0])
