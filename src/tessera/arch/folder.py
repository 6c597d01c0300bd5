"""A delta as Hugging Face PEFT's adapter folder, there whole or not at all.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's (see `peft_names`);
``tessera.json`` beside them holds what PEFT has no field for::

    {"format": 1, "kind": .., "hash": .., "base_hash": .., "scales": {site: ..}, "info": {..}}

What is read may come from anywhere: it is bounded, checked, and never executed.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors
import safetensors.torch
from torch import Tensor

from tessera.arch.folder_swap import ADAPTER, CONFIG, MANIFEST, aside, put
from tessera.arch.peft_names import OWN, Content
from tessera.arch.peft_read import decode
from tessera.arch.peft_write import encode
from tessera.errors import (
    CheckpointError,
    DeltaError,
    InputError,
    MissingDataError,
    StorageError,
)

__all__ = ["Stored", "read", "write"]

_FORMAT = 1
_PICKLED = "adapter_model.bin"
_MAX_JSON_BYTES = 1 << 20
_MAX_TENSOR_BYTES = 16 << 30
_ATTEMPTS = 5
_MOST = 1e30  # of a scale; JSON has integers beyond any float


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """What a folder holds: the fields of `Delta`, and the hash it had when it was written.

    Attributes:
        content_hash: "" where PEFT wrote the folder.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    scales: Mapping[str, float]
    base_hash: str
    info: Mapping[str, Any]
    content_hash: str


def write(
    path: str | os.PathLike[str],
    *,
    kind: str,
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, float],
    base_hash: str,
    info: Mapping[str, Any],
    content_hash: str,
) -> None:
    """Write the folder, whole or not at all; one that holds an adapter is replaced.

    Args:
        path: The folder. Missing parents are created, a link is followed.
        kind: As `Delta` has it.
        tensors: As `Delta` has them.
        scales: As `Delta` has them.
        base_hash: As `Delta` has it.
        info: Plain values. ``layer_types`` (site -> class name) tells PEFT's format of
            "Embedding", "Conv2d", "Conv3d" and "Conv1D".
        content_hash: What `Delta.load` compares.

    Raises:
        InputError: `info` holds what JSON has no word for.
        StorageError: It could not be written, or other things lie in that folder; what stood
            there is unchanged.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write(f"{place}/a", kind="prompt", tensors={"prompt": torch.zeros(2, 4)},
        ...           scales={}, base_hash="", info={}, content_hash="")
        ...     sorted(os.listdir(f"{place}/a"))
        ['adapter_config.json', 'adapter_model.safetensors', 'tessera.json']
    """
    content = Content(kind=kind, tensors=tensors, scales=scales, info=info)
    config, named = encode(content)
    manifest = {
        "format": _FORMAT,
        "kind": kind,
        "hash": content_hash,
        "base_hash": base_hash,
        "scales": dict(scales),
        "info": dict(info),
    }
    words = _json(manifest, "info")
    # Clones: safetensors takes no two tensors in the same memory, and no views.
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in named.items()}
    files = {
        CONFIG: _json(config, "info"),
        ADAPTER: safetensors.torch.save(plain, {"format": "pt"}),
        MANIFEST: words,
    }
    put(path, files)


def _json(value: Any, what: str) -> bytes:
    try:
        words = json.dumps(_plain(value), allow_nan=False, indent=2, sort_keys=True).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"Delta.save keeps {what} of plain values, as JSON has them ({error}): None, bool, "
            "finite numbers, text, lists, and mappings with text for keys"
        ) from error
    if len(words) > _MAX_JSON_BYTES:
        raise InputError(
            f"Delta.save keeps {what} of up to {_MAX_JSON_BYTES} bytes as JSON, got {len(words)}"
        )
    return words


