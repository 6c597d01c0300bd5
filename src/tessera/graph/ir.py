"""The values a graph is made of, what is allowed in one, and how it is executed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera.errors import GraphError
from tessera.ops.registry import OPS, REGIONS

__all__ = [
    "Constant",
    "Node",
    "Program",
    "Ref",
    "TensorType",
    "check",
    "execute",
    "find_op",
    "region_of",
]

NAMESPACES = ("aten", "tessera")
_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
# What an argument may be: nothing that names a file, a storage, a stream or code.
_ARGUMENTS = {"Tensor", "number", "int", "float", "bool", "str", "complex", "Generator"}
_ARGUMENTS |= {"Device", "ScalarType", "Layout", "MemoryFormat", "SymInt"}


class Ref(NamedTuple):
    """A value by its name; `item` picks one of an op's several results."""

    name: str
    item: int | None = None

    def __str__(self) -> str:
        return f"%{self.name}" + ("" if self.item is None else f"#{self.item}")


class TensorType(NamedTuple):
    """Shape and dtype; printed as ``tensor<5x4xf32>``."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = _DTYPES.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"tensor<{''.join(f'{n}x' for n in self.shape)}{dtype}>"

    @classmethod
    def of(cls, tensor: Tensor) -> TensorType:
        """The type of a tensor."""
        return cls(tuple(int(n) for n in tensor.shape), tensor.dtype)


class Constant(NamedTuple):
    """A tensor the function closes over; the graph holds the object itself, not a copy."""

    name: str
    tensor: Tensor

    @property
    def trainable(self) -> bool:
        """Whether gradients reach it."""
        return self.tensor.requires_grad


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Node:
    """One op of a graph.

    Attributes:
        name: Of its result, unique in the graph.
        op: Namespace, name and overload, e.g. "aten.linear.default", "tessera.ewc.default".
        arguments: (argument's name, value) in the order of the op's schema; a tensor is a `Ref`.
        types: Of its results; None for one that its op was told not to compute.
        several: Whether it returns a list or tuple of tensors.
        no_grad: Whether it stands in a no_grad region.
        line: The user's line, as "step.py:12"; None where unknown.

    Example:
        >>> Node(name="relu", op="aten.relu.default", arguments=(("self", Ref("x")),), types=())
        relu = aten.relu.default(%x)
    """

    name: str
    op: str
    arguments: tuple[tuple[str, Any], ...]
    types: tuple[TensorType | None, ...]
    several: bool = False
    no_grad: bool = False
    line: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values it reads, in order."""
        return tuple(ref.name for _, value in self.arguments for ref in refs(value))

    @property
    def attributes(self) -> dict[str, Any]:
        """Its arguments that are not tensors, by name."""
        return {name: v for name, v in self.arguments if not _holds_ref(v)}

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of its results."""
        return tuple(() if t is None else t.shape for t in self.types)

    def __repr__(self) -> str:
        return f"{self.name} = {self.op}({', '.join(f'%{n}' for n in self.inputs)})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """A graph's data. `output` nests refs in tuples, lists and dicts."""

    name: str
    inputs: tuple[tuple[str, TensorType], ...]
    constants: tuple[Constant, ...]
    nodes: tuple[Node, ...]
    output: Any


def refs(value: Any) -> Iterator[Ref]:
    """The refs in an argument or output."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from refs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs(item)


def _holds_ref(value: Any) -> bool:
    return next(refs(value), None) is not None


def find_op(op: str, node: str) -> torch._ops.OpOverload:
    """The op of that exact name, if a graph may hold it. Nothing is executed or imported.

    Raises:
        GraphError: No such op, or not a function of tensors and numbers.
    """
    where = f"node %{node}: op {op!r}"
    found = re.fullmatch(r"(aten|tessera)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", op)
    if not found:
        raise GraphError(
            f"{where} is not of the form namespace.name.overload with a namespace among "
            f"{', '.join(NAMESPACES)}; write it with torch functions or register it as in "
            "docs/guide/ir.md"
        )
    space, name, overload = found.groups()
    unknown = GraphError(
        f"{where} does not exist in this PyTorch ({torch.__version__}) and Tessera; it was saved "
        "with another version, or the file is not to be trusted"
    )
    if name.startswith("__") or not torch._C._dispatch_has_kernel(
        f"{space}::{name}" + ("" if overload == "default" else f".{overload}")
    ):
        raise unknown
    packet = getattr(getattr(torch.ops, space), name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise unknown
    overloads: list[str] = packet.overloads()  # type: ignore[no-untyped-call]
    if overload not in overloads:
        raise unknown
    target: torch._ops.OpOverload = getattr(packet, overload)
    for a in target._schema.arguments:
        kinds = set(re.findall(r"\w+", str(a.type))) - {"Optional", "List"}
        if not kinds <= _ARGUMENTS or "file" in a.name:
            raise GraphError(f"{where} takes {a.type} {a.name}, which no graph may hold")
    results = {re.sub(r"\W|List", "", str(r.type)) for r in target._schema.returns}
    if results != {"Tensor"} or "file" in name:
        raise GraphError(f"{where} is not a function from tensors to tensors")
    return target


def region_of(node: Node) -> tuple[str, str] | None:
    """(argument, name) of the region the node's op holds, if it holds one."""
    space, name, _ = node.op.split(".")
    argument = OPS[name].region if space == "tessera" and name in OPS else None
    return (argument, node.attributes[argument]) if argument else None


def check(program: Program) -> None:
    """Refuse what cannot run: unknown ops or values, wrong arguments, and mutated inputs.

    Raises:
        GraphError: It names the node and what to change.
    """
    results: dict[str, Node | None] = {}
    roots: dict[str, set[str]] = {}  # value -> inputs and constants whose memory it may share
    for name in (*(n for n, _ in program.inputs), *(c.name for c in program.constants)):
        if name in results:
            raise GraphError(f"two values are named %{name}")
        results[name], roots[name] = None, {name}
    for node in program.nodes:
        for _, value in node.arguments:
            _check_refs(value, results, f"node %{node.name} ({node.op})")
        if node.name in results:
            raise GraphError(f"two values are named %{node.name}")
        _check_arguments(node)
        roots[node.name] = _check_writes(node, roots)
        results[node.name] = node
    _check_refs(program.output, results, "the output")
    if not _is_nest(program.output):
        raise GraphError("the output is not a nest of values in tuples, lists and dicts")


def _is_nest(value: Any) -> bool:
    if isinstance(value, Ref):
        return True
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, tuple | list | dict) and all(_is_nest(v) for v in items)


