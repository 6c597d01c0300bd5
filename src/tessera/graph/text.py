"""A graph for people: typed text in the manner of MLIR, and a drawing."""

from __future__ import annotations

import json
from typing import Any

import torch

from tessera.graph.ir import Constant, Node, Program, Ref, TensorType, find_op, refs, region_of

__all__ = ["PROGRAMS", "dot", "text"]

PROGRAMS: dict[str, Program] = {}  # those that ops hold, by content hash


def text(program: Program) -> str:
    """The program as typed text; equal programs have equal text."""
    return "\n".join(_function(program, f"func @{program.name}")) + "\n"


def _function(program: Program, head: str) -> list[str]:
    arguments = ", ".join(f"%{name}: {kind}" for name, kind in program.inputs)
    lines = [f"{head}({arguments}) -> {_output_type(program)} {{"]
    if program.constants:
        lines += ["  params {", *(f"    {_constant(c)}" for c in program.constants), "  }"]
    inside = False
    for node in program.nodes:
        if node.no_grad != inside:
            lines.append("  no_grad {" if node.no_grad else "  }")
            inside = node.no_grad
        lines += [f"{'    ' if inside else '  '}{line}" for line in _node(node)]
    if inside:
        lines.append("  }")
    return [*lines, f"  return {_value(program.output)}", "}"]


def _constant(c: Constant) -> str:
    return f"%{c.name}: {TensorType.of(c.tensor)}" + (" trainable" if c.trainable else "")


def short(op: str) -> str:
    """The op without its overload, which the arguments imply."""
    return op.rpartition(".")[0]


def _node(node: Node) -> list[str]:
    """The node's line, and its region below it."""
    held = region_of(node)
    order = [a.name for a in find_op(node.op, node.name)._schema.arguments]
    operands: list[str] = []
    attributes: list[str] = []
    for at, (name, value) in enumerate(node.arguments):
        if held is not None and name == held[0]:
            continue
        if next(refs(value), None) is None:
            attributes.append(f"{name} = {_value(value)}")
        else:  # by name where an attribute or a default stands before it
            gap = len(operands) != at or order[at] != name
            operands.append(f"{name} = {_value(value)}" if gap else _value(value))
    braces = f" {{{', '.join(attributes)}}}" if attributes else ""
    types = ", ".join(map(_kind, node.types))
    count = f":{len(node.types)}" if node.several else ""
    kind = f"({types})" if node.several else types
    line = f"%{node.name}{count} = {short(node.op)}({', '.join(operands)}){braces} : {kind}"
    if held is None:
        return [line]
    inner = _function(PROGRAMS[held[1]], held[0])
    return [f"{line} {{", *(f"  {text}" for text in inner), "}"]


def _value(value: Any) -> str:
    if isinstance(value, Ref):
        return str(value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.device):
        return value.type  # cuda:0 and cuda:1 are the same program
    return str(value).removeprefix("torch.") if not isinstance(value, float) else repr(value)


def _kind(kind: TensorType | None) -> str:
    return "none" if kind is None else str(kind)


def types_of(program: Program) -> dict[str, tuple[TensorType | None, ...]]:
    """Types of every value."""
    known: dict[str, tuple[TensorType | None, ...]] = {n: (kind,) for n, kind in program.inputs}
    known |= {c.name: (TensorType.of(c.tensor),) for c in program.constants}
    return known | {node.name: node.types for node in program.nodes}


def _output_type(program: Program) -> str:
    known = types_of(program)

    def show(value: Any) -> str:
        if isinstance(value, Ref):
            return str(known[value.name][value.item or 0])
        items = value.values() if isinstance(value, dict) else value
        return f"({', '.join(show(v) for v in items)})"

    return show(program.output)


def dot(program: Program) -> str:
    """The program as a Graphviz digraph: inputs, constants (grey), ops (dashed in no_grad)."""
    lines = [f"digraph {json.dumps(program.name)} {{", "  node [shape=box, fontname=monospace];"]

    def add(name: str, label: str, style: str) -> None:
        lines.append(f"  {json.dumps(name)} [label={json.dumps(label)}, {style}];")

    for name, kind in program.inputs:
        add(name, f"%{name}\n{kind}", "shape=ellipse")
    for c in program.constants:
        add(c.name, f"%{c.name}\n{TensorType.of(c.tensor)}", 'style=filled, fillcolor="#dddddd"')
    for node in program.nodes:
        label = f"{short(node.op)}\n{', '.join(map(_kind, node.types))}"
        add(node.name, label, "style=dashed" if node.no_grad else "style=solid")
        lines += [f"  {json.dumps(n)} -> {json.dumps(node.name)};" for n in node.inputs]
    names = {node.name for node in program.nodes} | set(types_of(program))
    end = next(
        n for n in ("return", *(f"return{i}" for i in range(len(names) + 1))) if n not in names
    )
    add(end, "return", "shape=ellipse")
    lines += [f"  {json.dumps(r.name)} -> {json.dumps(end)};" for r in refs(program.output)]
    return "\n".join([*lines, "}"]) + "\n"
