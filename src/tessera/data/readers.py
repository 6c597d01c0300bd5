"""Data sets from files that nobody vouches for: IDX, npz, and the digits that ship with Tessera.

A header is a claim. What it promises is compared with the file before anything of that size is
allocated, and nothing is ever unpickled.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from tessera.data.batch import Batch
from tessera.errors import InputError, MissingDataError, unknown_name
from tessera.random import permutation

__all__ = ["STREAMS", "read_folder", "read_idx", "read_npy", "read_npz", "read_stream"]

STREAMS = ("digits", "fashion_mnist")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

_DIGITS = Path(__file__).parent / "bundled" / "digits.npz"
_DIGITS_TEST_ROWS = 360
_IDX_UINT8 = 0x08
_IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# Deflate stores at most 258 bytes in 2 bits, so no honest file grows by more than this.
_MOST_DEFLATE_GROWTH = 1032
_NPZ_NAMES = ("x_train", "y_train", "x_test", "y_test")

_Array = npt.NDArray[Any]


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The uint8 array in an IDX file, plain or gzipped.

    Args:
        path: An existing file.

    Returns:
        Read-only array of the shape in the file's header.

    Raises:
        InputError: Another format, or more or fewer bytes than the header promises.

    Source:
        LeCun, Cortes & Burges, "The MNIST database", section "File formats".

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels"
        >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        >>> read_idx(path).tolist()
        [7, 8, 9]
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
    # A gzipped file cannot be measured without unpacking it, but it cannot grow without limit.
    limit = file_bytes * _MOST_DEFLATE_GROWTH if gzipped else file_bytes
    try:
        with gzip.open(path) if gzipped else path.open("rb") as file:
            shape = _idx_shape(file, path)
            promised = math.prod(shape)
            body = file.read(promised + 1) if promised <= limit else b""
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is truncated or damaged ({error}); fetch it again") from error
    if len(body) != promised:
        raise InputError(
            f"{path} is truncated or damaged: its header promises {promised} bytes "
            f"(shape {shape}), the file holds {'more' if len(body) > promised else 'fewer'}; "
            "fetch it again"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _idx_shape(file: gzip.GzipFile | BinaryIO, path: Path) -> tuple[int, ...]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _IDX_UINT8 or not 1 <= magic[3] <= 4:
        raise InputError(
            f"{path} is not an IDX file of uint8: it starts with {magic.hex()!r}, expected "
            "'0000080N' with N the number of dimensions, 1 to 4"
        )
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise InputError(f"{path} is truncated inside its header; fetch it again")
    return struct.unpack(f">{magic[3]}I", sizes)


def read_npz(path: Path, names: Sequence[str]) -> list[_Array]:
    """The arrays called `names` in an npz file, in that order.

    Args:
        path: An existing file, as `numpy.savez` or `numpy.savez_compressed` writes it.
        names: Which arrays to read.

    Returns:
        One array a name.

    Raises:
        InputError: Not an npz file, an array missing, pickled objects inside, or a header that
            promises another size than the file holds.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "some.npz"
        >>> np.savez(path, x=np.arange(3), y=np.ones(2))
        >>> [a.tolist() for a in read_npz(path, ["y", "x"])]
        [[1.0, 1.0], [0, 1, 2]]
    """
    try:
        with zipfile.ZipFile(path) as archive:
            held = {name.removesuffix(".npy") for name in archive.namelist()}
            if lacking := [name for name in names if name not in held]:
                raise InputError(
                    f"{path} needs the arrays {', '.join(names)}; it has no "
                    f"{', '.join(lacking)} (it holds: {', '.join(sorted(held)) or 'nothing'})"
                )
            return [_npz_member(archive, f"{name}.npy", path) for name in names]
    except InputError:
        raise
    # RuntimeError is what zipfile raises for an encrypted member.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not a readable npz file ({error})") from error


def _npz_member(archive: zipfile.ZipFile, name: str, path: Path) -> _Array:
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path}: {name} is packed in a way numpy.savez never uses; save it anew")
    with archive.open(info) as member:
        promised, shape, dtype = _npy_promise(member, f"{path}: {name}")
    most = min(info.compress_size, path.stat().st_size) * _MOST_DEFLATE_GROWTH
    if promised != info.file_size or promised > most:
        raise InputError(
            f"{path}: the header of {name} promises {promised} bytes (shape {shape}, {dtype}), "
            f"the file holds {min(info.file_size, most)}; it is truncated or damaged"
        )
    with archive.open(info) as member:
        array: _Array = np.lib.format.read_array(member, allow_pickle=False)
    return array


def read_npy(raw: bytes, who: str) -> _Array:
    """The array in the bytes of a .npy file, which are measured before anything is allocated.

    Raises:
        InputError: Pickled objects inside, or a header that promises another size.
        ValueError: It is no .npy file.
    """
    promised, shape, dtype = _npy_promise(io.BytesIO(raw), who)
    if promised != len(raw):
        raise InputError(
            f"{who}: its header promises {promised} bytes (shape {shape}, {dtype}), there are "
            f"{len(raw)}; it is truncated or damaged"
        )
    array: _Array = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    return array


def _npy_promise(file: IO[bytes], who: str) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """How many bytes a .npy file has according to its header, and of what."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise InputError(f"{who} has structured columns; save plain arrays")
    if dtype.hasobject:
        raise InputError(f"{who} holds pickled objects, which are never loaded; save numbers")
    return file.tell() + math.prod(shape) * dtype.itemsize, shape, dtype