def _check_refs(value: Any, results: Mapping[str, Node | None], where: str) -> None:
    for ref in refs(value):
        if ref.name not in results:
            raise GraphError(f"{where} reads {ref}, which nothing before it defines")
        node = results[ref.name]
        several = node is not None and node.several
        count = len(node.types) if node is not None else 1
        if several != (ref.item is not None) or not 0 <= (ref.item or 0) < count:
            raise GraphError(f"{where} reads {ref}, but %{ref.name} has {count} results")
        if node is not None and node.types[ref.item or 0] is None:
            raise GraphError(f"{where} reads {ref}, which its op was told not to compute")


def _check_arguments(node: Node) -> None:
    schema = find_op(node.op, node.name)._schema
    known = {a.name: a for a in schema.arguments}
    given = [name for name, _ in node.arguments]
    missing = [
        a.name for a in schema.arguments if not a.has_default_value() and a.name not in given
    ]
    if missing or len(set(given)) != len(given) or not set(given) <= set(known):
        raise GraphError(
            f"node %{node.name}: op {node.op!r} has the arguments {', '.join(known)}, "
            f"got {', '.join(given) or 'none'}"
        )
    held = region_of(node)
    if held is not None and held[1] not in REGIONS:
        raise GraphError(
            f"node %{node.name} ({node.op}) holds the region {held[1]!r}, which is not known here: "
            "make it with tg.gradient_region, or load it with a graph that was saved with it"
        )


def _check_writes(node: Node, roots: Mapping[str, set[str]]) -> set[str]:
    """What the node's results may share memory with; an error if it writes into it."""
    schema = find_op(node.op, node.name)._schema
    known = {a.name: a for a in schema.arguments}
    statistics = dict(node.arguments)
    running = any(k.endswith("norm.default") for k in (node.op,)) and (
        statistics.get("training") is True or statistics.get("use_input_stats") is True
    )
    shared: set[str] = set()
    for name, value in node.arguments:
        touched = {root for ref in refs(value) for root in roots[ref.name]}
        alias = known[name].alias_info
        writes = alias is not None and alias.is_write
        if touched and (writes or (running and name.startswith("running_"))):
            at = f" at {node.line}" if node.line else ""
            raise GraphError(
                f"node %{node.name} ({node.op}){at} writes into %{min(touched)}, which the step "
                "is given or closes over; a graph changes nothing outside itself. Use the "
                "out-of-place form (x + 1 for x.add_(1)) or x.clone(); for running statistics "
                "of a norm, model.eval()"
            )
        if alias is not None:
            shared |= touched
    return shared


def execute(program: Program, values: list[Tensor]) -> Any:
    """Run the nodes in order on the inputs and the constants as they are now."""
    known: dict[str, Any] = {c.name: c.tensor for c in program.constants}
    known.update(zip((name for name, _ in program.inputs), values, strict=True))

    def get(ref: Ref) -> Any:
        value = known[ref.name]
        return value if ref.item is None else value[ref.item]

    for node in program.nodes:
        op = find_op(node.op, node.name)
        given = {name: substitute(value, get) for name, value in node.arguments}
        positional: list[Any] = []
        for a in op._schema.arguments:
            if a.kwarg_only or a.name not in given:
                break
            positional.append(given.pop(a.name))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not node.no_grad):
            known[node.name] = op(*positional, **given)
    return substitute(program.output, get)


def substitute(value: Any, get: Callable[[Ref], Any]) -> Any:
    """The same nest with every ref replaced."""
    if isinstance(value, Ref):
        return get(value)
    if isinstance(value, tuple | list):
        return type(value)(substitute(v, get) for v in value)
    if isinstance(value, dict):
        return {k: substitute(v, get) for k, v in value.items()}
    return value
