"""A graph as one safetensors file: constants as tensors, the rest as JSON. Nothing is executed.

The metadata (strings only) holds "format", "version", "graph" (JSON) and "sha256", the digest of
the graph and the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tessera import trees
from tessera.errors import GraphError, MissingDataError
from tessera.files import write_whole
from tessera.graph.ir import Constant, Node, Program, Ref, TensorType, check, region_of
from tessera.graph.regions import register
from tessera.graph.text import PROGRAMS

__all__ = ["VERSION", "read", "write"]

VERSION = 1
_FORMAT = "tessera-graph"
_TORCH = (torch.dtype, torch.layout, torch.memory_format)


def write(path: str | os.PathLike[str], program: Program) -> None:
    """Write the program and a copy of its constants, whole or not at all.

    Raises:
        GraphError: A constant or attribute has no place in the file.
        StorageError: The file could not be written; what stood there is unchanged.
    """
    tensors = {c.name: c.tensor.detach().cpu().contiguous().clone() for c in program.constants}
    regions = {name: _to_json(PROGRAMS[name]) for name in _regions(program)}
    tree = _to_json(program) | ({"regions": regions} if regions else {})
    graph = json.dumps(tree, allow_nan=False, separators=(",", ":"))
    metadata = {"format": _FORMAT, "version": str(VERSION), "graph": graph}
    metadata["sha256"] = _digest(graph, tensors)
    try:
        data = safetensors.torch.save(tensors, metadata)
    except (ValueError, KeyError, RuntimeError) as error:
        raise GraphError(f"a constant of @{program.name} cannot be saved: {error}") from error
    write_whole(path, data)


def read(path: str | os.PathLike[str]) -> Program:
    """The program that `write` wrote, checked before anything can run.

    Raises:
        MissingDataError: There is no such file.
        GraphError: It is damaged, foreign, too new, or holds an op no graph may hold.
    """
    where = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise GraphError(f"{where} is not a file, hence no graph")
        with safetensors.safe_open(where, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise GraphError(f"{where} is a safetensors file, but not one of Graph.save")
            version = metadata.get("version", "")
            if version.isdecimal() and int(version[:9]) > VERSION:
                raise GraphError(
                    f"{where} was written by a newer Tessera (format {version}, this one reads up "
                    f"to {VERSION}). Upgrade with: pip install -U tessera-lifelong"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        graph = metadata["graph"]
        if version != str(VERSION) or metadata["sha256"] != _digest(graph, tensors):
            raise ValueError("its checksum does not match")
        tree = json.loads(graph)
        for name, inner in tree.get("regions", {}).items():
            region = _from_json(inner, {})
            check(region)
            if register(region) != name:
                raise ValueError(f"its region {name!r} has another hash")
        program = _from_json(tree, tensors)
        check(program)
    except FileNotFoundError as error:
        raise MissingDataError(
            f"there is no graph at {where}; make one with graph.save(path)"
        ) from error
    except GraphError as error:
        raise GraphError(f"{where}: {error}") from error
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,  # RecursionError among them
    ) as error:
        raise GraphError(f"{where} is no graph, or a damaged one: {error}") from error
    return program


def _regions(program: Program) -> dict[str, None]:
    """Names of the regions of its nodes."""
    return {held[1]: None for n in program.nodes if (held := region_of(n)) is not None}


def _digest(graph: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(f"{graph}\n{trees.sha256(tensors)}".encode()).hexdigest()


def _to_json(program: Program) -> dict[str, Any]:
    return {
        "name": program.name,
        "inputs": [[name, _type(kind)] for name, kind in program.inputs],
        "constants": [[c.name, c.trainable] for c in program.constants],
        "nodes": [
            {
                "name": n.name,
                "op": n.op,
                "arguments": [[name, _encode(value)] for name, value in n.arguments],
                "types": [None if t is None else _type(t) for t in n.types],
                "several": n.several,
                "no_grad": n.no_grad,
                "line": n.line,
            }
            for n in program.nodes
        ],
        "output": _encode(program.output),
    }


def _from_json(tree: Any, tensors: dict[str, Tensor]) -> Program:
    constants = []
    for name, trainable in tree["constants"]:
        constants.append(Constant(_text(name), tensors[name].requires_grad_(trainable is True)))
    if set(tensors) != {c.name for c in constants}:
        raise ValueError("its tensors are not its constants")
    nodes = tuple(
        Node(
            name=_text(n["name"]),
            op=_text(n["op"]),
            arguments=tuple((_text(name), _decode(value)) for name, value in n["arguments"]),
            types=tuple(None if t is None else _read_type(t) for t in n["types"]),
            several=n["several"] is True,
            no_grad=n["no_grad"] is True,
            line=None if n["line"] is None else _text(n["line"]),
        )
        for n in tree["nodes"]
    )
    return Program(
        name=_text(tree["name"]),
        inputs=tuple((_text(name), _read_type(kind)) for name, kind in tree["inputs"]),
        constants=tuple(constants),
        nodes=nodes,
        output=_decode(tree["output"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r} is not a name")
    return value


def _type(kind: TensorType) -> list[Any]:
    return [list(kind.shape), str(kind.dtype)]


def _read_type(value: Any) -> TensorType:
    shape, dtype = value
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape!r} is not a shape")
    return TensorType(tuple(shape), _torch(dtype, torch.dtype))


def _torch(name: Any, kind: type | tuple[type, ...]) -> Any:
    """`torch.float32` and its like by name; nothing else of torch."""
    found = getattr(torch, _text(name).removeprefix("torch."), None)
    if not isinstance(found, kind):
        raise ValueError(f"{name!r} is not a constant of torch")
    return found


def _encode(value: Any) -> Any:
    """JSON for an argument or output: what JSON cannot say is an object with one tag."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Ref):
        return {"ref": [value.name, value.item]}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v)] for k, v in value.items()]}
    if isinstance(value, _TORCH):
        return {"torch": str(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise GraphError(f"an attribute is a {type(value).__name__}, which no graph may hold")


def _decode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list):
        return [_decode(v) for v in value]
    match value:
        case {"ref": [str(name), None | int() as index]}:
            return Ref(name, index)
        case {"float": str(text)}:
            return float.fromhex(text)
        case {"complex": [str(real), str(imag)]}:
            return complex(float.fromhex(real), float.fromhex(imag))
        case {"tuple": list(items)}:
            return tuple(_decode(v) for v in items)
        case {"dict": list(items)}:
            return {_text(k): _decode(v) for k, v in items}
        case {"torch": name}:
            return _torch(name, _TORCH)
        case {"device": str(text)}:
            try:
                return torch.device(text)
            except RuntimeError as error:
                raise ValueError(f"{text!r} is not a device") from error
    raise ValueError(f"{value!r} is not an attribute")