def _plain(value: Any) -> Any:
    """The value of dicts and lists; json would turn keys that are no text into text."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"a mapping has the keys {list(value)[:3]}")
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def read(path: str | os.PathLike[str]) -> Stored:
    """Read a folder, PEFT's or `write`'s.

    Args:
        path: The folder; it may be a link, the files in it may not.

    Raises:
        MissingDataError: There is no such folder, or no adapter in it.
        CheckpointError: It is damaged, pickled, or of a newer format.
        DeltaError: It is an adapter, but none that a delta can be.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write(f"{place}/a", kind="prompt", tensors={"prompt": torch.zeros(2, 4)},
        ...           scales={}, base_hash="", info={}, content_hash="")
        ...     read(f"{place}/a").tensors["prompt"].shape
        torch.Size([2, 4])
    """
    where = os.fspath(path)
    config_bytes, tensor_bytes, manifest_bytes = _contents(path)
    try:
        config = _parse(config_bytes, CONFIG)
        manifest = None if manifest_bytes is None else _parse(manifest_bytes, MANIFEST)
        tensors = safetensors.torch.load(tensor_bytes)
        stored = _manifest(manifest) if manifest is not None else None
    except (safetensors.SafetensorError, ValueError, RecursionError, KeyError) as error:
        raise CheckpointError(f"{where} is no whole adapter: {error}") from error
    try:
        content = decode(config, tensors)
    except DeltaError as error:
        raise DeltaError(f"{where}: {error}") from error
    if stored is None:
        if str(config.get("peft_type")).startswith(OWN):
            raise CheckpointError(
                f"{where} is an adapter of Tessera's without its {MANIFEST}; copy the whole folder"
            )
        return Stored(
            kind=content.kind,
            tensors=content.tensors,
            scales=content.scales,
            info=content.info,
            base_hash="",
            content_hash="",
        )
    _compare(where, stored, content, own=str(config["peft_type"]).startswith(OWN))
    return Stored(
        kind=stored.kind,
        tensors=content.tensors,
        scales=stored.scales,
        info=stored.info,
        base_hash=stored.base_hash,
        content_hash=stored.content_hash,
    )


def _compare(where: str, stored: Stored, content: Content, *, own: bool) -> None:
    """Raise unless our manifest and PEFT's configuration say the same."""
    wrong = None
    if stored.kind != content.kind:
        wrong = "kind"
    elif not own and (
        stored.scales.keys() != content.scales.keys()
        or not all(
            math.isclose(s, content.scales[n], rel_tol=1e-6, abs_tol=1e-30)
            for n, s in stored.scales.items()
        )
    ):
        wrong = "scales"
    elif not own and any(stored.info.get(k) != content.info.get(k) for k in ("layers", "heads")):
        wrong = "info"
    if wrong:
        raise CheckpointError(
            f"{where}: {MANIFEST} and {CONFIG} differ in {wrong}. If PEFT has written into this "
            f"folder since, delete {MANIFEST}"
        )


