"""From a function to a program: PyTorch's pre-dispatch trace, with the user's names and lines."""

from __future__ import annotations

import operator
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from tessera.errors import GraphError
from tessera.graph.ir import Constant, Node, Program, Ref, TensorType, check, find_op, refs

__all__ = ["trace"]

_DATA_DEPENDENT = (
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
)
_REMEDY = (
    "a graph has one path for all data: choose between values with torch.where, weigh rows by a "
    "mask instead of selecting them, and keep .item(), float() and .numpy() outside the step"
)
# Frames of these folders are not the user's.
_LIBRARIES = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)


def trace(
    fn: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    named: Mapping[str, Tensor],
    *,
    name: str,
    joint: bool = False,
) -> Program:
    """Trace `fn`, a function of as many tensors as `inputs` has.

    Args:
        fn: Returns tensors in tuples, lists and dicts.
        inputs: Name -> example, in the order of the arguments.
        named: Names for tensors met as constants; with `joint`, `fn` takes them as a last argument.
        name: Of the program.
        joint: Differentiate while tracing: what autograd runs becomes nodes too.
    """
    arguments: list[Any] = [*inputs.values(), *([list(named.values())] if joint else [])]
    before = [] if joint else [(t, t._version, t.detach().clone()) for t in named.values()]
    returned: list[Any] = []

    def run(*values: Any) -> list[Tensor]:
        with _Lines():
            returned[:] = [fn(*values)]
        leaves: list[Tensor] = []
        _collect(returned[0], leaves, name)
        return leaves

    try:
        with torch.enable_grad(), fx_traceback.preserve_node_meta():
            traced = make_fx(
                run,
                tracing_mode="fake",
                pre_dispatch=not joint,
                _allow_non_fake_inputs=True,
            )(*arguments)
    except _DATA_DEPENDENT as error:
        raise _data_dependent(error, name) from error
    except RuntimeError as error:
        if ".numpy() is not supported" in str(error):
            raise _data_dependent(error, name) from error
        raise
    finally:
        # A step that writes into what it closes over is refused below, and undone here.
        for tensor, version, value in before:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)
    return _Reader(traced, named, list(inputs), name, joint).program(returned[0])


