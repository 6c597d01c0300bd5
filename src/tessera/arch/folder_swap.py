"""A small folder put in the place of another, whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

from tessera.errors import StorageError
from tessera.files import sync_name

__all__ = ["ADAPTER", "CONFIG", "MANIFEST", "aside", "put"]

CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
MANIFEST = "tessera.json"
_README = "README.md"  # PEFT writes one; whoever edited it wants to keep it
_ABANDONED_S = 3600.0
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


def aside(path: Path) -> Path:
    """Where a folder waits while its replacement moves in, on systems that cannot swap two.

    Example:
        >>> aside(Path("/models/a")).parent
        PosixPath('/models')
    """
    target = Path(os.path.realpath(path))
    return target.parent / f"{_prefix(target)}old"


def _prefix(target: Path) -> str:
    return f".tessera-{zlib.crc32(os.fsencode(target.name)):08x}-"


def put(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write a folder of these files beside its place, flush it, and let it take the place.

    Whoever opens the folder, also after a crash, finds the files of one writing.

    Args:
        path: The folder; missing parents are created, a link is followed.
        files: Name -> bytes.

    Raises:
        StorageError: It could not be written, or what is there is no adapter's folder; what stood
            there is unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     put(f"{place}/a", {CONFIG: b"1"})
        ...     put(f"{place}/a", {CONFIG: b"2", MANIFEST: b"3"})
        ...     sorted(os.listdir(f"{place}/a")), os.listdir(place)
        (['adapter_config.json', 'tessera.json'], ['a'])
    """
    target = Path(os.path.realpath(path))
    fresh = target.parent / f"{_prefix(target)}{secrets.token_hex(8)}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _recover(target)
        _require_replaceable(target)
        try:
            _fill(fresh, files, target)
            _take_place(fresh, target)
        finally:
            _remove(fresh)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"could not write {os.fspath(path)}: {error.strerror or error}. What stood there is "
            "unchanged. Make room or give another path"
        ) from error
    sync_name(target, path)


def _recover(target: Path) -> None:
    """Finish or undo what a killed process left half done."""
    old = aside(target)
    if old.is_dir():
        if target.exists():
            _remove(old)
        else:
            os.rename(old, target)
    with contextlib.suppress(OSError):
        for leftover in target.parent.glob(f"{_prefix(target)}*.tmp"):
            if time.time() - leftover.stat().st_mtime > _ABANDONED_S:
                _remove(leftover)


def _require_replaceable(target: Path) -> None:
    """Raise where a replacement would take away what is not the adapter's."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise StorageError(f"{target} is a file, and an adapter is a folder. Give another path")
    others = sorted(set(os.listdir(target)) - {CONFIG, ADAPTER, MANIFEST, _README})
    if others:
        raise StorageError(
            f"{target} holds {others[0]!r}, which is no part of an adapter and would be lost. "
            "Give a path of its own"
        )


def _fill(fresh: Path, files: Mapping[str, bytes], target: Path) -> None:
    fresh.mkdir()
    if target.is_dir():
        fresh.chmod(stat.S_IMODE(target.stat().st_mode))
        if (target / _README).is_file() and not (target / _README).is_symlink():
            files = {**files, _README: (target / _README).read_bytes()}
    for name, content in files.items():
        with open(fresh / name, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    sync_name(fresh / CONFIG)


def _take_place(fresh: Path, target: Path) -> None:
    if not target.exists() or not os.listdir(target):
        if os.name != "posix" and target.exists():
            target.rmdir()
        try:
            os.rename(fresh, target)  # POSIX puts it over an empty folder in one step
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else another writer was faster
        else:
            return
    if not _exchange(fresh, target):
        old = aside(target)
        os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            os.rename(old, target)
            raise
        _remove(old)


def _exchange(fresh: Path, target: Path) -> bool:
    """Swap two folders in one step, where the system can; then `fresh` is the old one."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(fresh), os.fsencode(target)
    if call(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code))


def _remove(folder: Path) -> None:
    """Remove a folder of ours with the files we write; another's files keep it."""
    with contextlib.suppress(OSError):
        for name in (CONFIG, ADAPTER, MANIFEST, _README):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
