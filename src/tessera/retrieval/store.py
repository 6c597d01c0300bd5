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

__all__ = ["BACKENDS", "METRICS", "Stored", "read", "write"]

METRICS = ("cosine", "dot")
BACKENDS = ("exact", "faiss")
_VERSION = 1
_KINDS = {"vectors": torch.float32, "ids": torch.int64, "spaces": torch.int64}
_LISTS = {"homes": torch.int32, "centres": torch.float32}  # both or neither


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
        backend: "exact" or "faiss".
        probes: Lists a query looks into.
        homes: int32 [n], of each entry its list; None: there are no lists.
        centres: float32 [lists, dim]; likewise.
    """

    metric: str
    vectors: Tensor
    ids: Tensor
    spaces: Tensor
    names: list[str]
    payloads: list[Any]
    next_id: int
    backend: str = "exact"
    probes: int = 64
    homes: Tensor | None = None
    centres: Tensor | None = None


def write(path: Path, stored: Stored) -> None:
    """Write it, whole or not at all.

    Raises:
        InputError: A payload is no plain value.
        StorageError: It could not be written.
    """
    kinds = _KINDS if stored.centres is None else _KINDS | _LISTS
    tensors = {name: getattr(stored, name).contiguous() for name in kinds}
    try:
        words = json.dumps(
            {
                "version": _VERSION,
                "metric": stored.metric,
                "names": stored.names,
                "payloads": stored.payloads,
                "next_id": stored.next_id,
                "backend": stored.backend,
                "probes": stored.probes,
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
            header, names = file.metadata() or {}, sorted(file.keys())
            if "tessera.index" not in header or names not in (
                sorted(_KINDS),
                sorted(_KINDS | _LISTS),
            ):
                raise CheckpointError(f"{path} is no index of Tessera's: it holds {names}")
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no whole file of an index ({error})") from error
    words = header["tessera.index"]
    if header.get("sha256") != _digest(words, tensors):
        raise CheckpointError(f"{path} is damaged: its checksum differs. Restore it from a copy")
    # A checksum tells damage from data, not a forger's data from ours.
    try:
        said = json.loads(words)
        if said["version"] != _VERSION:
            raise CheckpointError(
                f"{path} is an index of version {said['version']}, this Tessera reads {_VERSION}"
            )
        stored = Stored(
            metric=said["metric"],
            names=said["names"],
            payloads=said["payloads"],
            next_id=said["next_id"],
            backend=said.get("backend", "exact"),
            probes=said.get("probes", 64),
            **tensors,
        )
        fits = _fits(stored)
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of Tessera's ({error!r})") from error
    if not fits:
        raise CheckpointError(f"{path} is no index of Tessera's: its parts do not fit together")
    return stored


def _fits(stored: Stored) -> bool:
    """Whether an index could have written it."""
    vectors, ids, spaces = stored.vectors, stored.ids, stored.spaces
    if any(getattr(stored, name).dtype is not kind for name, kind in _KINDS.items()):
        return False
    if vectors.dim() != 2 or vectors.shape[1] < 1 or not bool(vectors.isfinite().all()):
        return False
    if not isinstance(stored.names, list) or not isinstance(stored.payloads, list):
        return False
    count, known = len(vectors), set(range(len(stored.names)))
    return (
        stored.metric in METRICS
        and ids.shape == spaces.shape == (count,)
        and len(stored.payloads) == count
        and bool((ids.diff() > 0).all())
        and type(stored.next_id) is int
        and (not count or 0 <= int(ids[0]) <= int(ids[-1]) < stored.next_id)
        and all(isinstance(name, str) for name in stored.names)
        and len(set(stored.names)) == len(stored.names)
        and set(spaces.tolist()) <= known
        and stored.backend in BACKENDS
        and type(stored.probes) is int
        and stored.probes >= 1
        and _lists_fit(stored)
    )


def _lists_fit(stored: Stored) -> bool:
    homes, centres = stored.homes, stored.centres
    if homes is None or centres is None:
        return homes is centres
    return (
        (homes.dtype, centres.dtype) == (_LISTS["homes"], _LISTS["centres"])
        and centres.dim() == 2
        and len(centres) >= 1
        and centres.shape[1] == stored.vectors.shape[1]
        and bool(centres.isfinite().all())
        and homes.shape == stored.ids.shape
        and bool(((homes >= 0) & (homes < len(centres))).all())
    )


def _digest(words: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(words.encode())
    for name in (n for n in _KINDS | _LISTS if n in tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
