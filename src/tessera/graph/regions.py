"""Graphs inside ops: what `tessera.maml_step` descends along."""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tessera.errors import GraphError
from tessera.graph import text as printing
from tessera.graph.ir import Node, Program, Ref, TensorType, execute, substitute
from tessera.ops.registry import REGIONS

__all__ = ["closed_gradient_region", "gradient_region", "register"]


def gradient_region(
    loss_fn: Callable[..., Tensor], params: Sequence[Tensor], batch: Sequence[Tensor]
) -> str:
    """Trace ``d loss_fn(params, batch) / d params`` as a graph that an op can hold.

    The graph is plain operations on its inputs, so an op that runs it can be differentiated again,
    vmapped over tasks, compiled and exported. It is for the shapes and dtypes of the examples.

    Args:
        loss_fn: Takes a list of parameters and a list of tensors, returns a 0-d loss.
        params: Example parameters, floating.
        batch: Example inputs of the loss.

    Returns:
        The region's name, the SHA-256 of its text. The same graph has the same name in every
        process; a saved graph brings its regions along.

    Raises:
        GraphError: The loss is no graph, detaches, closes over a tensor, or does not depend on
            some parameter.

    Example:
        >>> name = gradient_region(
        ...     lambda p, b: (b[0] @ p[0]).square().sum(), [torch.ones(2)], [torch.ones(3, 2)])
        >>> [p] = torch.ops.tessera.maml_step(
        ...     [torch.ones(2)], [torch.ones(3, 2)], name, steps=1, lr=0.1, create_graph=True)
        >>> [round(v, 6) for v in p.tolist()]
        [-0.2, -0.2]
    """
    program, _ = _gradients(loss_fn, params, batch)
    if program.constants:
        raise GraphError(
            f"{program.name}: the loss closes over %{program.constants[0].name}; give it as a part "
            "of the params or of the batch"
        )
    return register(program)


def closed_gradient_region(
    loss_fn: Callable[..., Tensor], params: Sequence[Tensor], batch: Sequence[Tensor]
) -> tuple[str, list[Tensor]]:
    """`gradient_region` of a loss that closes over tensors, to call while a graph is captured.

    Args:
        loss_fn: As for `gradient_region`.
        params: As for `gradient_region`; only their shapes, dtypes and devices are looked at.
        batch: As for `gradient_region`; of these, too.

    Returns:
        The region's name, and the tensors closed over: further inputs, to give behind the batch.

    Raises:
        GraphError: As for `gradient_region`, but for the closing over.

    Example:
        >>> scale = torch.ones(2)
        >>> name, closed = closed_gradient_region(
        ...     lambda p, b: (p[0] * scale).sum(), [torch.ones(2)], [])
        >>> closed[0] is scale
        True
    """
    found: list[tuple[Program, set[str]]] = []
    failed: list[BaseException] = []
    shapes = [[(t.shape, t.dtype, t.device) for t in row] for row in (params, batch)]

    def work() -> None:
        try:
            theta, given = ([torch.zeros(s, dtype=d, device=o) for s, d, o in r] for r in shapes)
            found.append(_gradients(loss_fn, theta, given))
        except BaseException as error:
            failed.append(error)

    # A thread of its own has none of the modes of the trace that is going on in this one.
    thread = threading.Thread(target=work, name="tessera-region")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    program, stopped = found[0]
    closed = tuple((c.name, TensorType.of(c.tensor)) for c in program.constants)
    opened = replace(program, inputs=(*program.inputs, *closed), constants=())
    tensors = [c.tensor.detach() if c.name in stopped else c.tensor for c in program.constants]
    return register(opened), tensors


def _gradients(
    loss_fn: Callable[..., Tensor], params: Sequence[Tensor], batch: Sequence[Tensor]
) -> tuple[Program, set[str]]:
    """The gradient, and the names of the tensors closed over that the loss detaches."""
    count = len(params)
    names = [*(f"theta{i}" for i in range(count)), *(f"batch{i}" for i in range(len(batch)))]
    tracer: Any = importlib.import_module("tessera.graph.trace")  # brings sympy: not at import
    label = "gradients"

    def forward(*values: Tensor) -> Tensor:
        return loss_fn(list(values[:count]), list(values[count:]))

    def gradients(*values: Any) -> list[Tensor]:
        leaves = list(values[:count])
        loss = forward(*values[:-1])  # the last are the tensors closed over: none
        found: Sequence[Tensor | None] = (None,)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        missing = [i for i, g in enumerate(found) if g is None]
        if missing:
            raise GraphError(f"{label}: the loss does not depend on params[{missing[0]}]")
        return [g for g in found if g is not None]

    inputs = [p.detach().clone().requires_grad_() for p in params]
    examples = dict(zip(names, [*inputs, *(b.detach().clone() for b in batch)], strict=True))
    loss = tracer.trace(forward, examples, {}, name=label)
    detached = {c.name: c.tensor for c in loss.constants}
    for node in loss.nodes:
        if node.op != "aten.detach.default":
            for name in node.inputs:  # its gradient is wanted after all
                detached.pop(name, None)
    stops = [
        n
        for n in loss.nodes
        if n.no_grad or (n.op == "aten.detach.default" and n.inputs[0] not in detached)
    ]
    if stops:
        raise GraphError(
            f"{label}: node %{stops[0].name} at {stops[0].line} stops the gradient inside the "
            "loss; compute it outside and give it as a part of the batch"
        )
    program = _plain(tracer.trace(gradients, examples, {}, name=label, joint=True))
    kept = {c.name for c in program.constants if any(c.tensor is t for t in detached.values())}
    return program, kept


def _plain(program: Program) -> Program:
    """Without the detaches autograd puts around what it saved: they would hide a derivative."""
    same: dict[Ref, Ref] = {}
    nodes: list[Node] = []
    for node in program.nodes:
        arguments = tuple((n, substitute(v, lambda r: same.get(r, r))) for n, v in node.arguments)
        if node.op == "aten.detach.default":
            same[Ref(node.name)] = arguments[0][1]
        else:
            nodes.append(replace(node, arguments=arguments, no_grad=False, line=None))
    output = substitute(program.output, lambda r: same.get(r, r))
    return replace(program, nodes=tuple(nodes), output=output)


def register(program: Program) -> str:
    """Make a program known under its hash, which is returned."""
    name = hashlib.sha256(printing.text(program).encode()).hexdigest()
    printing.PROGRAMS[name] = program
    REGIONS[name] = lambda values: list(execute(program, values))
    return name
