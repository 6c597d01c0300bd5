"""The training step: a function that returns a loss becomes one that learns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from tessera.errors import InputError, NonFiniteError
from tessera.graph.ownership import owned, owner, owners
from tessera.ops.quadratic import forget

__all__ = ["no_grad", "training_step"]

P = ParamSpec("P")


def no_grad() -> torch.no_grad:
    """`torch.no_grad()`: a context, or a decorator, in which nothing is recorded.

    Example:
        >>> with no_grad():
        ...     (torch.ones(1, requires_grad=True) * 2).requires_grad
        False
    """
    return torch.no_grad()


@overload
def training_step(fn: Callable[P, Tensor]) -> Callable[P, Tensor]: ...
@overload
def training_step(
    *, optimizer: Optimizer
) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]: ...
def training_step(
    fn: Callable[P, Tensor] | None = None, *, optimizer: Optimizer | None = None
) -> Callable[..., Any]:
    """Make a function that returns a loss also learn from it.

    A call clears the gradients, runs the function, differentiates its loss, lets the optimizer
    step and returns the detached loss. In the bare form the optimizers that step are the `tg.Adam`
    and `tg.SGD` that own the parameters the loss reached; if none owns them, the gradients are
    left in ``.grad`` for your own `torch.optim`.

    Args:
        fn: Returns a 0-d loss.
        optimizer: Steps in place of the owners; any `torch.optim.Optimizer`.

    Returns:
        The function, with the same arguments.

    Raises:
        InputError: What the function returned is not a 0-d tensor that depends on a parameter.
        NonFiniteError: The loss is NaN or infinite. No weight and no gradient was changed.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> @training_step(optimizer=optimizer)
        ... def step(x):
        ...     return (model(x) - 3).square().mean()
        >>> [round(step(torch.ones(1, 1)).item(), 6) for _ in range(2)][1]
        0.0
    """
    if fn is None:
        return functools.partial(_decorate, optimizer=optimizer)
    return _decorate(fn, optimizer=optimizer)


def _decorate(fn: Callable[P, Tensor], *, optimizer: Optimizer | None) -> Callable[P, Tensor]:
    @functools.wraps(fn)
    def step(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.enable_grad():
            loss = fn(*args, **kwargs)
        leaves = _check(loss, getattr(fn, "__name__", type(fn).__name__))
        stepping = [optimizer] if optimizer is not None else owners(leaves)
        for o in stepping:
            o.zero_grad(set_to_none=True)
        for p in leaves:
            if optimizer is not None or owner(p) is None:
                p.grad = None
        forget(leaves)
        loss.backward()  # type: ignore[no-untyped-call]
        value = loss.detach().clone()  # a loss that is a view of a weight would move with it
        rows = _batch_size((*args, *kwargs.values()))
        for o in stepping:
            known = owned(o)
            if known is not None and rows is not None:
                known.batch_sizes[:] = [rows]
            o.step()
        return value

    return step


def _check(loss: object, name: str) -> list[Tensor]:
    """The parameters a fit loss reaches."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(
            f"@tg.training_step: {name} must return a 0-d loss, got {got}; "
            "return for example T.cross_entropy(logits, labels)"
        )
    if not math.isfinite(loss.item()):
        raise NonFiniteError(
            f"@tg.training_step: the loss of {name} is {loss.item()}; no weight was changed. Look "
            "at the newest batch, lower lr=, or lower the penalty's lam="
        )
    leaves = _leaves(loss)
    if not leaves:
        raise InputError(
            f"@tg.training_step: the loss of {name} depends on no parameter that requires a "
            "gradient; was it computed under tg.no_grad() or from detached tensors?"
        )
    return leaves


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaf tensors whose gradient `loss.backward()` would accumulate."""
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else []
    found: list[Tensor] = []
    seen = {loss.grad_fn}
    stack = [loss.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is None:
                stack.append(node)
            else:
                found.append(leaf)
    return found


def _batch_size(args: tuple[Any, ...]) -> int | None:
    """Rows of the first tensor among the arguments; a Batch counts by its x."""
    for a in args:
        first = a[0] if isinstance(a, tuple | list) and a else a
        if isinstance(first, Tensor) and first.dim() > 0:
            return first.shape[0]
    return None
