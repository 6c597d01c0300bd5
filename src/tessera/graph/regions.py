"""Graphs inside ops: what `tessera.maml_step` descends along."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tessera.errors import GraphError
from tessera.graph import text as printing
from tessera.graph.ir import Node, Program, Ref, execute, substitute
from tessera.ops.registry import REGIONS

__all__ = ["gradient_region", "register"]


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
    stops = [n for n in loss.nodes if n.op == "aten.detach.default" or n.no_grad]
    if stops:
        raise GraphError(
            f"{label}: node %{stops[0].name} at {stops[0].line} stops the gradient inside the "
            "loss; compute it outside and give it as a part of the batch"
        )
    return register(_plain(tracer.trace(gradients, examples, {}, name=label, joint=True)))


def _plain(program: Program) -> Program:
    """Without the detaches autograd puts around what it saved: they would hide a derivative."""
    if program.constants:
        raise GraphError(
            f"{program.name}: the loss closes over %{program.constants[0].name}; give it as a part "
            "of the params or of the batch"
        )
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
