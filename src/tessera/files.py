"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from tessera.errors import StorageError

__all__ = ["sync_name", "write_whole"]

_ABANDONED_S = 3600.0


def write_whole(
    path: str | os.PathLike[str],
    content: bytes | Callable[[BinaryIO], object],
    *,
    advice: str = "Make room or give another path",
) -> None:
    """Put a file at `path` in one step: temporary file, fsync, rename, fsync of the folder.

    A reader, or a process started after a crash, sees the old file or the new one. Missing parents
    are created, a link is followed, and the file keeps the mode of the one it replaces.

    Args:
        path: The file.
        content: Its bytes; or a function that writes them to an open file, which it may seek.
        advice: What the user can do about a failure; the end of its message.

    Raises:
        StorageError: It could not be written; what stood there is unchanged. Or it stands there,
            but its folder could not be flushed, so that a power cut may undo it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(f"{folder}/new/f", b"whole")
        ...     Path(f"{folder}/new/f").read_bytes(), os.listdir(f"{folder}/new")
        (b'whole', ['f'])
    """
    target = Path(os.path.realpath(path))  # replace what a link points to, not the link
    # Short and of our own making: the target's name plus a suffix may be too long for the disk.
    prefix = f".tessera-{zlib.crc32(os.fsencode(target.name)):08x}-"
    temporary = target.parent / f"{prefix}{secrets.token_hex(8)}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent, prefix)
        # A private file stays private when it is written again.
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666
        try:
            with open(temporary, "xb", opener=lambda p, flags: os.open(p, flags, mode)) as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"could not write {os.fspath(path)}: {error.strerror or error}. What stood there is "
            f"unchanged. {advice}"
        ) from error
    sync_name(target, path)


def _sweep(folder: Path, prefix: str) -> None:
    """Remove what a killed process left; a living one keeps touching its temporary file."""
    with contextlib.suppress(OSError):
        for leftover in folder.glob(f"{prefix}*.tmp"):
            if time.time() - leftover.stat().st_mtime > _ABANDONED_S:
                leftover.unlink(missing_ok=True)


def sync_name(file: Path, path: str | os.PathLike[str] | None = None) -> None:
    """Make the name of a new file survive a power cut, not only its bytes.

    Args:
        file: The file.
        path: What the message calls it; None: itself.

    Raises:
        StorageError: Its folder could not be flushed.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "f"
        >>> file.touch()
        >>> sync_name(file)
    """
    if os.name != "posix":  # Windows cannot open a folder
        return
    try:
        descriptor = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(
            f"{os.fspath(path or file)} was written, but its folder could not be flushed to the "
            f"disk ({error.strerror}): it may not survive a power cut. Write it again"
        ) from error