def read_folder(folder: Path, *, hint: str = "") -> tuple[Batch, Batch]:
    """The training and the test set in a folder.

    It holds either the four IDX files under MNIST's names (`train-images-idx3-ubyte`,
    `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, each plain or
    with `.gz`), or `train.npz` and `test.npz` with the arrays `x` and `y`, or one npz file with
    `x_train`, `y_train`, `x_test` and `y_test`.

    Args:
        folder: Where to look.
        hint: What an error about missing files ends with.

    Returns:
        (train, test), `x` float32 and `y` int64. uint8 images are scaled to [0, 1]; an `x` of
        three dimensions gets a channel: [n, h, w] becomes [n, 1, h, w].

    Raises:
        MissingDataError: No such folder, or a file is missing.
        InputError: A file is damaged, or its values cannot be learned from.
    """
    if not folder.is_dir():
        raise MissingDataError(f"there is no folder {folder}{hint}")
    idx = [_plain_or_gz(folder / name) for name in _IDX_NAMES]
    if any(path is not None for path in idx):
        return _idx_pair(folder, idx, hint)
    pair = (folder / "train.npz", folder / "test.npz")
    if all(path.is_file() for path in pair):
        train, test = (_batch(*read_npz(path, "xy"), where=path) for path in pair)
        return train, _fitting(test, train, folder)
    single = sorted(folder.glob("*.npz"))
    if len(single) == 1 and single[0] not in pair:
        x, y, x_test, y_test = read_npz(single[0], _NPZ_NAMES)
        train = _batch(x, y, where=single[0])
        return train, _fitting(_batch(x_test, y_test, where=single[0]), train, folder)
    raise MissingDataError(
        f"{folder} holds no data set: expected {', '.join(_IDX_NAMES)} (plain or .gz), or "
        f"train.npz and test.npz with x and y, or one .npz with {', '.join(_NPZ_NAMES)}{hint}"
    )


def _plain_or_gz(path: Path) -> Path | None:
    gz = path.with_name(path.name + ".gz")
    return path if path.is_file() else gz if gz.is_file() else None


def _idx_pair(folder: Path, paths: list[Path | None], hint: str) -> tuple[Batch, Batch]:
    found = [path for path in paths if path is not None]
    if len(found) < len(paths):
        absent = [name for name, path in zip(_IDX_NAMES, paths, strict=True) if path is None]
        raise MissingDataError(f"{folder} lacks {', '.join(absent)} (plain or .gz){hint}")
    train, test = (
        _batch(read_idx(images), read_idx(labels), where=images)
        for images, labels in (found[:2], found[2:])
    )
    return train, _fitting(test, train, folder)


