"""The tensors of the Open Inference Protocol: their names, as JSON, and as bytes.

BOOL, the integers, FP16, FP32 and FP64 travel both ways; BF16 as bytes only, since JSON has no
agreed form of it; BYTES (text) not at all. Bytes are row-major and little-endian.
"""

from __future__ import annotations

import array
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tessera.errors import InputError

__all__ = [
    "DATATYPES",
    "NAMES",
    "bytes_of",
    "dtype_of",
    "from_bytes",
    "from_json",
    "json_of",
    "name_of",
]

DATATYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "BF16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in DATATYPES.items()}

# Codes of `array`; FP16 goes through FP64.
_CODES = {
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "d",
    "FP32": "f",
    "FP64": "d",
}
_BOOLS: frozenset[type] = frozenset({bool})
_INTEGERS: frozenset[type] = frozenset({int})
_NUMBERS: frozenset[type] = frozenset({int, float})


def dtype_of(datatype: object, name: str) -> torch.dtype:
    """The dtype of the protocol's `datatype`; `name` is the tensor's, for the message.

    Raises:
        InputError: There is no such datatype, or torch has none for it.

    Example:
        >>> dtype_of("FP32", "x")
        torch.float32
    """
    found = DATATYPES.get(datatype) if isinstance(datatype, str) else None
    if found is None:
        if datatype == "BYTES":
            raise InputError(
                f"tensor {name!r} is of BYTES, text, which no tensor holds; send token ids"
            )
        raise InputError(
            f"tensor {name!r} has the datatype {str(datatype)[:40]!r}; choose one of: "
            f"{', '.join(DATATYPES)}"
        )
    return found


def name_of(tensor: Tensor, name: str) -> str:
    """The protocol's name of a tensor's dtype.

    Raises:
        InputError: It has none.

    Example:
        >>> name_of(torch.zeros(2, dtype=torch.bfloat16), "x")
        'BF16'
    """
    found = NAMES.get(tensor.dtype)
    if found is None:
        raise InputError(f"tensor {name!r} is {tensor.dtype}, which the protocol has no name for")
    return found


def from_json(data: object, shape: Sequence[int], datatype: str, name: str) -> Tensor:
    """A tensor from JSON's list of values, nested as `shape` says or flat.

    Args:
        data: Lists of numbers or of bools.
        shape: Checked sizes, none negative.
        datatype: One of `DATATYPES`.
        name: The tensor's, for messages.

    Raises:
        InputError: It does not fit the shape or the datatype.

    Example:
        >>> from_json([[1, 2], [3, 4.5]], [2, 2], "FP32", "x")
        tensor([[1.0000, 2.0000],
                [3.0000, 4.5000]])
    """
    dtype = dtype_of(datatype, name)
    if datatype == "BF16":
        raise InputError(f"tensor {name!r}: BF16 travels as binary data, or send FP32")
    flat = _flat(data, shape, name)
    kinds = set(map(type, flat))
    numbers = _NUMBERS if dtype.is_floating_point else _INTEGERS
    allowed = _BOOLS if datatype == "BOOL" else numbers
    if not kinds <= allowed:
        other = next(value for value in flat if type(value) not in allowed)
        raise InputError(f"tensor {name!r} is of {datatype} and holds {str(other)[:40]!r}")
    if not flat:
        return torch.empty(tuple(shape), dtype=dtype)
    if datatype == "BOOL":
        return torch.frombuffer(bytearray(flat), dtype=torch.bool).view(tuple(shape))
    try:
        values = array.array(_CODES[datatype], flat)
    except OverflowError as error:
        raise InputError(f"tensor {name!r} holds a number beyond {datatype}") from error
    made = torch.frombuffer(values, dtype=torch.float64 if datatype == "FP16" else dtype).to(dtype)
    # JSON has no infinities: one that is there now came of a number too large.
    if dtype.is_floating_point and not bool(torch.isfinite(made).all()):
        raise InputError(f"tensor {name!r} holds a number beyond {datatype}")
    return made.view(tuple(shape))


def _flat(data: object, shape: Sequence[int], name: str) -> list[Any]:
    if type(data) is not list:
        raise InputError(f"tensor {name!r} has as data a {type(data).__name__}, not a list")
    count = math.prod(shape)
    if not data or type(data[0]) is not list:
        if len(data) != count:
            raise InputError(
                f"tensor {name!r} of shape {list(shape)} takes {count} values, got {len(data)}"
            )
        return data
    level = data
    for depth, size in enumerate(shape):
        if depth:
            for inner in level:
                if type(inner) is not list or len(inner) != size:
                    raise InputError(_nesting(name, shape, depth))
            level = list(chain.from_iterable(level))
        elif len(level) != size:
            raise InputError(_nesting(name, shape, depth))
    if len(level) != count:  # one of more than no dimension, nested in a shape without
        raise InputError(_nesting(name, shape, 0))
    return level


def _nesting(name: str, shape: Sequence[int], depth: int) -> str:
    return f"tensor {name!r}: its nested data does not fit dimension {depth} of {list(shape)}"


def from_bytes(
    body: bytearray, begin: int, end: int, shape: Sequence[int], datatype: str, name: str
) -> Tensor:
    """A tensor over a piece of `body`, without a copy where it is aligned.

    Args:
        body: What was received; the tensor keeps it alive.
        begin: First byte of the tensor.
        end: One past its last, within `body`.
        shape: Checked sizes, none negative.
        datatype: One of `DATATYPES`.
        name: The tensor's, for messages.

    Raises:
        InputError: The piece is not as long as shape and datatype say; a BOOL is neither 0 nor 1.

    Example:
        >>> from_bytes(bytearray(b"xyz") + b"\\x00\\x00\\x80?", 3, 7, [1], "FP32", "x")
        tensor([1.])
    """
    dtype = dtype_of(datatype, name)
    count = math.prod(shape)
    if end - begin != count * dtype.itemsize:
        raise InputError(
            f"tensor {name!r} of shape {list(shape)} and {datatype} takes "
            f"{count * dtype.itemsize} bytes of binary data, got {end - begin}"
        )
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    if datatype == "BOOL":
        small = torch.frombuffer(body, dtype=torch.uint8, offset=begin, count=count)
        if int(small.max()) > 1:
            raise InputError(f"tensor {name!r} is of BOOL and holds a byte that is not 0 or 1")
    if begin % dtype.itemsize:  # vector instructions want it aligned
        body, begin = body[begin:end], 0
    return torch.frombuffer(body, dtype=dtype, offset=begin, count=count).view(tuple(shape))


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row-major.

    Example:
        >>> bytes(bytes_of(torch.tensor([1, 2], dtype=torch.int16)))
        b'\\x01\\x00\\x02\\x00'
    """
    flat = tensor.detach().reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def json_of(tensor: Tensor, name: str) -> Any:
    """The values of a tensor as a flat array for orjson's OPT_SERIALIZE_NUMPY.

    Raises:
        InputError: JSON has no form of them: BF16, NaN, infinities.

    Example:
        >>> json_of(torch.tensor([[1.5], [2.0]]), "y").tolist()
        [1.5, 2.0]
    """
    if tensor.dtype == torch.bfloat16:
        raise InputError(f"tensor {name!r}: BF16 travels as binary data; ask for binary_data: true")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise InputError(
            f"tensor {name!r} holds NaN or infinity, which JSON has no number for; ask for "
            "binary_data: true"
        )
    return tensor.detach().reshape(-1).contiguous().numpy()
