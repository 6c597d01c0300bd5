"""Gradients through the solution of an inner problem, without its path."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tessera import ops as T
from tessera.errors import InputError, NonFiniteError, unknown_name
from tessera.graph.inner import Slots
from tessera.meta.calling import Functional
from tessera.meta.hvp import Curvature
from tessera.meta.inner import InnerOpt
from tessera.meta.objective import LossFn, Named, Objective, leaves
from tessera.meta.solvers import SOLVERS, Operator, Solution, Vector, norm

__all__ = ["implicit_bilevel"]


def implicit_bilevel(
    model: nn.Module,
    *,
    inner: Callable[[nn.Module], InnerOpt],
    train_batch: tuple[Tensor, Tensor],
    val_batch: tuple[Tensor, Tensor],
    prox: float = 1.0,
    hparams: Sequence[Tensor] | None = None,
    inner_solve: Literal["CG", "Neumann"] = "CG",
    hvp: Literal["pearlmutter"] = "pearlmutter",
    tol: float = 1e-3,
    max_iter: int = 100,
    damping: float = 0.0,
    loss_fn: LossFn = T.cross_entropy,
    val_loss_fn: LossFn | None = None,
) -> Tensor:
    """The validation loss at ``w* = argmin_w L_train(w) + prox/2 |w - theta|^2``.

    ``backward()`` differentiates w* by the implicit function theorem: with g the validation
    gradient and H the Hessian of L_train, both at w*, it solves ``(H + prox I) v = g`` and adds

    - ``prox v`` to the gradients of the model's parameters theta (iMAML), or
    - ``dL_val/dh - d<grad L_train, v>/dh`` to those of `hparams`, when they are given.

    The inner steps keep no graph, so memory does not grow with their number. The two gradients,
    and that of `maml_step`, are different quantities: here theta matters through `prox` alone.
    They are exact at the minimum: take enough steps, and look at ``inner_grad_norm``.

    Args:
        model: Its parameters that require a gradient are theta. Never touched by the inner loop.
        inner: Gives the inner optimizer: ``lambda m: tg.SGD(m, lr=1e-2, steps=5)``. The steps
            start at theta; the learning rate must be below ``2 / (|H| + prox)``.
        train_batch: (x, y) of the inner problem, at least one row.
        val_batch: (x, y) of the outer loss, at least one row.
        prox: Pull towards theta, >= 0; 0 only with `hparams`, as then w* does not know theta.
        hparams: Tensors that the losses close over; they get the gradient in theta's place.
        inner_solve: "CG", or "Neumann": the plain series, for curvature that is well conditioned.
        hvp: "pearlmutter": the exact Hessian-vector product.
        tol: The solver ends when ``|g - (H + prox I) v| <= tol |g|``; in (0, 1).
        max_iter: Its most Hessian-vector products, >= 1.
        damping: Added to the solver's diagonal only, >= 0: a biased but steadier gradient.
        loss_fn: ``loss_fn(model(x), y)``, 0-d. The parameters of `model` it reads (a weight decay,
            say) are those of the inner loop.
        val_loss_fn: The outer loss; None takes `loss_fn`.

    Returns:
        0-d tensor with, besides its value, ``inner_grad_norm``: the norm of the inner objective's
        gradient where the steps ended; and, None before ``backward()``, ``iterations``: the
        solver's products, ``residual``: ``|g - (H + prox I) v| / |g|``, and ``stopped``:
        "converged", "max_iter", "negative curvature" or "rounding". In the last three a warning
        says so, and the gradient is that of the iterate the solver ended with (after negative
        curvature, of the one with the least residual).

    Raises:
        InputError: `prox` is 0 without `hparams`, a batch is empty, a loss does not reach the
            parameters, one of `hparams` is used by no loss, or a number is out of its range.
        UnknownNameError: No such `inner_solve` or `hvp`.
        NonFiniteError: An inner loss (the step is named), the outer one, or a product is not
            finite.

    Source:
        Rajeswaran, Finn, Kakade & Levine 2019, eq. 6-7 (arXiv:1909.04630); `hparams`: Lorraine,
        Vicol & Duvenaud 2020, theorem 1 (arXiv:1911.02590).

    Example:
        >>> from tessera import graph as tg
        >>> model = nn.Linear(1, 1, bias=False).double()
        >>> x, y = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
        >>> mse = nn.functional.mse_loss  # L = w^2: w* = theta / 3, dL/dtheta = 2/9 theta
        >>> outer = implicit_bilevel(model, inner=lambda m: tg.SGD(m, lr=0.2, steps=50),
        ...                          train_batch=(x, y), val_batch=(x, y), loss_fn=mse)
        >>> outer.backward()
        >>> bool((model.weight.grad - 2 / 9 * model.weight).abs() < 1e-12), outer.iterations
        (True, 1)
    """
    _require(prox, hparams, inner_solve, hvp, tol, max_iter, damping)
    run = Functional(model)
    own = {n: p for n, p in run.params().items() if p.requires_grad}
    if not own:
        raise InputError(
            f"implicit_bilevel: no parameter of {type(model).__name__} requires a gradient"
        )
    given = list(hparams or ())
    train = Objective("train_batch", run, own, _batch("train_batch", train_batch), loss_fn)
    val = Objective("val_batch", run, own, _batch("val_batch", val_batch), val_loss_fn or loss_fn)
    with torch.enable_grad():
        w, slope, used = _descend(train, _rule(inner, model), prox, given)
        value, g, direct = _outer(val, w, given, used)
    problem = _Problem(
        loss=train,
        hparams=given,
        prox=prox,
        solve=partial(SOLVERS[inner_solve], tol=tol, max_iter=max_iter, damping=prox + damping),
        reports=[],
    )
    targets = given or list(own.values())
    result: Tensor = _Implicit.apply(  # type: ignore[no-untyped-call]
        problem, value, len(targets), len(w), *targets, *w.values(), *g, *direct
    )
    problem.reports.append(weakref.ref(result))
    result.__dict__.update(inner_grad_norm=slope, iterations=None, residual=None, stopped=None)
    return result


def _require(
    prox: float,
    hparams: Sequence[Tensor] | None,
    inner_solve: str,
    hvp: str,
    tol: float,
    max_iter: int,
    damping: float,
) -> None:
    if inner_solve not in SOLVERS:
        raise unknown_name("inner_solve", inner_solve, SOLVERS)
    if hvp != "pearlmutter":
        raise unknown_name("hvp", hvp, ["pearlmutter"])
    for name, value in {"prox": prox, "damping": damping}.items():
        if not 0 <= value < math.inf:
            raise InputError(f"implicit_bilevel needs {name} >= 0 and finite, got {value}")
    if torch.is_inference_mode_enabled():
        raise InputError(
            "implicit_bilevel needs gradients, which torch.inference_mode() has none of; use "
            "torch.no_grad() to look at the value only"
        )
    if not 0 < tol < 1:
        raise InputError(f"implicit_bilevel needs tol in (0, 1), got {tol}")
    if not isinstance(max_iter, int) or max_iter < 1:
        raise InputError(f"implicit_bilevel needs max_iter >= 1, got {max_iter!r}")
    if hparams is None:
        if prox == 0:
            raise InputError(
                "implicit_bilevel: with prox=0 the inner solution does not depend on the model's "
                "parameters, so their gradient is zero; give prox > 0, or the tensors to "
                "differentiate by as hparams=[...]"
            )
        return
    if isinstance(hparams, Tensor) or not hparams:
        raise InputError("implicit_bilevel takes hparams as a list of at least one tensor")
    for i, h in enumerate(hparams):
        if not isinstance(h, Tensor) or not h.requires_grad:
            raise InputError(
                f"implicit_bilevel: hparams[{i}] must be a tensor that requires a gradient; "
                "torch.tensor(0.1, requires_grad=True) does"
            )


def _batch(name: str, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError(
            f"implicit_bilevel needs {name}=(x, y), a data.Batch or a tuple, got "
            f"{type(batch).__name__}"
        )
    for t in batch:
        if isinstance(t, Tensor) and t.dim() and not len(t):
            raise InputError(f"implicit_bilevel: {name} has no rows, got shape {tuple(t.shape)}")
    x, y = batch
    return x, y


def _rule(inner: Callable[[nn.Module], InnerOpt], model: nn.Module) -> tuple[InnerOpt, int]:
    """The inner rule and its number of steps."""
    rule = inner(model) if callable(inner) else inner
    if not isinstance(rule, InnerOpt):
        raise InputError(
            "implicit_bilevel needs inner=lambda m: tg.SGD(m, lr=1e-2, steps=5), got one that "
            f"gives {type(rule).__name__}"
        )
    if not rule.steps:
        raise InputError(
            f"implicit_bilevel needs an inner loop of at least one step, got steps={rule.steps}; "
            "write tg.SGD(m, lr=1e-2, steps=5)"
        )
    return rule, rule.steps


def _descend(
    loss: Objective, inner: tuple[InnerOpt, int], prox: float, hparams: Sequence[Tensor]
) -> tuple[Named, float, list[bool]]:
    """Where the inner steps end, the gradient's norm there, and which `hparams` the loss uses."""
    rule, steps = inner
    w = theta = {name: p.detach() for name, p in loss.own.items()}
    slots: Slots = {}
    losses, used = torch.empty(0), [False]
    for step in range(steps + 1):
        here = leaves(w)
        value = loss(here)
        if step == 0:
            used = loss.uses(value, here, hparams)
            losses = value.detach().new_empty(steps + 1)
        grads = _gradients(value, here)
        # One tensor for all: small ones that outlive a step scatter the heap, 0.3 MB a step.
        losses[step] = value.detach()
        if prox:
            grads = {n: g.add(w[n] - theta[n], alpha=prox) for n, g in grads.items()}
        if step < steps:
            with torch.no_grad():
                w, slots = rule.update(w, grads, slots, step)
    finite = losses.isfinite().tolist()
    if not all(finite):
        first = finite.index(False)
        raise NonFiniteError(
            f"implicit_bilevel: the inner loss is {losses[first].item()} at step {first} of "
            f"{steps}; lower the inner lr: it must be below 2 / (largest curvature + prox)"
        )
    return w, norm(list(grads.values())), used


