"""Segments of an inner loop that are run again in the backward, so that their graph is not kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera.errors import GraphError
from tessera.graph.inner import Slots
from tessera.meta.inner import InnerOpt, LossOf, Point, descend

__all__ = ["descend_again", "leaves_of"]

Run = Callable[[Sequence[Tensor]], list[Tensor]]


def descend_again(loss_of: LossOf, start: Point, rule: InnerOpt, K: int) -> Point:
    """`descend` with ``create_graph=True`` that keeps one point in every sqrt(K) steps.

    A segment of the loop is run, its graph dropped, and run again when the backward comes to it:
    memory grows with sqrt(K), for one more forward. The gradients are those of `descend`.

    Args:
        loss_of: As for `descend`; whatever else it is made of gets its gradient too.
        start: Where to begin.
        rule: How to step.
        K: How many steps, >= 0.

    Raises:
        GraphError: In the backward, if the loss was another one when it was computed again.

    Example:
        >>> from tessera import graph as tg
        >>> w = torch.ones(1, requires_grad=True)
        >>> square = lambda params, running: (params["w"].square().sum(), running)
        >>> start = Point(params={"w": w})
        >>> end = descend_again(square, start, tg.SGD(0.25), 2)
        >>> end.params["w"].item(), torch.autograd.grad(end.params["w"], w)[0].item()
        (0.25, 0.25)
    """
    length = max(1, math.isqrt(K))
    point = start
    for done in range(0, K, length):
        point = _segment(loss_of, point, rule, min(length, K - done))
    return point


def _segment(loss_of: LossOf, start: Point, rule: InnerOpt, K: int) -> Point:
    shape = _Shape(start)
    before = shape.flat(start)
    ends: list[_Shape] = []

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        here = shape.point(inputs, step=start.step)
        end = descend(loss_of, here, rule, K, create_graph=True)
        ends[:] = [_Shape(end)]
        return [*ends[0].flat(end), torch.stack(end.losses)]

    with torch.enable_grad():
        leaves = [_leaf(t) for t in before]
        outputs = run(leaves)
    closed_over = leaves_of(outputs, leaves)
    values = [t.detach() for t in outputs]
    del outputs
    again: Any = _Again
    *after, losses = again.apply(run, len(before), values, *before, *closed_over)
    end = ends[0].point(after, step=start.step + K)
    return Point(
        params=end.params,
        slots=end.slots,
        running=end.running,
        step=end.step,
        losses=(*start.losses, *losses.detach().unbind()),
    )


@final
class _Shape:
    """The names of a point's tensors, to lay them in a row and to gather them again."""

    def __init__(self, point: Point) -> None:
        self._params = list(point.params)
        self._slots = {slot: list(tensors) for slot, tensors in point.slots.items()}
        self._running = list(point.running)

    def flat(self, point: Point) -> list[Tensor]:
        slots = [point.slots[s][name] for s, names in self._slots.items() for name in names]
        return [*point.params.values(), *slots, *point.running.values()]

    def point(self, tensors: Iterable[Tensor], *, step: int) -> Point:
        row = iter(tensors)
        params = {name: next(row) for name in self._params}
        slots: Slots = {s: {n: next(row) for n in names} for s, names in self._slots.items()}
        return Point(
            params=params,
            slots=slots,
            running={name: next(row) for name in self._running},
            step=step,
        )


@final
class _Again(torch.autograd.Function):
    """The outputs of a segment, whose derivative is that of running it again."""

    @staticmethod
    def forward(ctx: Any, run: Run, count: int, values: list[Tensor], *inputs: Tensor) -> Any:
        ctx.run, ctx.count, ctx.losses = run, count, values[-1]
        ctx.save_for_backward(*inputs)  # which also sees to it that nobody wrote into them since
        ctx.mark_non_differentiable(*(v for v in values if not v.is_floating_point()), values[-1])
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        inputs, closed_over = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        with torch.enable_grad():
            leaves = [_leaf(t) for t in inputs]
            outputs = ctx.run(leaves)
        if not torch.allclose(outputs[-1], ctx.losses, rtol=1e-4):
            raise GraphError(
                "remat=True ran the inner loop again for the backward, and its losses were others: "
                f"{ctx.losses.flatten()[:4].tolist()}, then {outputs[-1].flatten()[:4].tolist()}. "
                "The forward is random, or a buffer of the model was changed in between; make it "
                "a function of its inputs, or use remat=False"
            )
        reached = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        wanted = [(i, t) for i, t in enumerate([*leaves, *closed_over]) if t.requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in reached],
            [t for _, t in wanted],
            [grad for _, grad in reached],
            allow_unused=True,
            retain_graph=bool(closed_over),
        )
        result: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        for (i, _), grad in zip(wanted, found, strict=True):
            result[i] = grad
        return (None, None, None, *result)


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)


def leaves_of(outputs: Sequence[Tensor], besides: Sequence[Tensor]) -> list[Tensor]:
    """The leaves under `outputs` that are none of `besides`, such as what a loss closes over.

    Example:
        >>> a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> leaves_of([a * b], [a])[0] is b
        True
    """
    known = {id(leaf) for leaf in besides}
    found: list[Tensor] = []
    stack = [o.grad_fn for o in outputs if o.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            known.add(id(variable))
            found.append(variable)
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                stack.append(before)
    return found
