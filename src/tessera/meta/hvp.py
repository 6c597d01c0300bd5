"""Hessian times vector, without a Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tessera.errors import InputError
from tessera.meta.guard import Guard

__all__ = ["Curvature", "hvp"]

Tree = TypeVar("Tree")


def hvp(fn: Callable[[Tree], Tensor], params: Tree, v: Tree) -> Tree:
    """``H v``, with H the Hessian of `fn` at `params`: the cost of about two more gradients.

    Reverse over reverse: the gradient is differentiated once more, in the direction `v`. H itself
    is never formed. Inside `fn`, attention takes its math path, as the fused ones have no second
    derivative, and dropout must be off.

    Args:
        fn: A function of `params` alone that returns a 0-d tensor, twice differentiable.
        params: A tensor, or a dict, list or tuple of them. They are not written to.
        v: Of the same structure and shapes.

    Returns:
        As `params`. Tensors that `fn` does not use get zeros. It composes with `torch.func` and
        ``vmap``, and is differentiable again where `params` require a gradient.

    Raises:
        InputError: `v` does not fit `params`, `fn` returns no 0-d tensor, or it draws dropout.

    Source:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian", Neural Computation 6(1).

    Example:
        >>> x = {"x": torch.tensor([1.0, 2.0])}
        >>> hvp(lambda p: p["x"].pow(3).sum(), x, {"x": torch.tensor([1.0, 10.0])})
        {'x': tensor([  6., 120.])}
    """
    _require_alike(params, v)

    def scalar(at: Tree) -> Tensor:
        value = fn(at)
        if not isinstance(value, Tensor) or value.dim() != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"hvp needs fn to return a 0-d tensor, got {got}; take its .mean()")
        return value

    with Guard():
        pull = torch.func.vjp(torch.func.grad(scalar), params)[1]
    product: Tree = pull(v)[0]
    return product


def _require_alike(params: object, v: object) -> None:
    (ours, how), (theirs, so) = pytree.tree_flatten(params), pytree.tree_flatten(v)
    if how != so or [t.shape for t in ours] != [t.shape for t in theirs]:
        raise InputError(
            "hvp needs v of the structure and the shapes of params, got "
            f"{[tuple(t.shape) for t in theirs]} for {[tuple(t.shape) for t in ours]}"
        )


@final
class Curvature:
    """The gradient of a loss with its graph, to be differentiated in many directions.

    One graph serves every product, so a network with dropout shows the same mask, and therefore
    the same symmetric Hessian, to each of a solver's steps.

    Args:
        loss: A 0-d tensor whose forward ran with the gradient recorded.
        at: The tensors it is differentiated by.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> bent = Curvature(x.pow(3).sum(), [x])
        >>> bent([torch.tensor([1.0, 10.0])])
        [tensor([  6., 120.])]
    """

    def __init__(self, loss: Tensor, at: Sequence[Tensor]) -> None:
        self._at = list(at)
        self._grads = torch.autograd.grad(loss, self._at, create_graph=True, allow_unused=True)

    def __call__(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``H v``."""
        return self.mixed(v, self._at)

    def mixed(self, v: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        """``d/d others <gradient, v>``, the mixed second derivative in the direction `v`."""
        pairs = zip(self._grads, v, strict=True)
        # A loss that is linear in a tensor has a gradient there that depends on nothing.
        bent = [(g, d) for g, d in pairs if g is not None and g.requires_grad]
        if not bent:
            return [torch.zeros_like(o) for o in others]
        grads, directions = zip(*bent, strict=True)
        return list(
            torch.autograd.grad(
                grads, list(others), directions, retain_graph=True, materialize_grads=True
            )
        )
