"""``A x = b`` for a symmetric A that is known by its products only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from tessera.errors import NonFiniteError

__all__ = ["SOLVERS", "Operator", "Solution", "Vector", "conjugate_gradient", "neumann", "norm"]

Vector: TypeAlias = list[Tensor]
Operator: TypeAlias = Callable[[Vector], Vector]
Stopped: TypeAlias = Literal["converged", "max_iter", "negative curvature", "rounding"]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """What a solver found, and how it ended.

    Attributes:
        x: The iterate it ended with, one tensor for each of b's.
        iterations: Products with A that went into it; the last check is not counted.
        residual: ``|b - A x| / |b|``, computed anew from `x`; 0 where b is 0.
        stopped: "converged"; "max_iter"; "negative curvature": A is not positive definite, and `x`
            is the iterate of least residual before that showed (the last ones blow up on the way
            there); "rounding": the numbers' type allows no smaller residual.
    """

    x: Vector
    iterations: int
    residual: float
    stopped: Stopped

    @property
    def converged(self) -> bool:
        """Whether the residual is within the tolerance."""
        return self.stopped == "converged"


def conjugate_gradient(
    operator: Operator, b: Sequence[Tensor], *, tol: float, max_iter: int, damping: float = 0.0
) -> Solution:
    """``(A + damping I) x = b`` by conjugate gradients, from x = 0.

    Args:
        operator: v -> A v, with A symmetric; it gets a list like `b` and may not keep it.
        b: The right-hand side, a list of tensors that count as one vector. Not written to.
        tol: Ends when ``|b - A x| <= tol |b|``.
        max_iter: The most products, >= 1.
        damping: Added to A's diagonal, >= 0.

    Raises:
        NonFiniteError: A product is NaN or infinite.

    Source:
        Hestenes & Stiefel 1952; the stop at negative curvature: Steihaug 1983, step 2.

    Example:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> found = conjugate_gradient(lambda v: [A @ v[0]], [torch.ones(2)], tol=1e-5, max_iter=9)
        >>> found.x[0] @ A[0], found.iterations
        (tensor(1.), 2)
    """
    run = _Run(operator, b, tol, damping)
    p = [t.clone() for t in run.r]
    for k in range(max_iter if run.size else 0):
        Ap = run.product(p, k + 1)
        curvature = _dot(p, Ap)
        if not curvature > 0:
            return run.ended("negative curvature", k)
        before = run.rr
        run.advance(p, Ap, before / curvature)
        if not run.within:
            _scale_add(p, run.rr / before, run.r)
        elif (how := run.checked()) is None:
            p = [t.clone() for t in run.r]  # the directions' memory went with the old residual
        else:
            return run.ended(how, k + 1)
    return run.ended("max_iter" if run.size else "converged", max_iter if run.size else 0)


def neumann(
    operator: Operator, b: Sequence[Tensor], *, tol: float, max_iter: int, damping: float = 0.0
) -> Solution:
    """``(A + damping I) x = b`` by the series ``x = a sum_k (I - a A)^k b``.

    The series converges for ``a < 2 / |A|``. Here a is one over the largest ``|A r| / |r|`` met so
    far, r the residual: the terms of the series are a power iteration themselves, so no product is
    spent on finding |A|, and a step that was too long shows in the next term and is taken back.

    Args:
        operator: v -> A v, with A symmetric; it gets a list like `b` and may not keep it.
        b: The right-hand side, a list of tensors that count as one vector. Not written to.
        tol: Ends when ``|b - A x| <= tol |b|``.
        max_iter: The most products, >= 1.
        damping: Added to A's diagonal, >= 0.

    Raises:
        NonFiniteError: A product is NaN or infinite.

    Source:
        Lorraine, Vicol & Duvenaud 2020, alg. 3 (arXiv:1911.02590), where a is given by hand.

    Example:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> found = neumann(lambda v: [A @ v[0]], [torch.ones(2)], tol=1e-5, max_iter=50)
        >>> bool((A @ found.x[0] - 1).norm() < 2e-5), found.converged
        (True, True)
    """
    run = _Run(operator, b, tol, damping)
    largest = 0.0
    for k in range(max_iter if run.size else 0):
        Ar = run.product(run.r, k + 1)
        if not _dot(run.r, Ar) > 0:
            return run.ended("negative curvature", k)
        largest = max(largest, math.sqrt(_dot(Ar, Ar) / run.rr))
        run.advance(run.r, Ar, 1 / largest)
        if run.within and (how := run.checked()) is not None:
            return run.ended(how, k + 1)
    return run.ended("max_iter" if run.size else "converged", max_iter if run.size else 0)


SOLVERS = {"CG": conjugate_gradient, "Neumann": neumann}


@final
class _Run:
    """The state both solvers share: x, and the residual r = b - A x as it is carried along."""

    def __init__(self, operator: Operator, b: Sequence[Tensor], tol: float, damping: float) -> None:
        self._operator, self._b, self._damping = operator, list(b), damping
        self.x = [torch.zeros_like(t) for t in b]
        self.r = [t.detach().clone() for t in b]
        self.rr = _dot(self.r, self.r)
        self.size = norm(self.r)
        self._goal, self._checked = tol * self.size, math.inf
        self._best, self._least = [torch.zeros_like(t) for t in b], math.inf

    @property
    def within(self) -> bool:
        """Whether the carried residual meets the tolerance."""
        return math.sqrt(self.rr) <= self._goal

    def product(self, v: Vector, iteration: int) -> Vector:
        """``(A + damping I) v``."""
        out = self._operator(v)
        if self._damping:
            out = list(torch._foreach_add(out, v, alpha=self._damping))
        if not math.isfinite(_dot(out, out)):
            raise NonFiniteError(
                f"the Hessian-vector product of iteration {iteration} is NaN or infinite: the loss "
                "has no finite second derivative there; a smooth activation, or fewer inner steps "
                "with a smaller lr, avoid it"
            )
        return out

    def advance(self, direction: Vector, product: Vector, step: float) -> None:
        """``x += step direction``, with the residual that follows."""
        torch._foreach_add_(self.x, direction, alpha=step)
        torch._foreach_add_(self.r, product, alpha=-step)
        self.rr = _dot(self.r, self.r)
        if self.rr < self._least:
            self._least = self.rr
            torch._foreach_copy_(self._best, self.x)

    def checked(self) -> Stopped | None:
        """Whether the residual computed anew meets the tolerance too; None: go on from there.

        What is carried along drifts from ``b - A x`` by rounding, and in float32 by much.
        """
        self._renew()
        if self.within:
            return "converged"
        if math.sqrt(self.rr) > self._checked / 2:
            return "rounding"
        self._checked = math.sqrt(self.rr)
        return None

    def _renew(self) -> None:
        self.r = list(torch._foreach_sub(self._b, self.product(self.x, 0)))
        self.rr = _dot(self.r, self.r)

    def ended(self, how: Stopped, iterations: int) -> Solution:
        """The result; its residual is computed anew unless it just was."""
        if how == "negative curvature":
            self.x = self._best
        if how in ("max_iter", "negative curvature"):
            self._renew()
        residual = math.sqrt(self.rr) / self.size if self.size else 0.0
        return Solution(x=self.x, iterations=iterations, residual=residual, stopped=how)


def norm(v: Vector) -> float:
    """The Euclidean norm of the tensors as one vector.

    Example:
        >>> norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        5.0
    """
    return math.sqrt(_dot(v, v))


def _dot(a: Vector, b: Vector) -> float:
    """The inner product; summed over the tensors in double precision, with one synchronisation."""
    parts = [torch.vdot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]
    return math.fsum(torch.stack([p.to(parts[0].device, torch.float64) for p in parts]).tolist())


def _scale_add(a: Vector, scale: float, b: Vector) -> None:
    """``a <- scale a + b`` in place."""
    torch._foreach_mul_(a, scale)
    torch._foreach_add_(a, b)
