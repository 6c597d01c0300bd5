"""The rules of inner loops: immutable values, differentiable in everything they are given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from tessera.errors import InputError

__all__ = ["InnerAdam", "InnerSGD", "Rate", "Slots"]

# One for all, one for each parameter by name; or a list of either, one a step.
Rate: TypeAlias = (
    float
    | Tensor
    | Mapping[str, float | Tensor]
    | Sequence[float | Tensor | Mapping[str, float | Tensor]]
)
# What a rule remembers: slot's name -> parameter's name -> tensor.
Slots: TypeAlias = Mapping[str, Mapping[str, Tensor]]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InnerSGD:
    """An inner loop of gradient descent: data for a meta-learner, without a state.

    ``v <- momentum v + g`` and ``theta <- theta - lr v``.

    Attributes:
        lr: Learning rate: a number > 0; a tensor, of no dimension or of its parameter's shape; a
            mapping, parameter's name -> either; or a list of these, one for each step. Tensors
            that require gradients are learned by the meta optimizer (`meta.learned_rates`).
        steps: How many steps; None leaves it to the meta-learner.
        momentum: Heavy-ball momentum, in [0, 1).

    Example:
        >>> InnerSGD(lr=1e-2).update({"w": torch.ones(1)}, {"w": torch.ones(1)}, {})
        ({'w': tensor([0.9900])}, {})
    """

    lr: Rate
    steps: int | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _check("SGD", self.lr, self.steps)
        if not 0 <= self.momentum < 1:
            raise InputError(f"an inner SGD needs momentum in [0, 1), got {self.momentum}")

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        slots: Slots,
        step: int = 0,
    ) -> tuple[dict[str, Tensor], Slots]:
        """The parameters after the step, as new tensors, and the velocities.

        Args:
            params: Name -> tensor.
            grads: Their gradients.
            slots: What the step before returned; {} at first.
            step: Which one it is, from 0: picks from a list of rates.

        Returns:
            Differentiable in `params`, `grads`, `slots` and the rates.
        """
        if self.momentum:
            before = slots.get("momentum")
            if before is not None:
                grads = {n: torch.add(grads[n], before[n], alpha=self.momentum) for n in params}
            slots = {"momentum": dict(grads)}
        rate = _rate(self.lr, step)
        return {n: _descend(p, grads[n], _of(rate, n)) for n, p in params.items()}, slots


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InnerAdam:
    """An inner loop of Adam, as `torch.optim.Adam` steps; the moments are differentiated too.

    Where a squared gradient is exactly 0 the derivative of its root is taken as 0, so that a unit
    no example reached does not turn the meta-gradient into NaN.

    Attributes:
        lr: As of `InnerSGD`.
        steps: How many steps; None leaves it to the meta-learner.
        betas: Decay of the mean and of the squared gradient, in [0, 1).
        eps: Added to the denominator, > 0.

    Source:
        Kingma & Ba 2015, algorithm 1 (arXiv:1412.6980).

    Example:
        >>> params, slots = InnerAdam(lr=0.1).update(
        ...     {"w": torch.ones(1)}, {"w": torch.full((1,), 7.0)}, {})
        >>> params, sorted(slots)
        ({'w': tensor([0.9000])}, ['mean', 'square'])
    """

    lr: Rate
    steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check("Adam", self.lr, self.steps)
        if not (all(0 <= b < 1 for b in self.betas) and self.eps > 0):
            raise InputError(
                f"an inner Adam needs betas in [0, 1) and eps > 0, got {self.betas} and {self.eps}"
            )

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        slots: Slots,
        step: int = 0,
    ) -> tuple[dict[str, Tensor], Slots]:
        """The parameters after the step, as new tensors, and the moments.

        Args:
            params: Name -> tensor.
            grads: Their gradients.
            slots: What the step before returned; {} at first.
            step: Which one it is, from 0: corrects the moments' bias, picks from a list of rates.

        Returns:
            Differentiable in `params`, `grads`, `slots` and the rates.
        """
        rate, (b1, b2) = _rate(self.lr, step), self.betas
        mean0, square0 = slots.get("mean", {}), slots.get("square", {})
        unbias1, unbias2 = 1 - b1 ** (step + 1), math.sqrt(1 - b2 ** (step + 1))
        after, mean, square = {}, {}, {}
        for name, p in params.items():
            g = grads[name]
            m, s = g * (1 - b1), g.square() * (1 - b2)
            if slots:
                m, s = m + b1 * mean0[name], s + b2 * square0[name]
            mean[name], square[name] = m, s
            direction = (m / unbias1) / (_root(s) / unbias2 + self.eps)
            after[name] = _descend(p, direction, _of(rate, name))
        return after, {"mean": mean, "square": square}


def _root(square: Tensor) -> Tensor:
    reached = square > 0
    return torch.where(reached, torch.where(reached, square, 1.0).sqrt(), 0.0)


def _descend(p: Tensor, direction: Tensor, rate: float | Tensor) -> Tensor:
    if isinstance(rate, Tensor):
        if rate.dim() and rate.shape != p.shape[-rate.dim() :]:  # a leading dimension is of tasks
            raise InputError(
                f"a learning rate of shape {tuple(rate.shape)} is none for a parameter of shape "
                f"{tuple(p.shape)}: it is a number, or has its parameter's shape"
            )
        return p - rate * direction
    return torch.add(p, direction, alpha=-rate)  # its derivative is one pass, that of sub two


def _rate(rates: Rate, step: int) -> float | Tensor | Mapping[str, float | Tensor]:
    if isinstance(rates, float | int | Tensor | Mapping):
        return rates
    if step >= len(rates):
        raise InputError(
            f"the inner loop has {len(rates)} learning rates, one a step, and comes to step "
            f"{step + 1}; give as many as there are steps"
        )
    return rates[step]


def _of(rate: float | Tensor | Mapping[str, float | Tensor], name: str) -> float | Tensor:
    if not isinstance(rate, Mapping):
        return rate
    if name not in rate:
        raise InputError(
            f"the inner loop has learning rates for {', '.join(rate)}, and none for {name!r}; "
            "meta.learned_rates(model, lr) has one for every parameter"
        )
    return rate[name]


def _check(kind: str, rates: Rate, steps: int | None) -> None:
    if steps is not None and (not isinstance(steps, int) or steps < 0):
        raise InputError(f"an inner {kind} takes steps >= 0, got {steps!r}")
    for rate in _leaves(rates):
        if isinstance(rate, Tensor):
            if not rate.is_floating_point():
                raise InputError(f"an inner {kind} needs a floating lr, got {rate.dtype}")
        elif not (isinstance(rate, float | int) and 0 < rate < math.inf):
            raise InputError(f"an inner {kind} needs lr > 0, got {rate!r}; write tg.{kind}(1e-2)")


def _leaves(rates: Rate) -> list[float | Tensor]:
    if isinstance(rates, Mapping):
        return list(rates.values())
    if isinstance(rates, float | int | Tensor) or not isinstance(rates, Sequence):
        return [rates]
    if not rates or isinstance(rates, str):
        raise InputError(f"an inner loop needs a learning rate for each step, got {rates!r}")
    return [leaf for rate in rates for leaf in _leaves(rate)]
