"""The steps of a fit: Adam over one delta or many beside each other, until they stop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tessera.errors import InputError, NonFiniteError
from tessera.peft.shots import LossFn
from tessera.profiler import Budget, Meter
from tessera.random import permutation

__all__ = ["Adam", "Course", "Purse", "Stop", "descend", "unless_it_fails"]

DONE = 1e-3
PATIENCE = 10


@final
class Stop:
    """Says when a loss has fallen far enough, or falls no more.

    After each pass over the shots, whose mean loss is l: stop where ``l <= 0.001 first``, or where
    the last 10 passes have not brought the best loss down by ``0.001 |first|``.

    Example:
        >>> stop = Stop(parts=1)
        >>> [stop(loss) for loss in (2.0, 1.0, 0.002)]
        [False, False, True]
        >>> flat = Stop(parts=1)
        >>> [flat(loss) for loss in [2.0] * 11].index(True)
        10
    """

    def __init__(self, parts: int) -> None:
        self._parts, self._pass = parts, list[float]()
        self._first = self._best = math.inf
        self._waited = 0

    def __call__(self, loss: float) -> bool:
        """Take the loss of the next step."""
        self._pass.append(loss)
        if len(self._pass) < self._parts:
            return False
        mean = sum(self._pass) / self._parts
        self._pass.clear()
        if self._first == math.inf:
            self._first = self._best = mean
            return False
        if mean <= self._best - DONE * abs(self._first):
            self._best, self._waited = mean, 0
        else:
            self._waited += 1
        return self._waited >= PATIENCE or (self._first > 0 and mean <= DONE * self._first)


@final
class Adam:
    """Bias-corrected Adam on leaves of n deltas, all their values in one buffer.

    ``p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)`` with the usual b1 = 0.9, b2 = 0.999,
    eps = 1e-8: few large ops in place of a few for each small tensor.

    Args:
        leaves: [n, ...] each; for n = 1 also without the leading 1.
        n: Deltas beside each other.
        lr: Learning rate, > 0.

    Source:
        Kingma & Ba 2015, "Adam: a method for stochastic optimization" (arXiv:1412.6980).

    Example:
        >>> p = torch.ones(2, requires_grad=True)
        >>> Adam([p], 1, 0.5).step([torch.tensor([3.0, 0.0])])
        >>> p.tolist()
        [0.5, 1.0]
    """

    def __init__(self, leaves: Sequence[Tensor], n: int, lr: float) -> None:
        self._n, self._lr, self._t = n, lr, 0
        places: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, leaf in enumerate(leaves):
            places.setdefault((leaf.dtype, leaf.device), []).append(i)
        self._leaves, self._groups = leaves, list(places.values())
        self._state = []
        for (dtype, _), where in places.items():
            # Half precision would lose steps as small as these: its values are kept in float32.
            kept = torch.promote_types(dtype, torch.float32)
            values = self._flat([leaves[i].detach() for i in where]).to(kept)
            self._state.append((values, torch.zeros_like(values), torch.zeros_like(values)))

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(self._n, -1) for t in tensors], 1)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], moving: Tensor | None = None) -> None:
        """Go one step.

        Args:
            gradients: One a leaf; None is zero.
            moving: bool [n], on any device: the others are left as they are; None: all move.
        """
        self._t += 1
        rate, root = self._lr / (1 - 0.9**self._t), math.sqrt(1 - 0.999**self._t)
        for where, (values, m, v) in zip(self._groups, self._state, strict=True):
            found = [gradients[i] for i in where]
            own = [self._leaves[i] for i in where]
            g = self._flat(
                [torch.zeros_like(p) if d is None else d for p, d in zip(own, found, strict=True)]
            ).to(values.dtype)
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            down = v.sqrt().div_(root).add_(1e-8)
            if moving is None:
                values.addcdiv_(m, down, value=-rate)
            else:
                values.sub_(torch.where(moving.to(m.device)[:, None], rate * m / down, 0.0))
            sizes = [p.numel() // self._n for p in own]
            for p, new in zip(own, torch.split(values, sizes, 1), strict=True):
                p.copy_(new.reshape(p.shape))

    def finite(self) -> list[bool]:
        """Of each delta whether all its values are finite."""
        whole = [values.isfinite().all(1) for values, _, _ in self._state]
        return [all(each) for each in zip(*(w.tolist() for w in whole), strict=True)]


@final
class Purse:
    """A budget over all a call does: what comes before the steps is charged to it too.

    Args:
        budget: None: no cap.

    Example:
        >>> purse = Purse(Budget(steps=2))
        >>> list(purse.units(5)), list(Purse(None).units(3))
        ([0, 1], [0, 1, 2])
    """

    def __init__(self, budget: Budget | None) -> None:
        self._budget = budget
        if budget is not None:
            self._meter: Meter = budget.meter
            self._begun = self._meter.read()
            budget.stopped_by = None

    def units(self, steps: int, waiting: int = 0) -> Generator[int, None, None]:
        """0, 1, ... while the budget allows another step.

        Args:
            steps: Most steps.
            waiting: Loops still to come after this one, which share what is left.
        """
        budget = self._budget
        if budget is None:
            yield from range(steps)
            return
        spent = self._meter.since(self._begun)
        ms = None if budget.ms is None else (budget.ms - spent.ms) / (1 + waiting)
        joules = None if budget.joules is None else (budget.joules - spent.joules) / (1 + waiting)
        if ms is not None and ms <= 0:
            budget.stopped_by = "ms"
        elif joules is not None and joules <= 0:
            budget.stopped_by = "joules"
        else:
            # Preparing takes longer than a step. It is charged, but it must not count as a step,
            # or none would seem to fit: so the steps have a budget of what is left.
            most = min(steps, budget.steps or steps)
            left = Budget(ms=ms, joules=joules, steps=most, meter=self._meter)
            yield from left
            if left.stopped_by != "steps" or most < steps or most == budget.steps:
                budget.stopped_by = left.stopped_by or budget.stopped_by

    def settle(self) -> None:
        """Write what was spent into the budget."""
        if self._budget is not None:
            self._budget.spent = self._meter.since(self._begun)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Course:
    """What a fit was asked for.

    Attributes:
        steps: Most steps, >= 1.
        lr: Learning rate, > 0.
        loss_fn: ``loss_fn(output, y)``; None: see `peft.fit`.
        seed: Of the order of batches.
        purse: May end it sooner.

    Raises:
        InputError: `steps` or `lr` is out of range.

    Example:
        >>> Course(steps=20, lr=0.1, loss_fn=None, seed=0, purse=Purse(None)).steps
        20
    """

    steps: int
    lr: float
    loss_fn: LossFn | None
    seed: int
    purse: Purse

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"a fit needs a whole number of steps >= 1, got {self.steps!r}")
        if not isinstance(self.lr, int | float) or not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"a fit needs lr > 0 and finite, got {self.lr!r}")


def descend(
    leaves: Sequence[Tensor],
    losses: Callable[[int], Tensor],
    course: Course,
    *,
    names: Sequence[str],
    parts: int = 1,
    rows: int = 1,
    waiting: int = 0,
) -> None:
    """Bring the losses of n deltas down, each by its own values.

    Args:
        leaves: [rows, ...] each, row i of delta i; or the tensors of the one delta.
        losses: The losses [n] on a part of the shots.
        course: What was asked for.
        names: Of the n deltas, for messages.
        parts: How many parts there are; each step takes one, each pass in an order of its own.
        rows: Of the leaves, >= n; those behind the n-th have no loss, and stay.
        waiting: Such loops still to come after this one, which share the budget.

    Raises:
        NonFiniteError: A loss or a value is NaN or infinite.
        InputError: The loss does not depend on the leaves.
    """
    n, adam = len(names), Adam(leaves, rows, course.lr)
    stops, moving = [Stop(parts) for _ in names], [True] * n
    # The first forward prepares what later ones take for granted: no step, to the budget.
    ahead: Tensor | None = losses(_part(0, parts, course.seed))
    with contextlib.closing(course.purse.units(course.steps, waiting)) as units:
        for step in units:
            loss = losses(_part(step, parts, course.seed)) if ahead is None else ahead
            ahead = None
            for i, value in enumerate(loss.tolist()):
                if not math.isfinite(value):
                    raise _non_finite(names[i], f"the loss at step {step} is {value}")
                moving[i] = moving[i] and not stops[i](value)
            if not any(moving):
                break
            if not loss.requires_grad:
                raise InputError(
                    f"{names[0]}: the loss does not depend on the delta: was it computed under "
                    "no_grad, from detached tensors, or past all sites of the delta?"
                )
            found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
            still = None if all(moving) else torch.tensor([*moving, *[False] * (rows - n)])
            adam.step(found, still)
    for name, finite in zip(names, adam.finite(), strict=False):
        if not finite:
            raise _non_finite(name, "its values became NaN or infinite")


def _part(step: int, parts: int, seed: int) -> int:
    if parts == 1:
        return 0
    return int(permutation(parts, seed, "peft.fit", step // parts)[step % parts])


def _non_finite(name: str, what: str) -> NonFiniteError:
    return NonFiniteError(
        f"{name}: {what}; the delta is as it was. Look at the shots, or lower lr="
    )


@contextlib.contextmanager
def unless_it_fails(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the tensors' values back if the block is left by an exception, whatever it is.

    Example:
        >>> p = torch.zeros(1)
        >>> with contextlib.suppress(RuntimeError), unless_it_fails([p]):
        ...     _ = p.add_(1)
        ...     raise RuntimeError
        >>> p.item()
        0.0
    """
    saved = [t.detach().clone() for t in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        raise
