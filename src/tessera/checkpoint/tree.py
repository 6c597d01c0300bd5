"""Nested values <-> JSON and named tensors.

What JSON knows stays as it is; the rest is an object with a single key that begins with ``$``::

    {"$tensor": name}    the tensor of that name        {"$int": "0x.."}     beyond 53 bits
    {"$tuple": [..]}     a tuple                        {"$float": "7ff8.."}  not finite: its bits
    {"$dict": [[k, v]]}  keys JSON cannot hold          {"$anchor": {..}}    an Anchor
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tessera.arch.anchor import Anchor
from tessera.checkpoint.file import DTYPES
from tessera.errors import CheckpointError

__all__ = ["MAX_DEPTH", "decode", "encode"]

MAX_DEPTH = 64  # far below Python's recursion limit, and what a cycle runs into

# Other JSON readers keep integers as doubles; and Python itself refuses to parse > 4300 digits.
_EXACT_IN_JSON = 2**53


def encode(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """`value` as JSON-ready nodes, and the tensors they refer to by name.

    Args:
        value: None, bool, int, float, str, a dense tensor, an `Anchor`, or lists, tuples and
            mappings of these. Keys are None, bool, int, float or str.

    Returns:
        (nodes, tensors): `tensors` has readable names (the path through the tree), each given
        once; two references to the same memory share a name.

    Raises:
        CheckpointError: Something else is in there; the message gives its path and type.

    Example:
        >>> encode({"lr": 0.1, "m": {0: torch.zeros(1)}})
        ({'lr': 0.1, 'm': {'$dict': [[0, {'$tensor': 'm/0'}]]}}, {'m/0': tensor([0.])})
    """
    encoder = _Encoder()
    return encoder.node(value, ()), encoder.tensors


class _Encoder:
    def __init__(self) -> None:
        # Holding every tensor also keeps its memory from being reused, which `_named` relies on.
        self.tensors: dict[str, Tensor] = {}
        self._named: dict[object, str] = {}

    def node(self, value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > MAX_DEPTH:
            raise CheckpointError(
                f"a checkpoint holds at most {MAX_DEPTH} levels, and {'/'.join(path[:8])}/... "
                "goes deeper; does it contain itself?"
            )
        # Exact types: a subclass (np.float64, an IntEnum, a namedtuple) would not come back.
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if abs(value) < _EXACT_IN_JSON else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if isinstance(value, Tensor):
            return {"$tensor": self._tensor(value, path)}
        if isinstance(value, Anchor):
            return {"$anchor": self._anchor(value, path)}
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if kind is list:
            return self._items(value, path)
        if kind in (tuple, torch.Size):
            return {"$tuple": self._items(value, path)}
        raise _refusal(path, kind.__name__, _advice(value))

    def _items(self, items: list[Any] | tuple[Any, ...], path: tuple[str, ...]) -> list[Any]:
        steps = (x.name if isinstance(x, Anchor) else str(i) for i, x in enumerate(items))
        return [self.node(x, (*path, step)) for x, step in zip(items, steps, strict=True)]

    def _mapping(self, mapping: Mapping[Any, Any], path: tuple[str, ...]) -> dict[str, Any]:
        pairs: list[Any] = []
        for key, value in mapping.items():
            if key is not None and type(key) not in (bool, int, float, str):
                raise _refusal(path, f"mapping with a key of type {type(key).__name__}", "")
            pairs.append([self.node(key, path), self.node(value, (*path, _label(key)))])
        if all(type(key) is str and not key.startswith("$") for key in mapping):
            return dict(pairs)
        return {"$dict": pairs}

    def _anchor(self, anchor: Anchor, path: tuple[str, ...]) -> dict[str, Any]:
        if not _fits_anchor(anchor.name, anchor.params, anchor.stats):
            raise _refusal(path, "malformed anchor", "")
        # Its own checks again: what was written into it since would be refused on loading.
        Anchor(anchor.name, anchor.params, anchor.stats)
        return {
            "name": self.node(anchor.name, path),
            "params": self.node(anchor.params, (*path, "params")),
            "stats": self.node(anchor.stats, path),
        }

    def _tensor(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        kind = type(tensor)
        if kind not in (Tensor, nn.Parameter):
            raise _refusal(path, kind.__name__, "; store a plain tensor")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            raise _refusal(path, f"tensor of layout {tensor.layout}", "; store a dense one")
        if tensor.is_meta:
            raise _refusal(path, "tensor without data (device meta)", "")
        if tensor.dtype not in DTYPES.values():
            raise _refusal(path, f"tensor of {tensor.dtype}", "; convert it with .to(...)")
        place = _place(tensor)
        if place not in self._named:
            self._named[place] = name = self._free_name(path)
            self.tensors[name] = tensor
        return self._named[place]

    def _free_name(self, path: tuple[str, ...]) -> str:
        # Half a surrogate pair is a legal Python string and no legal safetensors name.
        base = "/".join(path).encode("utf-8", "replace").decode()
        name, count = base, 1
        while name in self.tensors or name == "__metadata__":
            count += 1
            name = f"{base}~{count}"
        return name


def _label(key: Any) -> str:
    # str() refuses integers of more than 4300 digits; hex() takes any.
    return hex(key) if type(key) is int and abs(key) >= _EXACT_IN_JSON else str(key)


def _place(tensor: Tensor) -> object:
    """Equal for two tensors that are the same elements of the same memory."""
    if not tensor.numel():
        return object()  # no memory, hence nothing to share
    seen_through = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return tensor.device, tensor.data_ptr(), *seen_through


def _refusal(path: tuple[str, ...], what: str, advice: str) -> CheckpointError:
    return CheckpointError(
        f"a checkpoint cannot hold {'/'.join(path) or 'the value'}, a {what}{advice}. It holds "
        "None, bool, int, float, str, dense tensors, anchors, and lists, tuples and mappings "
        "of these; nothing was written"
    )


def _advice(value: object) -> str:
    for method in ("state_dict", "item"):
        if hasattr(value, method):
            return f"; pass its .{method}()"
    return ""


def decode(nodes: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `encode` took apart.

    Args:
        nodes: Parsed JSON, from anywhere: its shape is checked.
        tensors: What the nodes may refer to; each must be referred to.

    Raises:
        ValueError: The nodes are not what `encode` makes (AnchorError included).

    Example:
        >>> decode({"$tuple": [1, {"$tensor": "w"}]}, {"w": torch.zeros(1)})
        (1, tensor([0.]))
    """
    decoder = _Decoder(tensors)
    value = decoder.value(nodes, 0)
    unused = sorted(set(tensors) - decoder.used)
    if unused:
        raise ValueError(f"nothing in its tree refers to the tensor {unused[0]!r}")
    return value


