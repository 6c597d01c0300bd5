"""Blobs: bytes under the sha256 of their content, written once, on a disk or in an object store."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from tessera.errors import CheckpointError, InputError, MissingDataError, StorageError
from tessera.serve.packing import MAX_BYTES, pack, unpack
from tessera.serve.records import content_hash
from tessera.serve.stores import Folder, Remote, Store

__all__ = ["Blobs", "Stored", "pack", "unpack"]

_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "memory")
_HERE, _ASIDE = "sha256", "aside"
_KEY = re.compile(rf"({_HERE}|{_ASIDE})/[0-9a-f]{{2}}/([0-9a-f]{{64}})")
_UNFINISHED = re.compile(rf"(?:{_HERE}|{_ASIDE})/(?:[0-9a-f]{{2}}/)?\.tessera-[0-9a-f-]+\.tmp")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """An object in a place of blobs.

    Attributes:
        name: The hash that the blob was put under; "": it is the rest of a write that was killed.
        aside: Whether it was set aside.
        bytes: Its length.
        written_s: When it was written, or set aside; seconds since 1970 by the clock of the place.
        key: Its path in the place.
    """

    name: str
    aside: bool
    bytes: int
    written_s: float
    key: str


@final
class Blobs:
    """Bytes that are found by the sha256 of their content, at ``sha256/ab/<hash>``.

    A blob is whole or not there, and never changes; many processes may share a place. On a disk,
    what `put` has returned from survives a power cut (file and folders are flushed; obstore's
    LocalStore flushes neither). An object store answers for itself.

    A blob that nobody seems to need is first set aside, at ``aside/ab/<hash>``, where `get` still
    finds it; only from there can it be deleted. `sweep` does both, with a long time between.

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
        self._store: Store
        if found and scheme != "file":
            self._store = Remote(self.place)
        else:
            self._store = Folder(Path(rest if found else self.place))

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
        data = self._read(content_hash(name))
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
        return any(map(self._store.has, _keys(content_hash(name))))

    def try_out(self) -> None:
        """Write a blob, read it, see that it is not written over, and remove it if that is allowed.

        Raises:
            StorageError: One of it could not be done; or the store overwrites what is there.

        Example:
            >>> import tempfile
            >>> Blobs(tempfile.mkdtemp()).try_out()
        """
        data = os.urandom(32)  # nobody else's
        key = _key(hashlib.sha256(data).hexdigest())
        self._store.write(key, data, replace=False)
        try:
            again = self._store.write(key, b"", replace=False)
            if again or self._store.read(key) != data:
                raise StorageError(
                    f"{self.place} writes over what is there: it takes no notice of If-None-Match. "
                    "Use a store that has conditional puts"
                )
        finally:
            with contextlib.suppress(StorageError):  # only a sweep has to be able to
                self._store.delete(key)

    # --- what nobody needs: see `sweep` ----------------------------------------------------------

    def stored(self) -> Iterator[Stored]:
        """All that lies here, in no order; what is put or removed meanwhile may be among it or not.

        Raises:
            StorageError: The place could not be asked.

        Example:
            >>> import tempfile
            >>> blobs = Blobs(tempfile.mkdtemp())
            >>> name = blobs.put(b"content")
            >>> [(found.name == name, found.bytes, found.aside) for found in blobs.stored()]
            [(True, 7, False)]
        """
        listed = (self._store.list(where) for where in (_HERE, _ASIDE))
        for key, size, written_s in itertools.chain.from_iterable(listed):
            match = _KEY.fullmatch(key)
            if match is not None or _UNFINISHED.fullmatch(key):
                yield Stored(
                    name=match[2] if match else "",
                    aside=key.startswith(_ASIDE),
                    bytes=size,
                    written_s=written_s,
                    key=key,
                )

    def set_aside(self, name: str) -> None:
        """Move a blob to where it can be deleted, and is still found; again is no harm.

        Raises:
            InputError: `name` is no hash.
            StorageError: It could not be moved; it is where it was, or in both places.
        """
        self._store.move(_key(content_hash(name)), _key(name, _ASIDE))

    def restore(self, name: str) -> None:
        """Undo `set_aside`; again is no harm.

        Raises:
            InputError: `name` is no hash.
            StorageError: It could not be moved; it is where it was, or in both places.
        """
        self._store.move(_key(content_hash(name), _ASIDE), _key(name))

    def delete(self, stored: Stored) -> None:
        """Remove what was set aside, or never finished; for good, and again is no harm.

        Raises:
            InputError: It was not set aside.
            StorageError: It could not be removed.
        """
        if stored.name and not stored.aside:
            raise InputError(f"the blob {stored.name} is in use; set it aside first")
        self._store.delete(stored.key)

    def _read(self, name: str) -> bytes | None:
        for key in _keys(name):
            data = self._store.read(key)
            if data is not None:
                return data
        return None

    def __repr__(self) -> str:
        return f"Blobs({self.place!r})"


def _key(name: str, where: str = _HERE) -> str:
    return f"{where}/{name[:2]}/{name}"


def _keys(name: str) -> tuple[str, str, str]:
    """Where a blob may lie; the first again, for one that is moved back meanwhile."""
    return _key(name), _key(name, _ASIDE), _key(name)
