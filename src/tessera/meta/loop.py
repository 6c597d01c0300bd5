"""What `maml_step` and `maml_tasks` share: what is adapted, and how the loop is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from tessera.arch.delta import Delta
from tessera.errors import InputError, unknown_name
from tessera.meta.adapted import MetaState
from tessera.meta.calling import Buffers, Functional
from tessera.meta.inner import InnerOpt, LossOf, Point, descend, require_finite, steps_of
from tessera.meta.recompute import descend_again

__all__ = ["LossFn", "Only", "Plan", "chosen_of", "one_loss"]

LossFn: TypeAlias = Callable[[Any, Any], Tensor]
Only: TypeAlias = str | Sequence[str] | Delta | None


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """The arguments of an inner loop, checked; see `maml_step`."""

    inner_opt: InnerOpt
    K: int | None
    create_graph: bool
    buffers: Buffers
    only: Only
    remat: bool
    truncate: int | None
    state: MetaState | None

    def functional(self, model: nn.Module, *, stacked: bool = False) -> Functional:
        """`model`, callable with other tensors, once everything was found in order."""
        steps_of(self.inner_opt, self.K)
        if self.truncate is not None:
            n = self.truncate
            if isinstance(n, bool) or not isinstance(n, int) or n < 0:
                raise InputError(f"truncate= is a number of last steps, >= 0, got {n!r}")
            if not self.create_graph:
                raise InputError("create_graph=False is truncate=0 already; give one of the two")
        if torch.is_inference_mode_enabled():
            raise InputError(
                "an inner loop needs gradients, which torch.inference_mode() has none of; use "
                "torch.no_grad(), or tg.no_grad()"
            )
        delta = self.only if isinstance(self.only, Delta) else None
        double = self.create_graph and torch.is_grad_enabled()
        return Functional(model, buffers=self.buffers, double=double, delta=delta, stacked=stacked)

    def start(self, run: Functional, tasks: int | None) -> Point:
        """Where the loop begins: at the model, or where `state` left off."""
        chosen = chosen_of(run.params(), self.only)
        running = run.running()
        slots: Any = {}
        if tasks is not None:
            chosen = {n: p.expand(tasks, *p.shape) for n, p in chosen.items()}
            running = {n: b.expand(tasks, *b.shape) for n, b in running.items()}
        if self.state is not None:
            _require_same(self.state, chosen)
            chosen, slots = {**chosen, **self.state.params}, self.state.slots
            running = dict(self.state.running) or running
        if not torch.is_grad_enabled():
            chosen = {n: p.detach() for n, p in chosen.items()}
        # Views, so that a step's gradient is by what the forward is given and by nothing on the
        # way to it: a head may be made from the body, and a support set by the model.
        chosen = {
            n: p.view_as(p) if p.requires_grad else p.detach().requires_grad_()
            for n, p in chosen.items()
        }
        step = self.state.steps if self.state is not None else 0
        return Point(params=chosen, slots=slots, running=running, step=step)

    def descend(self, loss_of: LossOf, start: Point) -> Point:
        """All the steps, each differentiated again as far as it is wanted."""
        steps, rule = steps_of(self.inner_opt, self.K), self.inner_opt
        second = steps if self.create_graph and torch.is_grad_enabled() else 0
        if self.truncate is not None:
            second = min(second, self.truncate)
        with torch.enable_grad():
            point = descend(loss_of, start, rule, steps - second, create_graph=False)
            if self.remat:
                return descend_again(loss_of, point, rule, second)
            return descend(loss_of, point, rule, second, create_graph=True)

    def state_after(self, end: Point, tasks: int | None) -> MetaState:
        """What the loop is to return; detached where no graph was wanted.

        Raises:
            NonFiniteError: A loss on the way was NaN or infinite.
        """
        some = next(iter(end.params.values()))
        row = () if tasks is None else (tasks,)
        losses = torch.stack(end.losses) if end.losses else some.new_zeros(0, *row)
        require_finite(losses, end.step - len(end.losses))
        if self.state is not None and self.state.steps:
            losses = torch.cat([self.state.losses, losses])
        found = MetaState(
            losses=losses.detach(),
            params=end.params,
            slots=end.slots,
            running=end.running,
            steps=end.step,
        )
        return found if torch.is_grad_enabled() else _detached(found)


def _detached(state: MetaState) -> MetaState:
    return replace(
        state,
        params={n: p.detach() for n, p in state.params.items()},
        slots={s: {n: t.detach() for n, t in ts.items()} for s, ts in state.slots.items()},
        running={n: b.detach() for n, b in state.running.items()},
    )


def one_loss(loss_fn: LossFn, output: Any, y: Any) -> Tensor:
    """`loss_fn` of an output and its labels, which must be one number.

    Raises:
        InputError: It is not.

    Example:
        >>> one_loss(nn.functional.mse_loss, torch.ones(2), torch.zeros(2)).item()
        1.0
    """
    loss = loss_fn(output, y)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"loss_fn must return a 0-d tensor, got {got}; take its .mean()")
    return loss


def chosen_of(params: Mapping[str, Tensor], only: Only) -> dict[str, Tensor]:
    """What is adapted: those that require gradients, among those that are named.

    Example:
        >>> list(chosen_of(dict(nn.Linear(2, 1).named_parameters()), "bias"))
        ['bias']
    """
    names = list(params)
    if isinstance(only, str):
        only = [only]
    if only is not None and not isinstance(only, Delta):
        names = []
        for pattern in only:
            found = [n for n in params if _matches(n, pattern)]
            if not found:
                raise unknown_name("parameter", pattern, params)
            names += found
    chosen = {n: p for n, p in params.items() if n in names and p.requires_grad}
    if not chosen:
        raise InputError(
            "the inner loop has nothing to adapt: "
            + (
                "the model has no parameters"
                if not names
                else f"{names[0]!r} and the others it is to adapt have requires_grad=False"
            )
        )
    return chosen


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _require_same(state: MetaState, chosen: Mapping[str, Tensor]) -> None:
    """A loop goes on with what it adapted; one that begins elsewhere names some, or all."""
    ours = {n: tuple(p.shape) for n, p in chosen.items()}
    theirs = {n: tuple(p.shape) for n, p in state.params.items()}
    compared = [*theirs, *ours] if state.steps else list(theirs)
    odd = next((n for n in compared if ours.get(n) != theirs.get(n)), None)
    if odd is not None:
        raise InputError(
            f"state= is of another inner loop: it has {theirs.get(odd, 'nothing')} for {odd!r}, "
            f"this one adapts {ours.get(odd, 'no parameter of that name')}"
        )
