"""The inner loop: K steps down a loss, as tensors that can be differentiated again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, final, runtime_checkable

import torch
from torch import Tensor

from tessera.errors import InputError, NonFiniteError
from tessera.graph.inner import Slots

__all__ = ["InnerOpt", "LossOf", "Point", "descend", "require_finite", "steps_of"]

Tensors: TypeAlias = Mapping[str, Tensor]
# (params, running statistics) -> (losses, 0-d or [tasks]; running statistics)
LossOf: TypeAlias = Callable[[Tensors, Tensors], tuple[Tensor, Tensors]]


@runtime_checkable
class InnerOpt(Protocol):
    """The rule of an inner loop: `tg.SGD(1e-2)`, `tg.Adam(1e-2)`, or one of your own.

    Example:
        >>> from tessera import graph as tg
        >>> isinstance(tg.SGD(1e-2), InnerOpt)
        True
    """

    @property
    def steps(self) -> int | None:
        """How many steps, where the call does not say."""

    def update(
        self, params: Tensors, grads: Tensors, slots: Slots, step: int = 0
    ) -> tuple[dict[str, Tensor], Slots]:
        """The parameters and the rule's memory after step `step`; {} is its memory at first."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Point:
    """Where an inner loop stands.

    Attributes:
        params: What it adapts, by name.
        slots: What its rule remembers.
        running: Running statistics, where each task has its own.
        step: How many steps were taken.
        losses: Of each of them before its update; detached, each 0-d or [tasks].

    Example:
        >>> Point(params={"w": torch.zeros(1)}).step
        0
    """

    params: Tensors
    slots: Slots = field(default_factory=dict)
    running: Tensors = field(default_factory=dict)
    step: int = 0
    losses: tuple[Tensor, ...] = ()


def descend(loss_of: LossOf, start: Point, rule: InnerOpt, K: int, *, create_graph: bool) -> Point:
    """`K` steps of `rule` from `start`.

    Args:
        loss_of: Gives one loss, or one for each task; the tasks share no tensor that is adapted.
        start: Its tensors require gradients.
        rule: How to step.
        K: How many steps, >= 0.
        create_graph: Whether the steps' gradients are differentiated again; else they are
            constants, and a derivative passes from a step's parameters to those before as it is.

    Raises:
        InputError: The loss depends on none of the parameters.

    Example:
        >>> from tessera import graph as tg
        >>> w = torch.ones(1, requires_grad=True)
        >>> square = lambda params, running: (params["w"].square().sum(), running)
        >>> start = Point(params={"w": w})
        >>> end = descend(square, start, tg.SGD(0.25), 2, create_graph=True)
        >>> end.params["w"].item(), torch.autograd.grad(end.params["w"], w)[0].item()
        (0.25, 0.25)
    """
    params, slots, running = start.params, start.slots, start.running
    losses: list[Tensor] = []
    for step in range(start.step, start.step + K):
        loss, running = loss_of(params, running)
        grads = _gradients(loss, params, create_graph=create_graph)
        params, slots = rule.update(params, grads, slots, step)
        if create_graph:
            losses.append(loss.detach())
            continue
        running = {name: value.detach() for name, value in running.items()}
        if not losses:
            # One block for all: small ones, each kept from among what its step frees, scatter the
            # heap, and the process grows by a step's memory now and then.
            losses = list(loss.detach().new_empty(K, *loss.shape))
        losses[step - start.step].copy_(loss.detach())
    return Point(
        params=params,
        slots=slots,
        running=running,
        step=start.step + K,
        losses=(*start.losses, *losses),
    )


def _gradients(loss: Tensor, params: Tensors, *, create_graph: bool) -> dict[str, Tensor]:
    found: tuple[Tensor | None, ...] = ()
    if loss.requires_grad:
        found = torch.autograd.grad(
            loss.sum() if loss.dim() else loss,
            list(params.values()),
            create_graph=create_graph,
            allow_unused=True,
        )
    if all(g is None for g in found):
        raise InputError(
            f"the inner loss depends on none of the {len(params)} parameters that are adapted "
            f"({', '.join(list(params)[:3])}, ...): was it computed from detached tensors, or does "
            "the model not use them?"
        )
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(params.items(), found, strict=True)
    }


def require_finite(losses: Tensor, before: int = 0) -> None:
    """Raise NonFiniteError if a loss is NaN or infinite, and say of which step and task.

    Args:
        losses: [steps] or [steps, tasks].
        before: How many steps were taken before these.

    Example:
        >>> require_finite(torch.zeros(3))
    """
    if math.isfinite(losses.sum().item()):
        return
    fine = torch.isfinite(losses)
    if bool(fine.all()):  # it is their sum that is too large
        return
    step, *task = (~fine).nonzero()[0].tolist()
    of = f" of task {task[0]}" if task else ""
    raise NonFiniteError(
        f"the inner loss{of} is {losses[step, *task].item()} at step {before + step} (counted from "
        "0); nothing was changed. Lower the rate of inner_opt=, or look at that support set"
    )


def steps_of(rule: Any, K: int | None) -> int:
    """How many steps the inner loop takes.

    Raises:
        InputError: Nobody says so, or it is no count; `rule` is none.

    Example:
        >>> from tessera import graph as tg
        >>> steps_of(tg.SGD(1e-2, steps=5), None), steps_of(tg.SGD(1e-2), 3)
        (5, 3)
    """
    if not hasattr(rule, "update") or not hasattr(rule, "steps"):
        raise InputError(
            "inner_opt= is the rule of an inner loop, such as tg.SGD(1e-2) or tg.Adam(1e-2), got "
            f"{type(rule).__name__}"
        )
    steps = rule.steps if K is None else K
    if steps is None:
        raise InputError("how many steps? Give K=5, or a rule that knows, tg.SGD(1e-2, steps=5)")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(f"the inner loop takes K >= 0 steps, got K={steps!r}")
    return steps
