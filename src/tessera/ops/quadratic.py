"""``1/2 sum w (theta - c)^2``: the one function behind EWC, SI and L2-SP."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.ops.firstclass import squares
from tessera.ops.kernels import pulls
from tessera.ops.registry import transformed

__all__ = ["PenaltyTap", "forget", "is_watched", "report", "weighted_square"]


def weighted_square(
    params: Sequence[Tensor],
    centres: Sequence[Tensor],
    weights: Sequence[Tensor] | float,
    *,
    constant: float = 0.0,
) -> Tensor:
    """``1/2 sum_i w_i (theta_i - c_i)^2 + constant``, the sum over all elements of all tensors.

    Computed in one fused pass with its gradient ``w (theta - c)`` where no transform is at work,
    and as plain differentiable math inside `torch.func`, forward AD and `torch.compile`. Sums are
    right to 1e-6 at any size.

    Args:
        params: The tensors theta_i to differentiate.
        centres: One for each, same shape; no gradient flows into them.
        weights: One for each, same shape, or one number for all; no gradient flows into them.
        constant: Added to the value.

    Returns:
        0-d tensor on the device of the first parameter.

    Example:
        >>> theta = torch.tensor([2.0, 4.0], requires_grad=True)
        >>> value = weighted_square([theta], [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.5])])
        >>> value.backward()
        >>> value.item(), theta.grad.tolist()
        (2.5, [3.0, 1.0])
    """
    if not params:
        return torch.tensor(float(constant))
    if transformed():
        return (0.5 * squares(params, centres, weights) + constant).to(params[0].dtype)
    value: Tensor = _WeightedSquare.apply(centres, weights, constant, *params)  # type: ignore[no-untyped-call]
    return value


def _triples(
    params: Sequence[Tensor], centres: Sequence[Tensor], weights: Sequence[Tensor] | float
) -> list[tuple[Tensor, Tensor, Tensor | float]]:
    """(theta, c, w) for each parameter; nothing flows into c and w."""
    if isinstance(weights, float | int):
        return [(p, c.detach(), weights) for p, c in zip(params, centres, strict=True)]
    together = zip(params, centres, weights, strict=True)
    return [(p, c.detach(), w.detach()) for p, c, w in together]


class _WeightedSquare(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        centres: Sequence[Tensor],
        weights: Sequence[Tensor] | float,
        constant: float,
        *params: Tensor,
    ) -> Tensor:
        ctx.grads, total = pulls(params, centres, weights)
        ctx.save_for_backward(*params)
        ctx.centres, ctx.weights = centres, weights
        return (0.5 * total + constant).to(params[0].dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Taken, not kept: the engine may then hand the very memory to .grad without a copy.
        grads, ctx.grads = ctx.grads, None
        if grads is None or torch.is_grad_enabled():
            triples = _triples(ctx.saved_tensors, ctx.centres, ctx.weights)
            grads = [(p - c) * w for p, c, w in triples]
        if torch.is_grad_enabled() or grad.device.type != "cpu" or grad.item() != 1.0:
            grads = [g * grad.to(g.device) for g in grads]
        if not torch.is_grad_enabled():
            report(ctx.saved_tensors, grads)
        return None, None, None, *grads


class PenaltyTap:
    """Collects the gradients that quadratic penalties send into some parameters.

    SI integrates the gradient of the task's loss alone; this is how it learns which part of
    ``.grad`` was not the task's.

    Args:
        params: The parameters to watch; held for as long as the tap lives.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> tap = PenaltyTap([w])
        >>> weighted_square([w], [torch.zeros(1)], 3.0).backward()
        >>> tap.take()
        [tensor([3.])]
        >>> tap.take()
        [None]
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self._sums: dict[int, Tensor] = {}
        _TAPS.update({id(p): self for p in self.params})

    def take(self) -> list[Tensor | None]:
        """The sums since the last call, one for each parameter; None where nothing came."""
        sums, self._sums = self._sums, {}
        return [sums.get(id(p)) for p in self.params]

    def _add(self, param: Tensor, grad: Tensor) -> None:
        known = self._sums.get(id(param))
        self._sums[id(param)] = grad.detach().clone() if known is None else known + grad


# A tap holds its parameters, so an id cannot be reused while its entry is here.
_TAPS: weakref.WeakValueDictionary[int, PenaltyTap] = weakref.WeakValueDictionary()


def is_watched(param: Tensor) -> bool:
    """Whether a `PenaltyTap` watches this parameter.

    Example:
        >>> is_watched(torch.ones(1))
        False
    """
    return id(param) in _TAPS


def forget(params: Sequence[Tensor]) -> None:
    """Drop what was reported for these parameters, as their gradients are cleared.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> tap = PenaltyTap([w])
        >>> _ = torch.autograd.grad(weighted_square([w], [torch.zeros(1)], 3.0), w)  # a look
        >>> forget([w])
        >>> tap.take()
        [None]
    """
    if not _TAPS:
        return
    for p in params:
        tap = _TAPS.get(id(p))
        if tap is not None:
            tap._sums.pop(id(p), None)


def report(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Tell whoever watches these parameters what a penalty adds to their gradients.

    Example:
        >>> report([torch.ones(1)], [torch.ones(1)])  # nobody watches: nothing happens
    """
    if not _TAPS:
        return
    for p, g in zip(params, grads, strict=True):
        tap = _TAPS.get(id(p))
        if tap is not None and g is not None:
            tap._add(p, g)
