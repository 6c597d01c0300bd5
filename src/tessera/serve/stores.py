"""Where blobs lie: objects under keys, in a folder or in an object store."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from tessera.errors import CheckpointError, InputError, StorageError
from tessera.files import sync_name, write_whole
from tessera.serve.packing import MAX_BYTES

__all__ = ["Folder", "Remote", "Store"]

# Of a store of one's own, beside the server: whoever writes http:// there means it.
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")


class Store(ABC):
    """Objects under keys."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """The object, None where there is none."""

    @abstractmethod
    def write(self, key: str, data: bytes, *, replace: bool) -> bool:
        """Make the object, whole or not at all; False where it is there and may not be replaced."""

    @abstractmethod
    def has(self, key: str) -> bool:
        """Whether there is such an object."""

    @abstractmethod
    def list(self, under: str) -> Iterator[tuple[str, int, float]]:
        """Key, length and time of all objects whose key begins with that folder."""

    @abstractmethod
    def move(self, key: str, to: str) -> None:
        """Give an object another key, and the time of now; nothing where there is none.

        Killed halfway it leaves the object under one of them, or under both.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; nothing where there is none."""


@final
class Folder(Store):
    """A folder of a disk; what `write` has returned from survives a power cut."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: set[Path] = set()
        self._make(root / "sha256")

    def read(self, key: str) -> bytes | None:
        """See `Store`."""
        try:
            # Unbuffered: told to read up to so much, a buffered file makes room for all of that.
            with open(self._root / key, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size > MAX_BYTES:
                    raise CheckpointError(f"the blob {key} has more than {MAX_BYTES} bytes")
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"could not read the blob {key}: {error.strerror}") from error

    def write(self, key: str, data: bytes, *, replace: bool) -> bool:
        """See `Store`."""
        path = self._root / key
        self._make(path.parent)
        if not replace and path.exists():
            return False
        write_whole(path, data, advice="Make room, or restart with other --blobs")
        return True

    def has(self, key: str) -> bool:
        """See `Store`."""
        return (self._root / key).is_file()

    def list(self, under: str) -> Iterator[tuple[str, int, float]]:
        """See `Store`."""
        for path in (self._root / under).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # it was moved meanwhile
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    yield path.relative_to(self._root).as_posix(), found.st_size, found.st_mtime

    def move(self, key: str, to: str) -> None:
        """See `Store`."""
        path, target = self._root / key, self._root / to
        self._make(target.parent)
        try:
            os.utime(path)
            os.replace(path, target)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"could not move the blob {key}: {error.strerror}") from error
        sync_name(target)
        sync_name(path)

    def delete(self, key: str) -> None:
        """See `Store`."""
        try:
            (self._root / key).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"could not delete the blob {key}: {error.strerror}") from error

    def _make(self, folder: Path) -> None:
        """Make a folder and those above it, each name flushed: a file is no safer than its folder.

        Once a process, also where it is there: whoever made it may not have come to flush it yet.
        """
        if folder in self._made:
            return
        missing = [folder]
        while not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        try:
            for path in reversed(missing):
                path.mkdir(exist_ok=True)
                sync_name(path)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"the folder for blobs {folder} could not be made ({error.strerror}). Give "
                "another, or make this one writable"
            ) from error
        self._made.add(folder)


@final
class Remote(Store):
    """What obstore speaks to; credentials are found in the environment."""

    def __init__(self, url: str) -> None:
        try:
            self._store: ObjectStore = from_url(
                url,
                client_options={
                    "connect_timeout": "5s",
                    "timeout": "60s",
                    "allow_http": any(os.environ.get(e, "")[:7] == "http://" for e in _ENDPOINTS),
                },
                # Its own default waits for three minutes, with a request behind it.
                retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=15)},
            )
        except (BaseError, ValueError) as error:
            raise InputError(f"{url} is no place for blobs: {_first(error)}") from error

    def read(self, key: str) -> bytes | None:
        """See `Store`."""
        try:
            found = obstore.get(self._store, key)
            if found.meta["size"] > MAX_BYTES:
                raise CheckpointError(f"the blob {key} has more than {MAX_BYTES} bytes")
            return bytes(found.bytes())
        except FileNotFoundError:
            return None
        except (BaseError, OSError, ValueError) as error:
            raise _away("read", key, error) from error

    def write(self, key: str, data: bytes, *, replace: bool) -> bool:
        """See `Store`."""
        try:
            # A single request, so that it is there whole or not.
            obstore.put(
                self._store,
                key,
                data,
                mode="overwrite" if replace else "create",
                use_multipart=False,
            )
        except AlreadyExistsError:
            return False
        except (BaseError, OSError, ValueError) as error:
            raise _away("write", key, error) from error
        return True

    def has(self, key: str) -> bool:
        """See `Store`."""
        try:
            obstore.head(self._store, key)
        except FileNotFoundError:
            return False
        except (BaseError, OSError, ValueError) as error:
            raise _away("find", key, error) from error
        return True

    def list(self, under: str) -> Iterator[tuple[str, int, float]]:
        """See `Store`."""
        try:
            pages = obstore.list(self._store, under, chunk_size=1000)
            for found in itertools.chain.from_iterable(pages):
                yield found["path"], found["size"], found["last_modified"].timestamp()
        except (BaseError, OSError, ValueError) as error:
            raise _away("list", under, error) from error

    def move(self, key: str, to: str) -> None:
        """See `Store`."""
        try:
            obstore.copy(self._store, key, to)
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return
        except (BaseError, OSError, ValueError) as error:
            raise _away("move", key, error) from error

    def delete(self, key: str) -> None:
        """See `Store`."""
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return
        except (BaseError, OSError, ValueError) as error:
            raise _away("delete", key, error) from error


def _away(what: str, key: str, error: Exception) -> Exception:
    if isinstance(error, CheckpointError):
        return error
    return StorageError(
        f"could not {what} {f'the blob {key}' if key else 'blobs'}: {_first(error)}"
    )


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
