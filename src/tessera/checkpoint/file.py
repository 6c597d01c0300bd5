"""One safetensors file: written whole or not at all, checked byte by byte when read.

The layout is safetensors' own: the header's length (8 bytes, little endian), a JSON header padded
with spaces to 8 bytes, the raw tensors. Its ``__metadata__`` (strings only) holds "format",
"version", "tree" (JSON, see `tree`), "crc32" (JSON: tensor -> checksum) and "header_crc32", the
checksum of all the rest of the header.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tessera.errors import CheckpointError, MissingDataError, StorageError
from tessera.files import write_whole

__all__ = ["DTYPES", "MAX_HEADER_BYTES", "VERSION", "read", "write"]

VERSION = 1
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,  # the one that safetensors.torch (0.8) cannot read back
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_METADATA = {"format", "version", "tree", "crc32", "header_crc32"}
_CHUNK_BYTES = 1 << 20  # fits a cache: the checksum reads what the disk just wrote
_MAX_DIMS = 64


def write(path: str | os.PathLike[str], tree: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write JSON-ready nodes and named tensors, atomically and durably.

    Args:
        path: The file; missing parents are created.
        tree: What JSON can hold, no NaN or infinity.
        tensors: Dense, of a dtype in `DTYPES`, on any device; streamed one at a time.

    Raises:
        CheckpointError: The header would be larger than the format allows.
        StorageError: The file could not be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(f"{folder}/f", {"step": 3}, {"w": torch.zeros(2)})
        ...     read(f"{folder}/f")
        ({'step': 3}, {'w': tensor([0., 0.])})
    """
    nodes = json.dumps(tree, allow_nan=False, separators=(",", ":"))
    layout = _layout(tensors)
    checksums = dict.fromkeys(layout, 0)
    room = len(_header(nodes, layout, checksums))
    if room > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the plain values and names of this state take {room:,} bytes as JSON, and "
            f"{os.fspath(path)} may hold {MAX_HEADER_BYTES:,}; turn long lists into tensors"
        )

    def fill(file: BinaryIO) -> None:
        # One pass: the checksums are known once the tensors have gone by, so the header, whose
        # length does not depend on them, is written last.
        file.seek(room)
        for name in layout:
            checksums[name] = _write_tensor(file, tensors[name])
        file.seek(0)
        file.write(_header(nodes, layout, checksums))

    write_whole(path, fill)


