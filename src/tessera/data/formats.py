"""Shards from files: safetensors, npy, npz, IDX. Headers are claims, and nothing is unpickled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from safetensors import SafetensorError, safe_open

from tessera.data.batch import Batch
from tessera.data.readers import read_idx, read_npz
from tessera.data.shards import as_rows, digest
from tessera.errors import InputError, MissingDataError

__all__ = ["IdxShard", "NpyShard", "NpzShard", "SafetensorsShard", "file_fingerprint", "partner"]

_ENDS = 4096
_X = re.compile(r"(?<![A-Za-z0-9])x(?![A-Za-z0-9])")


def file_fingerprint(kind: str, paths: Sequence[Path]) -> str:
    """Of the format, and of each file its size, its first and its last bytes.

    Raises:
        MissingDataError: A file is not there.
    """
    parts = [kind.encode()]
    for path in paths:
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                head = file.read(_ENDS)
                file.seek(max(0, size - _ENDS))
                parts += [str(size).encode(), head, file.read(_ENDS)]
        except OSError as error:
            raise _missing(path, error) from error
    return digest(*parts)


def partner(path: Path) -> Path:
    """Where the labels to an x.npy or to IDX images lie.

    Example:
        >>> partner(Path("a/x-007.npy")).name, partner(Path("train-images-idx3-ubyte.gz")).name
        ('y-007.npy', 'train-labels-idx1-ubyte.gz')
    """
    if path.suffix == ".npy":
        return path.with_name(_X.sub("y", path.name, count=1))
    name = path.name.replace("images-idx3", "labels-idx1")
    plain, packed = name.removesuffix(".gz"), name.removesuffix(".gz") + ".gz"
    found = [path.with_name(n) for n in (name, plain, packed) if path.with_name(n).is_file()]
    return found[0] if found else path.with_name(name)


@final
class SafetensorsShard:
    """A safetensors file with the tensors x and y; rows are read when they are asked for.

    Raises:
        MissingDataError: The file is not there.
        InputError: It is damaged, or has no x and y of as many rows.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        _present(path)
        try:
            file: Any = safe_open(path, framework="pt")
            names = set(file.keys())
            if not {"x", "y"} <= names:
                raise InputError(f"{path} needs tensors x and y, it holds {sorted(names)}")
            self._x, self._y = file.get_slice("x"), file.get_slice("y")
            shapes = [list(s.get_shape()) for s in (self._x, self._y)]
            if not all(shapes) or shapes[0][0] != shapes[1][0]:
                raise InputError(
                    f"{path}: x and y must be rows [n, ...], as many, got {shapes[0]}, {shapes[1]}"
                )
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is no readable safetensors file ({error})") from error
        self._count: int = shapes[0][0]

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`."""
        return as_rows(self._x[start:stop], self._y[start:stop], self.name)

    def fingerprint(self) -> str:
        """Of its size and its ends."""
        return file_fingerprint("safetensors", [self.path])


@final
class NpyShard:
    """Two .npy files, x and y, mapped into memory.

    Raises:
        MissingDataError: One is not there.
        InputError: One is damaged, holds pickled objects, or they differ in rows.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._paths = [path, partner(path)]
        if self._paths[0] == self._paths[1]:
            raise InputError(
                f"{path} is neither x nor y: pairs of .npy files are called x.npy and y.npy, or "
                "x-NAME.npy and y-NAME.npy"
            )
        self._x, self._y = (self._mapped(p) for p in self._paths)
        if not self._x.ndim or not self._y.ndim or len(self._x) != len(self._y):
            raise InputError(
                f"{path}: x and y must be rows [n, ...], as many, got {list(self._x.shape)} and "
                f"{list(self._y.shape)} in {self._paths[1].name}"
            )

    def _mapped(self, path: Path) -> Any:
        _present(path)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError, SyntaxError) as error:
            raise InputError(
                f"{path} is truncated, damaged, or no .npy file of numbers ({error})"
            ) from error
        if not isinstance(array, np.ndarray):
            array.close()
            raise InputError(f"{path} is an npz file called .npy; rename it")
        return array

    def __len__(self) -> int:
        return len(self._x)

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`."""
        return as_rows(self._x[start:stop], self._y[start:stop], self.name)

    def fingerprint(self) -> str:
        """Of the sizes and the ends of both."""
        return file_fingerprint("npy", self._paths)


@final
class NpzShard:
    """An npz file with the arrays x and y, read whole and checked when it is opened.

    Raises:
        MissingDataError: The file is not there.
        InputError: It is damaged, holds pickled objects, or has no x and y of as many rows.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        _present(path)
        x, y = read_npz(path, "xy")
        self._rows = as_rows(x, y, self.name)

    def __len__(self) -> int:
        return len(self._rows.x)

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`, as a view."""
        return Batch(self._rows.x[start:stop], self._rows.y[start:stop])

    def fingerprint(self) -> str:
        """Of its size and its ends."""
        return file_fingerprint("npz", [self.path])


@final
class IdxShard:
    """A pair of IDX files as MNIST's, images uint8 [n, h, w] and labels, plain or gzipped.

    Raises:
        MissingDataError: One is not there.
        InputError: One is damaged, or they differ in rows.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._paths = [path, partner(path)]
        if self._paths[0] == self._paths[1]:
            raise InputError(f"{path} holds labels, and the images to them are not beside it")
        for p in self._paths:
            _present(p)
        x, y = (read_idx(p) for p in self._paths)
        self._rows = as_rows(x, y, self.name)

    def __len__(self) -> int:
        return len(self._rows.x)

    def read(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`, as a view."""
        return Batch(self._rows.x[start:stop], self._rows.y[start:stop])

    def fingerprint(self) -> str:
        """Of the sizes and the ends of both."""
        return file_fingerprint("idx", self._paths)


def _present(path: Path) -> None:
    if not path.is_file():
        raise MissingDataError(f"the shard {path} is not there; put it back, or leave it out")


def _missing(path: Path, error: OSError) -> MissingDataError:
    return MissingDataError(f"the shard {path} cannot be read ({error.strerror}); put it back")
