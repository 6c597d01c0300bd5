"""What was given to a stream as its shards, as a list of things to open one after the other."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.formats import (
    IdxShard,
    NpyShard,
    NpzShard,
    SafetensorsShard,
    file_fingerprint,
    partner,
)
from tessera.data.segments import JournalShard, is_journal
from tessera.data.shards import MemoryShard, Shard
from tessera.data.tables import DatasetShard, ParquetShard
from tessera.data.tar import TarShard
from tessera.errors import InputError, MissingDataError

__all__ = ["Item", "items_of"]

_KINDS: dict[str, Callable[[Path], Shard]] = {
    "safetensors": SafetensorsShard,
    "npy": NpyShard,
    "npz": NpzShard,
    "idx": IdxShard,
    "parquet": ParquetShard,
    "tar": TarShard,
    "journal": JournalShard,
}
_FORMATS = (
    ".safetensors, .npz, .npy in pairs (x.npy, y.npy), .parquet, .tar, IDX (*-images-idx3-ubyte "
    "and *-labels-idx1-ubyte, plain or .gz), or a journal's folder"
)


class Item(NamedTuple):
    """A shard that may not be open yet.

    Attributes:
        name: As messages and states call it; of a file its name without the folder.
        open: Opens it.
        fingerprint: Its fingerprint; of a file without opening it.
        path: Of a file, for the order of files that come later.
    """

    name: str
    open: Callable[[], Shard]
    fingerprint: Callable[[], str]
    path: Path | None = None


def items_of(shards: Any, *, follow: bool) -> list[Item]:
    """The shards in order: a path, a shard, rows in memory, a data set, or a list of these.

    Args:
        shards: As `Stream` takes them.
        follow: Whether there may be nothing yet, or half of a pair.

    Raises:
        InputError: Something is none of these.
        MissingDataError: A path has no shards.
    """
    if _is_one(shards):
        return list(_items(shards, follow, 0))
    if isinstance(shards, list | tuple):
        return [item for i, one in enumerate(shards) for item in _items(one, follow, i)]
    if isinstance(shards, Iterable):
        raise InputError(
            f"a Stream reads a list of shards, got {type(shards).__name__}; rows (x, y) from an "
            "iterator: Stream([data.IterableShard(rows)], ...)"
        )
    raise InputError(f"a Stream reads shards, got {type(shards).__name__}; give a path or a list")


def _is_one(given: Any) -> bool:
    return isinstance(given, str | os.PathLike | Batch | Shard) or _is_pair(given) or _is_set(given)


def _is_pair(given: Any) -> bool:
    arrays = Tensor | np.ndarray
    return (
        isinstance(given, tuple) and len(given) == 2 and all(isinstance(a, arrays) for a in given)
    )


def _is_set(given: Any) -> bool:
    return hasattr(given, "column_names") and hasattr(given, "__getitem__")


def _items(one: Any, follow: bool, number: int) -> Iterator[Item]:
    if isinstance(one, str | os.PathLike):
        yield from (_file(path) for path in _files(os.fspath(one), follow))
        return
    if isinstance(one, Batch) or _is_pair(one):
        shard: Shard = MemoryShard(*one)
    elif isinstance(one, Shard):
        shard = one
    elif _is_set(one):
        shard = DatasetShard(one)
    else:
        raise InputError(
            f"shard {number} of a Stream is {type(one).__name__}; give a path, a Batch, (x, y) of "
            "tensors or arrays, or an object with __len__, read(start, stop) and fingerprint()"
        )
    # Of a file the name without its folder, so that both may move.
    name = getattr(shard, "name", type(shard).__name__)
    if isinstance(path := getattr(shard, "path", None), Path):
        name = path.name
    yield Item(f"{number}: {name}", lambda: shard, shard.fingerprint)


def _file(path: Path) -> Item:
    kind = _kind(path)
    if kind is None:
        raise InputError(f"{path} is no shard of a known format: {_FORMATS}")
    open_ = _KINDS[kind]
    if kind == "journal":
        return Item(path.name, lambda: open_(path), lambda: open_(path).fingerprint(), path)
    paths = [path, partner(path)] if kind in ("npy", "idx") else [path]
    return Item(path.name, lambda: open_(path), lambda: file_fingerprint(kind, paths), path)


def _files(given: str, follow: bool) -> list[Path]:
    """The files that a path, a folder or a glob names, in sorted order."""
    path = Path(given)
    if path.is_file() or (path.is_dir() and is_journal(path)):
        return [path]
    if path.is_dir():
        names = [path / name for name in sorted(os.listdir(path))]
        found = [p for p in names if _kind(p) is not None]
        what = f"the folder {given} holds {', '.join(p.name for p in names[:5]) or 'nothing'}"
    elif glob.has_magic(given):
        found = sorted(Path(p) for p in glob.glob(given, recursive=True))
        what = f"no file is called {given}"
    else:
        raise MissingDataError(f"there are no shards at {given}: no such file or folder")
    whole = [p for p in found if not (p.name.startswith(".") or p.name.endswith(".tmp"))]
    pairs = {p: partner(p) for p in whole if _kind(p) in ("npy", "idx")}
    second = {b for a, b in pairs.items() if a != b}
    whole = [p for p in whole if p not in second]
    if follow:  # of a pair whose other half is still being written, neither is there yet
        whole = [p for p in whole if p not in pairs or (p != pairs[p] and pairs[p].is_file())]
    if not whole and not follow:
        raise MissingDataError(f"{what}; a Stream reads {_FORMATS}")
    return whole


def _kind(path: Path) -> str | None:
    if path.is_dir():
        return "journal" if is_journal(path) else None
    if path.name.startswith(".") or path.name.endswith(".tmp"):
        return None
    if "images-idx3-ubyte" in path.name or "labels-idx1-ubyte" in path.name:
        return "idx"
    suffix = path.suffix.lower().removeprefix(".")
    return suffix if suffix in _KINDS and suffix not in ("idx", "journal") else None
