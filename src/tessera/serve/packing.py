"""A delta as one file: safetensors, with our own JSON in its metadata. Untrusted until checked.

The layout is safetensors' (the header's length in 8 bytes, little endian; JSON, padded with blanks
to 8 bytes; the raw tensors). ``__metadata__`` has one entry, ``tessera``, a JSON text::

    {"base_hash": .., "check": .., "format": 1, "hash": .., "info": {..}, "kind": ..,
     "scales": {site: ..}}

(sorted, no blanks). `hash` is `Delta.hash`, which covers tensors, kind and scales; `check` is the
sha256 of the text without it. There is exactly one file for a delta, so bytes that are any other
are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tessera.arch import Delta
from tessera.errors import CheckpointError, InputError, TesseraError

__all__ = ["MAX_BYTES", "pack", "unpack"]

MAX_BYTES = 1 << 30
_MAX_HEADER_BYTES = 8 << 20
_MAX_TENSORS = 20_000
_MAX_NAME = 512
_MAX_DIMS = 8
_MOST = 1e30  # of a scale
_FORMAT = 1
_FIELDS = {"base_hash", "check", "format", "hash", "info", "kind", "scales"}
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def pack(delta: Delta) -> bytes:
    """The delta as it is now, as one file; the same content gives the same bytes.

    Raises:
        InputError: It holds what the file has no word for, or is too large; the message says what.

    Example:
        >>> delta = Delta(kind="prompt", tensors={"prompt": torch.zeros(2, 4)})
        >>> unpack(pack(delta)).hash == delta.hash
        True
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in delta.tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise InputError(
                f"pack keeps tensors of {', '.join(_DTYPES)}; {name} is {tensor.dtype}"
            )
        if len(name) > _MAX_NAME or tensor.dim() > _MAX_DIMS:
            raise InputError(
                f"pack keeps tensors of up to {_MAX_DIMS} dimensions with names of up to "
                f"{_MAX_NAME} characters; {name[:60]!r} has {tensor.dim()} and {len(name)}"
            )
    for site, scale in delta.scales.items():
        if not abs(scale) < _MOST:
            raise InputError(f"pack keeps scales between -1e30 and 1e30; {site} has {scale}")
    layout = _layout({name: (t.dtype, list(t.shape)) for name, t in tensors.items()})
    header = _header(
        {
            "kind": delta.kind,
            "scales": dict(delta.scales),
            "base_hash": delta.base_hash,
            "info": _plain(delta.info),
            "hash": delta.hash,
        },
        layout,
    )
    size = len(header) + sum(t.numel() * t.element_size() for t in tensors.values())
    if size > MAX_BYTES or len(header) > _MAX_HEADER_BYTES or len(tensors) > _MAX_TENSORS:
        raise InputError(
            f"pack keeps deltas of up to {MAX_BYTES} bytes and {_MAX_TENSORS} tensors, names and "
            f"info of up to {_MAX_HEADER_BYTES}; got {size}, {len(tensors)}, {len(header)}"
        )
    return b"".join([header, *(_raw(tensors[name]) for name in layout)])


