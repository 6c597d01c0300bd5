"""An index as one file: safetensors, with what JSON can say in its header."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tessera.errors import CheckpointError, InputError, MissingDataError
from tessera.files import write_whole

__all__ = ["Stored", "read", "write"]

_VERSION = 1
_KINDS = {"vectors": torch.float32, "ids": torch.int64, "spaces": torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """What a file of an index holds.

    Attributes:
        metric: "cosine" or "dot".
        vectors: float32 [n, dim].
        ids: int64 [n], ascending.
        spaces: int64 [n], of each entry the number of its namespace.
        names: Of the namespaces.
        payloads: n plain values.
        next_id: The id of the entry that is added next.
    """

    metric: str
    vectors: Tensor
    ids: Tensor
    spaces: Tensor
    names: list[str]
    payloads: list[Any]
    next_id: int


def write(path: Path, stored: Stored) -> None:
    """Write it, whole or not at all.

    Raises:
        InputError: A payload is no plain value.
        StorageError: It could not be written.
    """
    tensors = {name: getattr(stored, name).contiguous() for name in _KINDS}
    try:
        words = json.dumps(
            {
                "version": _VERSION,
                "metric": stored.metric,
                "names": stored.names,
                "payloads": stored.payloads,
                "next_id": stored.next_id,
            },
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Index.save keeps payloads that are plain values, as JSON has them ({error}); store a "
            "name or a path, and look the thing up by it"
        ) from error
    header = {"tessera.index": words, "sha256": _digest(words, tensors)}
    write_whole(path, save(tensors, header))


def read(path: Path) -> Stored:
    """Read it back, checked.

    Raises:
        MissingDataError: There is no such file.
        CheckpointError: It is damaged, another file, or too new.
    """
    if not path.is_file():
        raise MissingDataError(f"there is no index {path}; Index.save(path) writes one")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no whole file of an index ({error})") from error
    words = header.get("tessera.index")
    if words is None or set(tensors) != set(_KINDS):
        raise CheckpointError(f"{path} is no index of Tessera's")
    if header.get("sha256") != _digest(words, tensors):
        raise CheckpointError(f"{path} is damaged: its checksum differs. Restore it from a copy")
    said = json.loads(words)
    if said["version"] != _VERSION:
        raise CheckpointError(
            f"{path} is an index of version {said['version']}, this Tessera reads {_VERSION}"
        )
    return Stored(
        metric=said["metric"],
        names=said["names"],
        payloads=said["payloads"],
        next_id=said["next_id"],
        **tensors,
    )


def _digest(words: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(words.encode())
    for name in _KINDS:
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
