"""`capture`: a training step as a graph to read, run, differentiate, save and compare."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tessera.errors import GraphError
from tessera.graph import store
from tessera.graph import text as printing
from tessera.graph.ir import Node, Program, Ref, TensorType, execute
from tessera.graph.names import closed_over, printable
from tessera.graph.step import training_step

__all__ = ["Graph", "capture"]


def _tracer() -> Any:
    """`graph.trace`, imported when first wanted: PyTorch's tracer brings sympy, which takes a
    third of a second that only those who capture should wait for.
    """
    return importlib.import_module("tessera.graph.trace")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """A captured function: typed ops over its inputs and the tensors it closes over.

    The tensors are the very objects of the function, so `run` sees what training makes of them,
    until `save` writes a copy.

    Attributes:
        program: The data: inputs, constants, nodes, output.

    Example:
        >>> print(capture(lambda x: x.relu(), torch.zeros(2)).text(), end="")
        func @lambda(%x: tensor<2xf32>) -> tensor<2xf32> {
          %relu = aten.relu(%x) : tensor<2xf32>
          return %relu
        }
    """

    program: Program

    def text(self) -> str:
        """Typed text in the manner of MLIR; the same in every process."""
        return printing.text(self.program)

    def dot(self) -> str:
        """A drawing in Graphviz's language: ``dot -Tsvg``."""
        return printing.dot(self.program)

    def ops(self) -> list[Node]:
        """The nodes in order, with op, inputs, attributes, shapes and line."""
        return list(self.program.nodes)

    @property
    def hash(self) -> str:
        """SHA-256 of the text: what is computed, not the weights it is computed with."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def run(self, *inputs: Any) -> Any:
        """What the function returns for these inputs; gradients reach the closed-over tensors.

        Args:
            inputs: As the function takes them, or the tensors one by one.

        Raises:
            GraphError: Another number of tensors, or another shape or dtype, than captured.
        """
        values = pytree.tree_leaves(inputs)
        expected = self.program.inputs
        got = [TensorType.of(v) if isinstance(v, Tensor) else type(v).__name__ for v in values]
        if got != [kind for _, kind in expected]:
            takes = ", ".join(f"%{name}: {kind}" for name, kind in expected)
            raise GraphError(
                f"@{self.program.name} takes ({takes}), got ({', '.join(map(str, got))}); capture "
                "again with examples of the new shapes"
            )
        return execute(self.program, values)

    def joint(self) -> Graph:
        """Forward and backward as one graph that returns (loss, {constant's name: gradient}).

        The gradients are of the trainable constants the loss depends on.

        Raises:
            GraphError: The output is not one 0-d float, or depends on no trainable constant.
        """
        name, output = self.program.name, self.program.output
        trainable = {c.name: c.tensor for c in self.program.constants if c.trainable}
        known = printing.types_of(self.program)
        kind = known[output.name][output.item or 0] if isinstance(output, Ref) else None
        if kind is None or kind.shape or not kind.dtype.is_floating_point:
            raise GraphError(
                f"joint() differentiates one 0-d float; @{name} returns "
                f"{kind if kind is not None else 'several tensors'}. Return the loss alone"
            )
        constants = {c.name: c.tensor for c in self.program.constants}

        def both(*values: Any) -> tuple[Tensor, dict[str, Tensor]]:
            *inputs, tensors = values
            given = dict(zip(constants, tensors, strict=True))
            replaced = tuple(c._replace(tensor=given[c.name]) for c in self.program.constants)
            program = Program(
                name=name,
                inputs=self.program.inputs,
                constants=replaced,
                nodes=self.program.nodes,
                output=output,
            )
            loss = execute(program, inputs)
            if not trainable or not loss.requires_grad:
                raise GraphError(
                    f"joint(): @{name} depends on no trainable constant; close over a model whose "
                    "parameters require gradients, outside tg.no_grad() and .detach()"
                )
            found = torch.autograd.grad(loss, [given[n] for n in trainable], allow_unused=True)
            pairs = zip(trainable, found, strict=True)
            return loss, {n: g for n, g in pairs if g is not None}

        device = next((t.device for t in constants.values()), None)
        examples = {
            n: torch.zeros(k.shape, dtype=k.dtype, device=device) for n, k in self.program.inputs
        }
        return Graph(
            program=_tracer().trace(both, examples, constants, name=f"{name}_joint", joint=True)
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph and a copy of its constants as one safetensors file, atomically.

        Raises:
            GraphError: It holds what the file cannot.
            StorageError: The file could not be written.
        """
        store.write(path, self.program)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Graph:
        """Read what `save` wrote. Nothing of the file is executed.

        Raises:
            MissingDataError: There is no such file.
            GraphError: It is damaged or foreign, or names an op that no graph may hold.
        """
        return Graph(program=store.read(path))


def capture(fn: Callable[..., Any], *example_inputs: Any) -> Graph:
    """Record what a function of tensors computes, as a graph.

    Nothing is trained and no weight changes. The graph is for the shapes and dtypes of the
    examples. A function decorated with `training_step` is captured as it was before.

    Args:
        fn: Returns a tensor, or tensors in tuples, lists and dicts. May close over modules,
            anchors and tensors, which get their names from there: ``%model.0.weight``.
        example_inputs: Tensors, or tuples, lists, dicts and NamedTuples of tensors.

    Raises:
        GraphError: The function's path depends on the data, it writes into what it is given or
            closes over, or it returns no tensor. The message names the line or node.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> graph = capture(lambda x: model(x).sum(), torch.zeros(3, 2))
        >>> [node.op for node in graph.ops()]
        ['aten.linear.default', 'aten.sum.default']
    """
    fn = _undecorated(fn)
    name = printable(_name(fn)).replace(".", "_").strip("_")
    paths, spec = pytree.tree_flatten_with_path(example_inputs)
    arguments = _arguments(fn, len(example_inputs))
    inputs: dict[str, Tensor] = {}
    for path, value in paths:
        label = printable(".".join([arguments[int(_key(path[0]))], *map(_key, path[1:])]))
        if not isinstance(value, Tensor):
            raise GraphError(
                f"capture: the input {label} of {name} is a {type(value).__name__}, not a tensor; "
                "close over it instead: capture(lambda x: step(x, value), x)"
            )
        if label in inputs:
            raise GraphError(f"capture: two inputs of {name} are named {label}; rename one")
        inputs[label] = value
    named = {n if n not in inputs else f"{n}_": t for n, t in closed_over(fn).items()}

    def flat(*values: Tensor) -> Any:
        return fn(*pytree.tree_unflatten(values, spec))

    return Graph(program=_tracer().trace(flat, inputs, named, name=name))


def _undecorated(fn: Callable[..., Any]) -> Callable[..., Any]:
    step = isinstance(fn, FunctionType) and fn.__globals__ is training_step.__globals__
    inner: Callable[..., Any] | None = getattr(fn, "__wrapped__", None) if step else None
    return inner if inner is not None else fn


def _name(fn: Any) -> str:
    if isinstance(fn, functools.partial):
        return _name(fn.func)
    return str(getattr(fn, "__name__", type(fn).__name__)) or "fn"


def _arguments(fn: Callable[..., Any], count: int) -> list[str]:
    """Names of the first `count` positional arguments."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a builtin without one
        return [f"arg{i}" for i in range(count)]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds][:count]
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), "arg")
    return [*names, *(f"{rest}{i}" for i in range(count - len(names)))]


def _key(entry: Any) -> str:
    """One step of a pytree path: an index, a key or an attribute."""
    for attribute in ("name", "key", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