def unpack(data: bytes, *, expect: str = "") -> Delta:
    """The delta in a file of `pack`'s: a snapshot on the CPU, every byte checked.

    It takes no more memory than the file is long, and nothing in it is executed.

    Args:
        data: The file.
        expect: The hash the delta must have; "": any.

    Raises:
        CheckpointError: It is no such file, is damaged, of another delta, or of a newer format.

    Example:
        >>> unpack(b"\\x00" * 20)
        Traceback (most recent call last):
        tessera.errors.CheckpointError: this is no delta's file: its header is no JSON object
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"a delta's file has up to {MAX_BYTES} bytes, this one {len(data)}")
    try:
        header, start = _read_header(data)
        said = _manifest(header.pop("__metadata__", None))
        shapes = _shapes(header, len(data) - start)
        # One file for a delta: what another writer, or a fault, would have made of it is refused.
        if _header({k: said[k] for k in _FIELDS - {"check", "format"}}, header) != data[:start]:
            raise ValueError("its header is not as Tessera writes it")
        if list(header) != list(_layout(shapes)):
            raise ValueError("its tensors are not in Tessera's order")
        tensors = _tensors(data, start, header)
        delta = Delta(
            kind=said["kind"],
            tensors=tensors,
            scales=said["scales"],
            base_hash=said["base_hash"],
            info=said["info"],
        )
        if delta.hash != said["hash"]:
            raise ValueError("its content has another hash than it says")
        if expect and said["hash"] != expect:
            raise CheckpointError(f"this is the file of the delta {said['hash']}, not {expect}")
    except CheckpointError:
        raise
    except (ValueError, TypeError, RuntimeError, OverflowError, TesseraError) as error:
        raise CheckpointError(f"this is no delta's file: {str(error)[:300]}") from error
    return delta


# -- writing ----------------------------------------------------------------------------------


def _layout(shapes: Mapping[str, tuple[torch.dtype, list[int]]]) -> dict[str, dict[str, Any]]:
    """The header's entries in the order of the file: wide types first, so that all are aligned."""
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda s: (-s[1][0].itemsize, s[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    return entries


def _header(said: Mapping[str, Any], layout: Mapping[str, Any]) -> bytes:
    """Length and header, padded; `said` without its check and format."""
    try:
        manifest = {**said, "format": _FORMAT}
        manifest["check"] = hashlib.sha256(_json(manifest).encode()).hexdigest()
        text = _json({"__metadata__": {"tessera": _json(manifest)}}, sort=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"pack keeps info of plain values, as JSON has them ({error}): None, bool, finite "
            "numbers, text, lists, and mappings with text for keys"
        ) from error
    if layout:
        text = f"{text[:-1]},{_json(layout, sort=False)[1:]}"
    words = text.encode()
    words += b" " * (-len(words) % 8)
    return struct.pack("<Q", len(words)) + words


def _json(value: Any, *, sort: bool = True) -> str:
    return json.dumps(value, sort_keys=sort, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    """The value of dicts and lists; json would turn keys that are no text into text."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InputError(f"pack keeps info with text for keys, got {list(value)[:3]}")
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _raw(tensor: Tensor) -> memoryview | bytes:
    # An empty tensor may have strides that PyTorch refuses to look at as bytes.
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


# -- reading ----------------------------------------------------------------------------------


def _read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the tensors start."""
    if len(data) < 8:
        raise ValueError(f"it is {len(data)} bytes long, too short for a header")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"it announces a header of {length} bytes, and has {len(data)}")
    header = _parse(data[8 : 8 + length], "header")
    if len(header) > _MAX_TENSORS + 1:
        raise ValueError(f"it has {len(header)} tensors, and may have {_MAX_TENSORS}")
    return header, 8 + length


def _parse(words: str | bytes, what: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"its {what} says something twice")
        return found

    def refuse(word: str) -> float:
        raise ValueError(f"its {what} holds {word}")

    try:
        value = json.loads(words, object_pairs_hook=once, parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its {what} is no JSON object") from error
    if not isinstance(value, dict):
        raise ValueError(f"its {what} is no JSON object")
    return value


def _manifest(metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tessera"), str):
        raise CheckpointError(
            "this safetensors file is no delta of Tessera's. An adapter of PEFT's goes with its "
            "adapter_config.json: send the files of the folder"
        )
    said = _parse(metadata["tessera"], "manifest")
    version = said.get("format")
    if type(version) is int and version > _FORMAT:
        raise CheckpointError(
            f"this delta was written by a newer Tessera (format {version}, this one reads up to "
            f"{_FORMAT}). Upgrade with: pip install -U tessera-lifelong"
        )
    if said.keys() != _FIELDS or type(version) is not int or version != _FORMAT:
        raise ValueError("its manifest has other entries than a delta's")
    for field in ("kind", "base_hash", "hash", "check"):
        if not isinstance(said[field], str):
            raise ValueError(f"its manifest has no {field}")
    if not isinstance(said["info"], dict) or not isinstance(said["scales"], dict):
        raise ValueError("its info or its scales are no mapping")
    for site, scale in said["scales"].items():
        if type(scale) is not float or not abs(scale) < _MOST:
            raise ValueError(f"its scale of {site[:60]!r} is no number to multiply with")
    return said


def _shapes(entries: Mapping[str, Any], size: int) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape by name, after checking that they fill the file without gap or overlap."""
    found: dict[str, tuple[torch.dtype, list[int]]] = {}
    at = 0
    for name, entry in entries.items():
        match entry:
            case {"dtype": str(kind), "shape": list(shape), "data_offsets": [begin, end]} if (
                len(entry) == 3
                and len(name) <= _MAX_NAME
                and kind in _DTYPES
                and len(shape) <= _MAX_DIMS
                and all(type(n) is int and 0 <= n <= MAX_BYTES for n in (*shape, begin, end))
                and begin == at
                and end - begin == math.prod(shape) * _DTYPES[kind].itemsize
            ):
                found[name], at = (_DTYPES[kind], shape), end
            case _:
                raise ValueError(f"its entry for the tensor {name[:60]!r} makes no sense")
    if at != size:
        raise ValueError(f"its tensors take {at} bytes, and {size} follow the header")
    return found


def _tensors(data: bytes, start: int, layout: Mapping[str, Any]) -> dict[str, Tensor]:
    memory = bytearray(memoryview(data)[start:])  # the tensors' own: bytes must not be written to
    found: dict[str, Tensor] = {}
    for name, entry in layout.items():
        dtype, (begin, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
        if begin == end:
            found[name] = torch.empty(entry["shape"], dtype=dtype)
            continue
        kind = torch.uint8 if dtype is torch.bool else dtype
        count = (end - begin) // dtype.itemsize
        flat = torch.frombuffer(memory, dtype=kind, count=count, offset=begin)
        if dtype is torch.bool and int(flat.max()) > 1:
            raise ValueError(f"the tensor {name[:60]!r} is of bools, and holds other bytes")
        found[name] = flat.view(dtype).view(entry["shape"])
    return found
