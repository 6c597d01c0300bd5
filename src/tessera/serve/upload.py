"""A delta out of what was uploaded: PEFT's folder, or the one file of `serve.pack`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import final

from tessera.arch import Delta
from tessera.errors import CheckpointError, DeltaError, InputError, MissingDataError, StorageError
from tessera.serve.packing import unpack

__all__ = ["delta_of"]

_CONFIG = "adapter_config.json"
_TAKEN = (_CONFIG, "adapter_model.safetensors", "tessera.json")
# What PEFT and the Hub put beside an adapter, and no delta is read from.
_PASSED_OVER = ("README.md", ".gitattributes")


def delta_of(files: Sequence[tuple[str, bytes]]) -> Delta:
    """The delta in some files.

    Their names are compared with those that an adapter's files have, and never become a path:
    what is written lies in a new private folder under names of ours.

    Args:
        files: (name, content): a PEFT folder's, or one that `pack` made.

    Raises:
        InputError: It is neither, or a name is not taken.
        DeltaError: It is one of them, and damaged, pickled or no delta.
        StorageError: This machine has no room for it.

    Example:
        >>> import torch
        >>> from tessera.serve.packing import pack
        >>> d = Delta(kind="prompt", tensors={"prompt": torch.zeros(2, 4)})
        >>> delta_of([("d.safetensors", pack(d))]).hash == d.hash
        True
    """
    if not files:
        raise InputError(
            f"the upload has no files; send {', '.join(_TAKEN[:2])} as multipart/form-data"
        )
    named = [(_last(name), content) for name, content in files]
    if len(named) == 1 and named[0][0] not in _TAKEN:
        return _unpacked(named[0][1])
    found: dict[str, bytes] = {}
    for name, content in named:
        if name in _PASSED_OVER:
            continue
        if name not in _TAKEN:
            raise InputError(f"an adapter has no file {name[:80]!r}; it has {', '.join(_TAKEN)}")
        if name in found:
            raise InputError(f"the upload has {name!r} twice")
        found[name] = content
    return _loaded(found)


def _last(name: str) -> str:
    """A browser that uploads a folder sends its name too."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or "" in parts[:-1]:
        raise InputError(f"a file's name is a name, not a path out of its folder: {name[:80]!r}")
    return parts[-1]


def _unpacked(content: bytes) -> Delta:
    try:
        return unpack(content)
    except CheckpointError as error:
        raise DeltaError(str(error)) from error


def _loaded(files: dict[str, bytes]) -> Delta:
    with _Folder() as place:
        try:
            for name, content in files.items():
                Path(place, name).write_bytes(content)
        except OSError as error:
            raise StorageError(f"the upload could not be kept: {error.strerror}") from error
        try:
            return Delta.load(place).snapshot()
        except StorageError:
            raise
        except (CheckpointError, MissingDataError, DeltaError) as error:
            raise DeltaError(str(error).replace(place, "the upload")) from error


@final
class _Folder(tempfile.TemporaryDirectory[str]):
    """A private folder; that there is none is said as an error of ours."""

    def __init__(self) -> None:
        try:
            super().__init__(prefix="tessera-upload-")
        except OSError as error:
            raise StorageError(f"the upload could not be kept: {error.strerror}") from error
