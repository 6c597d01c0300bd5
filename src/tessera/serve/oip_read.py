"""Reading the Open Inference Protocol's JSON: each field checked before anything is made of it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from tessera.errors import InputError
from tessera.serve.datatypes import dtype_of, from_bytes, from_json
from tessera.serve.settings import Limits

__all__ = [
    "Binary",
    "only_known",
    "read_flag",
    "read_outputs",
    "read_parameters",
    "read_tensors",
    "read_text",
]

_TENSOR = frozenset({"name", "shape", "datatype", "parameters", "data"})
_OUTPUT = frozenset({"name", "parameters"})


@final
class Binary:
    """What follows the JSON, taken in turn by the tensors that say how much of it is theirs."""

    def __init__(self, body: bytes | bytearray, begin: int) -> None:
        self._body = body
        self._next = begin

    def take(self, size: int, shape: list[int], datatype: str, name: str) -> Tensor:
        """The next `size` bytes as a tensor."""
        begin, end = self._next, self._next + size
        if end > len(self._body):
            raise InputError(
                f"tensor {name!r} has a binary_data_size of {size}, {len(self._body) - begin} "
                "bytes are left of the body"
            )
        if not isinstance(self._body, bytearray):
            self._body = bytearray(self._body)  # torch wants memory it could write to
        self._next = end
        return from_bytes(self._body, begin, end, shape, datatype, name)

    def end(self) -> None:
        """Raise unless all bytes are taken."""
        left = len(self._body) - self._next
        if left:
            raise InputError(f"{left} bytes of the body belong to no tensor")


def read_tensors(said: object, kind: str, binary: Binary, limits: Limits) -> dict[str, Tensor]:
    """The tensors of a request's inputs, or of an answer's outputs."""
    if type(said) is not list:
        raise InputError(f"{kind} must be a list of tensors, it is {_shown(said)}")
    if len(said) > limits.tensors:
        raise InputError(f"at most {limits.tensors} {kind}, got {len(said)}")
    found: dict[str, Tensor] = {}
    for place, one in enumerate(said):
        where = f"{kind}[{place}]"
        if type(one) is not dict:
            raise InputError(f"{where} must be an object, it is {_shown(one)}")
        only_known(one, _TENSOR, where)
        name = read_text(one.get("name"), f"{where}.name", limits)
        if not name:
            raise InputError(f"{where} has no name")
        if name in found:
            raise InputError(f"{kind} has {name[:60]!r} twice")
        found[name] = _tensor(one, name, binary, limits)
    binary.end()
    return found


def _tensor(one: dict[str, Any], name: str, binary: Binary, limits: Limits) -> Tensor:
    name = name[:60]
    datatype = one.get("datatype")
    dtype_of(datatype, name)
    assert isinstance(datatype, str)
    shape = _shape(one.get("shape"), name, limits)
    size = None
    if "parameters" in one:
        parameters = read_parameters(one, f"tensor {name!r}")
        if "shared_memory_region" in parameters:
            raise InputError(f"tensor {name!r} is in shared memory, which is not offered; send it")
        size = parameters.get("binary_data_size")
    if size is None:
        if "data" not in one:
            raise InputError(f"tensor {name!r} has no data and no binary_data_size")
        return from_json(one["data"], shape, datatype, name)
    if type(size) is not int or size < 0:
        raise InputError(f"tensor {name!r} has the binary_data_size {_shown(size)}")
    if "data" in one:
        raise InputError(f"tensor {name!r} has data and a binary_data_size; give one of them")
    return binary.take(size, shape, datatype, name)


def _shape(said: object, name: str, limits: Limits) -> list[int]:
    if type(said) is not list or not all(type(size) is int for size in said):
        raise InputError(f"tensor {name!r} has no list of sizes as shape, but {_shown(said)}")
    if len(said) > limits.dimensions:
        raise InputError(
            f"tensor {name!r} has {len(said)} dimensions, at most {limits.dimensions} are taken"
        )
    # Zeros do not excuse what stands beside them: torch counts strides past them, in 64 bits.
    if not all(size >= 0 for size in said) or (
        math.prod(max(size, 1) for size in said) > limits.elements
    ):
        raise InputError(
            f"tensor {name!r} has the shape {_shown(said)}; sizes are 0 or more, and at most "
            f"{limits.elements} elements are taken"
        )
    return said


def read_outputs(said: object, binary: bool, limits: Limits) -> tuple[tuple[str, bool], ...]:
    """What is asked for, and whether as binary data."""
    if said is None:
        return ()
    if type(said) is not list or len(said) > limits.tensors:
        raise InputError(f"outputs must be a list of at most {limits.tensors}, it is not")
    found: dict[str, bool] = {}
    for place, one in enumerate(said):
        where = f"outputs[{place}]"
        if type(one) is not dict:
            raise InputError(f"{where} must be an object, it is {_shown(one)}")
        only_known(one, _OUTPUT, where)
        name = read_text(one.get("name"), f"{where}.name", limits)
        if name in found:
            raise InputError(f"outputs has {name[:60]!r} twice")
        parameters = read_parameters(one, where)
        for word in ("classification", "shared_memory_region"):
            if parameters.get(word):
                raise InputError(f"{where} asks for {word}, which is not offered")
        asked = read_flag(parameters, "binary_data", where)
        found[name] = binary if asked is None else asked
    return tuple(found.items())


def read_parameters(said: dict[str, Any], where: str) -> dict[str, Any]:
    """The plain values an object of the request carries beside its fields."""
    found = said.get("parameters")
    if found is None:
        return {}
    if type(found) is not dict or not all(
        isinstance(v, str | bool | int | float) for v in found.values()
    ):
        raise InputError(
            f"the parameters of {where} must be an object of text, numbers and bools, they are "
            f"{_shown(found)}"
        )
    return found


def read_flag(parameters: Mapping[str, Any], name: str, where: str) -> bool | None:
    """A bool among them; None if it is not there."""
    value = parameters.get(name)
    if value is not None and type(value) is not bool:
        raise InputError(f"{name} of {where} must be true or false, it is {_shown(value)}")
    return value


def read_text(said: object, what: str, limits: Limits) -> str:
    """A name or an id."""
    if type(said) is not str or len(said) > limits.text:
        raise InputError(f"{what} must be text of at most {limits.text} characters: {_shown(said)}")
    return said


def only_known(said: dict[str, Any], names: frozenset[str], where: str) -> None:
    """Raise if there is a field that the protocol does not have: a misspelt one would be lost."""
    if not said.keys() <= names:
        extra = min(said.keys() - names)
        raise InputError(
            f"{where} has a field {extra[:60]!r}; it has {', '.join(sorted(names))} only"
        )


def _shown(value: object) -> str:
    return "missing" if value is None else reprlib.repr(value)