def _batch(x: _Array, y: _Array, *, where: Path, white: float = 255.0) -> Batch:
    """Checked tensors; `white` is the brightest value a uint8 image can have."""
    if x.ndim < 2 or 0 in x.shape:
        raise InputError(f"{where}: x needs examples and features [n, ...], got shape {x.shape}")
    if y.ndim != 1 or len(y) != len(x):
        raise InputError(
            f"{where}: x and y differ in length: x has {len(x)} examples (shape {x.shape}), "
            f"y has shape {y.shape}, expected ({len(x)},)"
        )
    if y.dtype.kind not in "iu":
        raise InputError(
            f"{where}: labels must be integers, y is {y.dtype}; save y.astype('int64')"
        )
    labels = y.astype(np.int64)
    if labels.min() < 0:
        raise InputError(f"{where}: labels count from 0, the smallest in y is {labels.min()}")
    if x.dtype == np.uint8:
        values = np.divide(x, np.float32(white), dtype=np.float32)
    elif x.dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(x, dtype=np.float32)
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values).reshape(len(x), -1).all(axis=1)))
            raise InputError(
                f"{where}: x has NaN or infinite values (as float32), first in example {row}; "
                "remove or replace them"
            )
    else:
        raise InputError(f"{where}: x must be uint8 images or floats, it is {x.dtype}")
    if values.ndim == 3:
        values = values[:, np.newaxis]
    return Batch(torch.from_numpy(values), torch.from_numpy(labels))


def _fitting(test: Batch, train: Batch, where: Path) -> Batch:
    if test.x.shape[1:] != train.x.shape[1:]:
        raise InputError(
            f"{where}: training and test examples differ in shape: "
            f"{tuple(train.x.shape[1:])} and {tuple(test.x.shape[1:])}"
        )
    return test


def read_stream(
    stream: str | os.PathLike[str], path: str | os.PathLike[str] | None
) -> tuple[Batch, Batch]:
    """The training and the test set of a named stream or of a folder.

    Args:
        stream: "digits" (ships with Tessera), "fashion_mnist", or a folder (see `read_folder`).
        path: The folder of "fashion_mnist", where it is not Debian's.

    Returns:
        (train, test) as `read_folder` gives them. The 1,797 digits are split 1,437 to 360, the
        same way in every run.

    Raises:
        UnknownNameError: Neither a known name nor a folder.
        MissingDataError, InputError: As `read_folder`.

    Example:
        >>> train, test = read_stream("digits", None)
        >>> train.x.shape, len(test.y)
        (torch.Size([1437, 1, 8, 8]), 360)
    """
    name = os.fspath(stream)
    if name == "fashion_mnist":
        hint = (
            ". Fashion-MNIST comes with Debian's package dataset-fashion-mnist "
            "(apt install dataset-fashion-mnist); or name a folder that has its four IDX files: "
            "path=DIR, on the command line --data DIR"
        )
        return read_folder(Path(path) if path is not None else FASHION_MNIST, hint=hint)
    if path is not None:
        raise InputError(
            f"path={os.fspath(path)!r} is where fashion_mnist lies; for {name!r} leave it out, "
            "or give the folder itself as the stream"
        )
    if name == "digits":
        return _digits()
    if isinstance(stream, str) and os.sep not in name and not Path(name).is_dir():
        raise unknown_name("stream", name, [*STREAMS, "or the path of a folder"])
    return read_folder(Path(name))


def _digits() -> tuple[Batch, Batch]:
    x, y = read_npz(_DIGITS, "xy")
    whole = _batch(x, y, where=_DIGITS, white=16.0)
    # Seed 0 whatever the run's seed: the test set is part of the benchmark, not of the run.
    order = permutation(len(y), 0, "digits")
    test, train = order[:_DIGITS_TEST_ROWS].sort().values, order[_DIGITS_TEST_ROWS:].sort().values
    return Batch(whole.x[train], whole.y[train]), Batch(whole.x[test], whole.y[test])