class _Decoder:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.used: set[str] = set()
        self._tensors = tensors
        self._tags: dict[str, Callable[[Any, int], Any]] = {
            "$tensor": self._tensor,
            "$tuple": self._tuple,
            "$dict": self._dict,
            "$int": self._int,
            "$float": self._float,
            "$anchor": self._anchor,
        }

    def value(self, node: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"its tree is deeper than {MAX_DEPTH} levels")
        if isinstance(node, list):
            return [self.value(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        for key in node:
            if key.startswith("$"):
                if len(node) > 1 or key not in self._tags:
                    raise ValueError(f"its tree has an unknown node {key!r}")
                return self._tags[key](node[key], depth)
        return {key: self.value(item, depth + 1) for key, item in node.items()}

    def _tensor(self, name: Any, depth: int) -> Tensor:
        if not isinstance(name, str) or name not in self._tensors:
            raise ValueError(f"its tree refers to a tensor {name!r} that is not there")
        self.used.add(name)
        return self._tensors[name]

    def _tuple(self, items: Any, depth: int) -> tuple[Any, ...]:
        return tuple(self.value(item, depth + 1) for item in _expect(list, items))

    def _dict(self, pairs: Any, depth: int) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        for pair in _expect(list, pairs):
            if len(_expect(list, pair)) != 2:
                raise ValueError("its tree has a mapping of something else than pairs")
            key = self.value(pair[0], depth)
            if key is not None and type(key) not in (bool, int, float, str):
                raise ValueError(f"its tree has a key of type {type(key).__name__}")
            out[key] = self.value(pair[1], depth + 1)
        return out

    def _int(self, digits: Any, depth: int) -> int:
        return int(_expect(str, digits), 16)

    def _float(self, digits: Any, depth: int) -> float:
        packed = bytes.fromhex(_expect(str, digits))
        if len(packed) != 8:
            raise ValueError("its tree has a float of another size than 8 bytes")
        number: float = struct.unpack(">d", packed)[0]
        return number

    def _anchor(self, node: Any, depth: int) -> Anchor:
        if list(_expect(dict, node)) != ["name", "params", "stats"]:
            raise ValueError("its tree has an anchor that is no (name, params, stats)")
        name = node["name"]
        params = self.value(node["params"], depth + 1)
        stats = self.value(node["stats"], depth)
        if not _fits_anchor(name, params, stats):
            raise ValueError("its tree has an anchor with something else than named tensors")
        return Anchor(name, params, stats)


def _fits_anchor(name: object, params: object, stats: object) -> bool:
    """Whether the types are those Anchor's own checks take for granted."""
    if not isinstance(name, str) or not isinstance(stats, Mapping):
        return False
    return all(
        isinstance(named, Mapping) and all(isinstance(t, Tensor) for t in named.values())
        for named in (params, stats.get("fisher", {}), stats.get("path_integral", {}))
    )


def _expect(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"its tree has a {type(value).__name__} in place of a {kind.__name__}")
    return value