def _parse(words: bytes, name: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
            raise ValueError(f"{name} has {twice[:60]!r} twice")
        return found

    def refuse(word: str) -> float:
        raise ValueError(f"{name} holds {word}")

    try:
        value = json.loads(words, object_pairs_hook=once, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no mapping")
    return value


def _manifest(said: Mapping[str, Any]) -> Stored:
    version = said.get("format")
    if type(version) is int and version > _FORMAT:
        raise CheckpointError(
            f"{MANIFEST} was written by a newer Tessera (format {version}, this one reads up to "
            f"{_FORMAT}). Upgrade with: pip install -U tessera-lifelong"
        )
    if version != _FORMAT or type(version) is not int:
        raise ValueError(f"{MANIFEST} has the format {str(version)[:40]!r}")
    for field, kind in (
        ("kind", str),
        ("hash", str),
        ("base_hash", str),
        ("scales", dict),
        ("info", dict),
    ):
        if not isinstance(said.get(field), kind):
            raise ValueError(f"{MANIFEST} has no {field}")
    for site, scale in said["scales"].items():
        if type(scale) not in (int, float) or not abs(scale) < _MOST:
            raise ValueError(f"{MANIFEST} has no scale of {site[:60]!r}")
    return Stored(
        kind=said["kind"],
        tensors={},
        scales={site: float(scale) for site, scale in said["scales"].items()},
        base_hash=said["base_hash"],
        info=said["info"],
        content_hash=said["hash"],
    )


def _contents(path: str | os.PathLike[str]) -> tuple[bytes, bytes, bytes | None]:
    """The three files, all of one writing."""
    where = os.fspath(path)
    config, tensors, manifest, pickled = _one_writing(where)
    if tensors is None and pickled:
        raise CheckpointError(
            f"{where} holds {_PICKLED}, a pickle, which runs whatever code is in it; Tessera "
            "unpickles nothing. Where you trust it, convert it with PEFT: "
            "PeftModel.from_pretrained(base, path).save_pretrained(new_path)"
        )
    for name, found in ((CONFIG, config), (ADAPTER, tensors)):
        if found is None:
            raise MissingDataError(f"{where} is no adapter folder: it has no {name}")
    assert config is not None
    assert tensors is not None
    return config, tensors, manifest


def _one_writing(where: str) -> tuple[bytes | None, bytes | None, bytes | None, bool]:
    for _ in range(_ATTEMPTS):
        place = where
        if not os.path.exists(place) and aside(Path(where)).is_dir():
            place = str(aside(Path(where)))  # its replacement was cut short
        try:
            with _Opened(place) as folder:
                config = folder.bytes_of(CONFIG, _MAX_JSON_BYTES)
                tensors = folder.bytes_of(ADAPTER, _MAX_TENSOR_BYTES)
                manifest = folder.bytes_of(MANIFEST, _MAX_JSON_BYTES)
                if folder.stands():
                    return config, tensors, manifest, os.path.exists(os.path.join(place, _PICKLED))
        except FileNotFoundError as error:
            if aside(Path(where)).is_dir():
                continue
            raise MissingDataError(
                f"there is no adapter folder {where}; Delta.save(path) writes one"
            ) from error
        except NotADirectoryError as error:
            raise CheckpointError(f"{where} is no folder, hence no adapter") from error
        except OSError as error:
            raise StorageError(f"{where} could not be read: {error}") from error
    raise StorageError(f"{where} is replaced faster than it can be read; read it again")


@final
class _Opened:
    """A folder held open, so that its files are of one writing though another takes its place."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._descriptor: int | None = None

    def __enter__(self) -> _Opened:
        if not stat.S_ISDIR(os.stat(self._place).st_mode):
            raise NotADirectoryError(self._place)
        if os.open in os.supports_dir_fd:
            self._descriptor = os.open(self._place, os.O_RDONLY | os.O_DIRECTORY)
        self._stat = os.stat(self._place if self._descriptor is None else self._descriptor)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def stands(self) -> bool:
        """Whether it is still what the path leads to."""
        return os.path.samestat(self._stat, os.stat(self._place))

    def bytes_of(self, name: str, limit: int) -> bytes | None:
        """A file of it, None where there is none; no link is followed."""
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        place = os.path.join(self._place, name)
        try:
            if self._descriptor is not None:
                descriptor = os.open(name, flags, dir_fd=self._descriptor)
            elif os.path.islink(place):
                raise OSError(errno.ELOOP, "a link")
            else:
                descriptor = os.open(place, flags | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise CheckpointError(
                f"{place} is a link, which Tessera does not follow: it may lead anywhere. Copy "
                "what it stands for with: cp -rL"
            ) from error
        with open(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_size > limit:
                raise CheckpointError(f"{place} is no file of up to {limit} bytes")
            data = file.read(about.st_size + 1)
        if len(data) != about.st_size:
            raise CheckpointError(f"{place} changed while it was read; read it again")
        return data