def _gradients(value: Tensor, w: Mapping[str, Tensor]) -> Named:
    grads = torch.autograd.grad(value, list(w.values()), materialize_grads=True)
    return dict(zip(w, grads, strict=True))


def _outer(
    loss: Objective, w: Mapping[str, Tensor], hparams: Sequence[Tensor], used: Sequence[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The outer loss at the inner solution, its gradient there, and that by `hparams` direct."""
    here = leaves(w)
    value = loss(here)
    if not math.isfinite(value.item()):
        raise NonFiniteError(
            f"implicit_bilevel: the loss of val_batch is {value.item()} after the inner loop"
        )
    straight = loss.uses(value, here, hparams)
    for i, hit in enumerate(zip(used, straight, strict=True)):
        if not any(hit):
            raise InputError(
                f"implicit_bilevel: no loss uses hparams[{i}], shape {tuple(hparams[i].shape)}; "
                "loss_fn must compute with that very tensor, not with a copy or its .item()"
            )
    # Kept, because a tensor that was computed from `hparams` beforehand is part of this graph.
    grads = torch.autograd.grad(
        value, [*here.values(), *hparams], retain_graph=bool(hparams), materialize_grads=True
    )
    return value.detach(), list(grads[: len(w)]), list(grads[len(w) :])


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Problem:
    """What `backward` needs beside tensors."""

    loss: Objective
    hparams: list[Tensor]
    prox: float
    solve: Callable[[Operator, Vector], Solution]
    reports: list[weakref.ref[Tensor]]  # the tensor that was returned, as its only item

    def gradient(self, w: Vector, g: Vector, direct: Vector) -> list[Tensor]:
        """That of the outer loss, by `hparams` or by the model's parameters."""
        with torch.enable_grad():
            here = leaves(dict(zip(self.loss.own, w, strict=True)))
            curvature = Curvature(self.loss(here), list(here.values()))
        found = self.solve(curvature, g)
        self._report(found)
        if not self.hparams:
            return list(torch._foreach_mul(found.x, self.prox))
        return list(torch._foreach_sub(direct, curvature.mixed(found.x, self.hparams)))

    def _report(self, found: Solution) -> None:
        for ref in self.reports:
            result = ref()
            if result is not None:
                result.__dict__.update(
                    iterations=found.iterations, residual=found.residual, stopped=found.stopped
                )
        if not found.converged:
            warnings.warn(
                f"implicit_bilevel: the solver ended by {found.stopped} after {found.iterations} "
                f"iterations with residual {found.residual:.1e}; {_REMEDY[found.stopped]}. The "
                "gradient is that of the iterate with this residual",
                stacklevel=2,
            )


_REMEDY = {
    "max_iter": "raise max_iter= or tol=, or give more prox= or damping=",
    "negative curvature": "the inner solution is no minimum: give more prox=, damping= or steps",
    "rounding": "tol= is beyond what the parameters' dtype can hold",
}


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: _Problem, value: Tensor, targets: int, params: int, *tensors: Tensor
    ) -> Tensor:
        # The targets are saved for PyTorch's check that nobody changes them before backward().
        ctx.save_for_backward(*tensors)
        ctx.problem, ctx.targets, ctx.params = problem, targets, params
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = list(ctx.saved_tensors)[ctx.targets :]
        n = ctx.params
        grads = ctx.problem.gradient(tensors[:n], tensors[n : 2 * n], tensors[2 * n :])
        scaled = [g * grad.to(g.device, g.dtype) for g in grads]
        return None, None, None, None, *scaled, *[None] * len(tensors)