class _Lines(TorchFunctionMode):
    """Tells the tracer at which line of the user's each op was called.

    PyTorch's own `record_stack_traces` keeps only the lines of modules' `forward`.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        frame = sys._getframe(1)
        while frame is not None and not _is_user(frame.f_code.co_filename):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            fx_traceback.current_meta["stack_trace"] = where
        return func(*args, **(kwargs or {}))


def _collect(value: Any, leaves: list[Tensor], name: str) -> None:
    if isinstance(value, Tensor):
        leaves.append(value)
    elif isinstance(value, tuple | list):
        for item in value:
            _collect(item, leaves, name)
    elif isinstance(value, dict) and all(isinstance(k, str) for k in value):
        for item in value.values():
            _collect(item, leaves, name)
    else:
        raise GraphError(
            f"@{name} must return a tensor, or tensors in tuples, lists and dicts with str keys; "
            f"got {type(value).__name__}. Return for example T.cross_entropy(logits, labels)"
        )


def _is_user(filename: str) -> bool:
    return not filename.startswith((*_LIBRARIES, "<"))


def _data_dependent(error: BaseException, name: str) -> GraphError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_user(f.filename)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "?"
    return GraphError(f"@{name} depends on the data at {where}: {_REMEDY}")


class _Reader:
    """Turns one FX graph into a program."""

    def __init__(
        self,
        traced: fx.GraphModule,
        named: Mapping[str, Tensor],
        inputs: Sequence[str],
        name: str,
        joint: bool,
    ) -> None:
        self._traced = traced
        self._name = name
        self._joint = joint
        self._named = {id(t): n for n, t in named.items()}
        self._slots = [*inputs, *(named if joint else ())]  # one a placeholder
        self._tensors = dict(named)
        self._inputs = list(inputs)
        self._constants: dict[str, Constant] = {}
        self._kinds: list[tuple[str, TensorType]] = []
        self._nodes: list[Node] = []
        self._values: dict[fx.Node, Ref] = {}
        self._no_grad = joint  # gradients of gradients are not part of a joint graph
        self._taken = {*inputs, *named}

    def program(self, output: Any) -> Program:
        """The whole; `output` is what the function returned, for its nesting."""
        leaves: list[Ref] = []
        for node in self._traced.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "get_attr":
                self._values[node] = Ref(self._constant(getattr(self._traced, node.target)))
            elif node.op == "call_function":
                self._call(node)
            else:
                leaves = [self._values[v] for v in node.args[0]]
        whole = Program(
            name=self._name,
            inputs=tuple(self._kinds),
            constants=tuple(self._constants.values()),
            nodes=tuple(self._nodes),
            output=_nest(output, iter(leaves)),
        )
        check(whole)
        return _pruned(whole)

    def _placeholder(self, node: fx.Node) -> None:
        name = self._slots[len(self._values)]
        self._values[node] = Ref(name)
        if len(self._kinds) < len(self._inputs):
            self._kinds.append((name, TensorType.of(node.meta["val"])))
        else:
            self._constants[name] = Constant(name, self._tensors[name])

    def _constant(self, tensor: Tensor) -> str:
        if isinstance(tensor, FakeTensor) or not isinstance(tensor, Tensor):
            raise GraphError(f"@{self._name} holds a {type(tensor).__name__} that is no constant")
        if id(tensor) not in self._named:
            self._named[id(tensor)] = self._fresh("const", first=0)
        name = self._named[id(tensor)]
        self._constants[name] = Constant(name, tensor)
        return name

    def _fresh(self, base: str, *, first: int | None = None) -> str:
        name, count = base if first is None else f"{base}{first}", (first or 0) + 1
        while name in self._taken:
            name = f"{base}_{count}" if first is None else f"{base}{count}"
            count += 1
        self._taken.add(name)
        return name

    def _call(self, node: fx.Node) -> None:
        if node.target is torch._C._set_grad_enabled:
            self._no_grad = self._joint or not node.args[0]
            return
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(index, int)
            self._values[node] = Ref(self._values[source].name, index)
            return
        line = _line(node)
        at = f" at {line}" if line else ""
        if not isinstance(node.target, torch._ops.OpOverload):
            raise GraphError(
                f"node %{node.name} of @{self._name}{at} is {node.target}, which is no op: move "
                "it out of the step, or write it with torch functions"
            )
        schema = node.target._schema
        op = f"{schema.name.replace('::', '.')}.{schema.overload_name or 'default'}"
        value = node.meta.get("val")
        several = isinstance(value, tuple | list)
        results = list(value) if isinstance(value, tuple | list) else [value]
        tensors: list[Tensor | None] = []
        for v in results:
            if v is None and several:  # its output_mask says so
                tensors.append(None)
                continue
            if not isinstance(v, Tensor) or not all(type(n) is int for n in v.shape):
                what = "the size" if isinstance(v, Tensor) else "a number"
                raise GraphError(
                    f"node %{node.name} ({op}) of @{self._name}{at} depends on the data: it takes "
                    f"{what} out of a tensor's values; {_REMEDY}"
                )
            tensors.append(v)
        find_op(op, node.name)
        given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
        given |= node.kwargs
        name = self._fresh(re.sub(r"(?<=\w)_+$", "", schema.name.partition("::")[2]))
        self._nodes.append(
            Node(
                name=name,
                op=op,
                arguments=tuple(
                    (a.name, self._plain(given[a.name], op))
                    for a in schema.arguments
                    if a.name in given
                ),
                types=tuple(None if v is None else TensorType.of(v) for v in tensors),
                several=several,
                no_grad=self._no_grad,
                line=line,
            )
        )
        self._values[node] = Ref(name)

    def _plain(self, value: Any, op: str) -> Any:
        if isinstance(value, fx.Node):
            return self._values[value]
        if isinstance(value, tuple | list):
            return [self._plain(v, op) for v in value]
        plain = (bool, int, float, complex, str, torch.dtype, torch.device)
        if value is None or isinstance(value, (*plain, torch.layout, torch.memory_format)):
            return value
        raise GraphError(
            f"@{self._name}: {op} takes a {type(value).__name__}, which no graph may hold; "
            "leave that argument out"
        )


def _line(node: fx.Node) -> str | None:
    line = node.meta.get("stack_trace")
    return line if isinstance(line, str) and line.isprintable() else None


def _nest(value: Any, leaves: Any) -> Any:
    if isinstance(value, Tensor):
        return next(leaves)
    if isinstance(value, dict):
        return {k: _nest(v, leaves) for k, v in value.items()}
    items = [_nest(v, leaves) for v in value]
    return tuple(items) if isinstance(value, tuple) else items


def _pruned(program: Program) -> Program:
    """Without the ops and constants the result does not depend on."""
    needed = {ref.name for ref in refs(program.output)}
    kept: list[Node] = []
    for node in reversed(program.nodes):
        op = find_op(node.op, node.name)
        effect = op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags
        if effect or node.name in needed:
            kept.append(node)
            needed |= set(node.inputs)
    return Program(
        name=program.name,
        inputs=program.inputs,
        constants=tuple(c for c in program.constants if c.name in needed),
        nodes=tuple(reversed(kept)),
        output=program.output,
    )
