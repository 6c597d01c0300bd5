"""Blobs: bytes under the sha256 of their content, written once, on a disk or in an object store."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from datetime import timedelta
from pathlib import Path
from typing import final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from tessera.errors import CheckpointError, InputError, MissingDataError, StorageError
from tessera.files import sync_name, write_whole
from tessera.serve.packing import MAX_BYTES, pack, unpack
from tessera.serve.records import content_hash

__all__ = ["Blobs", "pack", "unpack"]

# Of a store of one's own, beside the server: whoever writes http:// there means it.
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "memory")


@final
class Blobs:
    """Bytes that are found by the sha256 of their content, at ``sha256/ab/<hash>``.

    A blob is whole or not there, and never changes; many processes may share a place. On a disk,
    what `put` has returned from survives a power cut (file and folders are flushed; obstore's
    LocalStore flushes neither). An object store answers for itself.

    Args:
        place: A folder, made if missing; or ``s3://bucket/prefix`` (``gs://``, ``az://``), whose
            credentials are found in the environment, as for the vendor's own tools.

    Raises:
        InputError: No such scheme.
        StorageError: The folder cannot be made.

    Example:
        >>> import tempfile
        >>> blobs = Blobs(tempfile.mkdtemp())
        >>> name = blobs.put(b"content")
        >>> name[:8], blobs.get(name), blobs.has(name)
        ('ed7002b4', b'content', True)
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = os.fspath(place)
        scheme, found, rest = self.place.partition("://")
        if found and scheme not in ("file", *_SCHEMES):
            raise InputError(
                f"blobs lie in a folder or at {', '.join(f'{s}://' for s in _SCHEMES[:4])}; got "
                f"{scheme[:40]!r}"
            )
        self._store: _Store
        if found and scheme != "file":
            self._store = _Remote(self.place)
        else:
            self._store = _Folder(Path(rest if found else self.place))

    def put(self, data: bytes) -> str:
        """Keep these bytes; again is no harm, and mends a blob that was damaged.

        Args:
            data: Up to 1 GiB.

        Returns:
            Their sha256, in hex.

        Raises:
            InputError: They are too many.
            StorageError: They could not be written; nothing is half there.
        """
        if len(data) > MAX_BYTES:
            raise InputError(f"a blob has up to {MAX_BYTES} bytes, got {len(data)}")
        name = hashlib.sha256(data).hexdigest()
        key = _key(name)
        if not self._store.write(key, data, replace=False) and self._store.read(key) != data:
            self._store.write(key, data, replace=True)
        return name

    def get(self, name: str) -> bytes:
        """The bytes of that hash, checked.

        Raises:
            InputError: `name` is no hash.
            MissingDataError: There is no such blob.
            CheckpointError: It is damaged.
            StorageError: It could not be read.
        """
        data = self._store.read(_key(content_hash(name)))
        if data is None:
            raise MissingDataError(
                f"there is no blob {name} in {self.place}; restore it from a backup, or put the "
                "same content again"
            )
        if hashlib.sha256(data).hexdigest() != name:
            raise CheckpointError(
                f"the blob {name} in {self.place} is damaged: its content has another hash. "
                "Restore it from a backup, or put the same content again"
            )
        return data

    def has(self, name: str) -> bool:
        """Whether there is a blob of that hash; its content is not looked at.

        Raises:
            InputError: `name` is no hash.
            StorageError: The place could not be asked.
        """
        return self._store.has(_key(content_hash(name)))

    def __repr__(self) -> str:
        return f"Blobs({self.place!r})"


def _key(name: str) -> str:
    return f"sha256/{name[:2]}/{name}"


class _Store(ABC):
    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """The object, None where there is none."""

    @abstractmethod
    def write(self, key: str, data: bytes, *, replace: bool) -> bool:
        """Make the object, whole or not at all; False where it is there and may not be replaced."""

    @abstractmethod
    def has(self, key: str) -> bool:
        """Whether there is such an object."""


@final
class _Folder(_Store):
    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: set[Path] = set()
        self._make(root / "sha256")

    def read(self, key: str) -> bytes | None:
        try:
            with open(self._root / key, "rb") as file:
                return file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"could not read the blob {key}: {error.strerror}") from error

    def write(self, key: str, data: bytes, *, replace: bool) -> bool:
        path = self._root / key
        self._make(path.parent)
        if not replace and path.exists():
            return False
        write_whole(path, data, advice="Make room, or restart with other --blobs")
        return True

    def has(self, key: str) -> bool:
        return (self._root / key).is_file()

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
class _Remote(_Store):
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
        try:
            obstore.head(self._store, key)
        except FileNotFoundError:
            return False
        except (BaseError, OSError, ValueError) as error:
            raise _away("find", key, error) from error
        return True


def _away(what: str, key: str, error: Exception) -> Exception:
    if isinstance(error, CheckpointError):
        return error
    return StorageError(f"could not {what} the blob {key}: {_first(error)}")


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