def read(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """The nodes and tensors that `write` wrote, after checking every byte.

    The tensors never take more memory than the file is long, whatever the file says.

    Returns:
        (tree, tensors): parsed JSON, and fresh CPU tensors.

    Raises:
        MissingDataError: There is no such file.
        CheckpointError: It is not ours, or of a newer version.
        ValueError: It is damaged; the message says where. RuntimeError for what json or torch
            give up on.
        StorageError: The operating system refused to read it.

    Example:
        >>> read("no/such/file")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        tessera.errors.MissingDataError: there is no checkpoint at no/such/file; ...
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait forever
            raise CheckpointError(f"{os.fspath(path)} is not a file, hence no checkpoint")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _read_header(file, size)
            tree, checksums = _open_metadata(path, header)
            spans = _check_layout(header, size - start)
            if set(checksums) != {span.name for span in spans}:
                raise ValueError("its checksums are not those of its tensors")
            return tree, {span.name: _read_tensor(file, span, checksums) for span in spans}
    except FileNotFoundError as error:
        raise MissingDataError(
            f"there is no checkpoint at {os.fspath(path)}; check the path, or make one with "
            "checkpoint.save(path, state)"
        ) from error
    except OSError as error:
        raise StorageError(f"could not read {os.fspath(path)}: {error.strerror}") from error


# -- writing ----------------------------------------------------------------------------------


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Header entries in the order of the file: wide types first, so that all are aligned."""
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    return entries


def _header(tree: str, layout: Mapping[str, Any], checksums: Mapping[str, int]) -> bytes:
    """Length and header. Its size is the same for any checksums."""
    crc32 = json.dumps({name: f"{checksum:08x}" for name, checksum in checksums.items()})
    metadata = {"format": "tessera", "version": str(VERSION), "tree": tree, "crc32": crc32}
    header = {"__metadata__": metadata, **layout}
    metadata["header_crc32"] = _fingerprint(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _fingerprint(header: Mapping[str, Any]) -> str:
    """Checksum of what the header says, whatever its spacing or order."""
    return f"{zlib.crc32(json.dumps(header, sort_keys=True).encode()):08x}"


def _bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous CPU tensor, sharing its memory."""
    if tensor.numel() == 0:
        # An empty tensor may have any strides, and PyTorch refuses to reinterpret some of them.
        return np.empty(0, np.uint8)
    flat: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat


def _write_tensor(file: BinaryIO, tensor: Tensor) -> int:
    raw = _bytes_of(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous())
    checksum = 0
    for at in range(0, len(raw), _CHUNK_BYTES):
        chunk = raw[at : at + _CHUNK_BYTES].data
        checksum = zlib.crc32(chunk, checksum)
        file.write(chunk)
    return checksum


# -- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Span:
    """Where one tensor lies, counted from the end of the header."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


def _read_header(file: BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the tensors start."""
    if size < 8:
        raise ValueError(f"it is {size} bytes long, too short for a header")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > size - 8 or length > MAX_HEADER_BYTES:
        raise ValueError(f"it announces a header of {length:,} bytes in a file of {size:,}")
    header = _parse(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, 8 + length


def _parse(text: str | bytes) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"its JSON holds {name}, which is not JSON")


def _open_metadata(path: str | os.PathLike[str], header: dict[str, Any]) -> tuple[Any, Any]:
    """Take the metadata out of the header: the parsed tree and the tensors' checksums."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != "tessera":
        raise CheckpointError(
            f"{os.fspath(path)} is a safetensors file, but no Tessera checkpoint (or a damaged "
            "one). For bare tensors: safetensors.torch.load_file(path)"
        )
    version = metadata.get("version")
    # Before anything else is looked at: a newer format may have changed all of it.
    if not isinstance(version, str) or not re.fullmatch("[1-9][0-9]{0,8}", version):
        raise ValueError(f"its version is {version!r}")
    if int(version) > VERSION:
        raise CheckpointError(
            f"{os.fspath(path)} was written by a newer Tessera (format {version}, this one reads "
            f"up to {VERSION}). Upgrade with: pip install -U tessera-lifelong"
        )
    if set(metadata) != _METADATA or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata has other entries than a checkpoint's")
    expected = metadata.pop("header_crc32")
    if _fingerprint(header) != expected:
        raise ValueError("the checksum of its header does not match")
    del header["__metadata__"]
    checksums = _parse(metadata["crc32"])
    if not isinstance(checksums, dict):
        raise ValueError("its checksums are not a JSON object")
    return _parse(metadata["tree"]), checksums


def _check_layout(entries: Mapping[str, Any], size: int) -> list[_Span]:
    """The tensors in the order of the file, which they must fill without gap or overlap."""
    spans = sorted(
        (_check_entry(name, entry) for name, entry in entries.items()),
        key=lambda span: (span.begin, span.end),
    )
    at = 0
    for span in spans:
        if span.begin != at:
            raise ValueError(f"the tensor {span.name!r} starts at {span.begin}, not at {at}")
        at = span.end
    if at != size:
        raise ValueError(f"its tensors take {at:,} bytes, and {size:,} follow the header")
    return spans


def _check_entry(name: str, entry: Any) -> _Span:
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [begin, end]} if (
            len(entry) == 3
            and kind in DTYPES
            and len(shape) <= _MAX_DIMS
            and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
            and end - begin == math.prod(shape) * DTYPES[kind].itemsize
        ):
            return _Span(name=name, dtype=DTYPES[kind], shape=shape, begin=begin, end=end)
    raise ValueError(f"the header's entry for the tensor {name!r} makes no sense")


def _read_tensor(file: BufferedReader, span: _Span, checksums: Mapping[str, Any]) -> Tensor:
    """The next tensor of the file, in memory of its own."""
    tensor = torch.empty(span.shape, dtype=span.dtype)
    raw = _bytes_of(tensor)
    checksum = 0
    for at in range(0, len(raw), _CHUNK_BYTES):
        chunk = raw[at : at + _CHUNK_BYTES].data
        if file.readinto(chunk) != len(chunk):
            raise ValueError(f"it ends within the tensor {span.name!r}")
        checksum = zlib.crc32(chunk, checksum)
    if f"{checksum:08x}" != checksums[span.name]:
        raise ValueError(f"the checksum of the tensor {span.name!r} does not match")
    return tensor
