"""`fit`: the inner loop on support examples, from three of them in a fraction of a second."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tessera.arch.delta import Delta
from tessera.arch.overlay import overlay
from tessera.errors import DeltaError
from tessera.peft.descent import Course, Purse, descend, unless_it_fails
from tessera.peft.memo import Memo
from tessera.peft.shots import LossFn, Shots, loss_of, read_shots
from tessera.profiler import Budget

__all__ = ["fit", "fit_one", "fitting", "home_of", "require_trainable"]


def fit(
    delta: Delta,
    shots: Any,
    *,
    steps: int = 20,
    lr: float = 5e-3,
    loss_fn: LossFn | None = None,
    budget: Budget | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
) -> Delta:
    """Fit a delta to a few examples, in place.

    Adam on the delta's tensors alone: ``delta -= lr adam(grad of the mean loss on the shots)``.
    The base is neither changed nor copied, and runs in eval mode, so that dropout draws nothing.
    Modules below the delta's lowest site are called in the first step only, and their outputs
    remembered: a delta over the top layers costs these layers only. (What a forward does between
    modules, as ``F.relu``, is no module, and done again.) The values are the same bits as without.

    It stops before `steps` when the loss is a thousandth of its first value, or when 10 passes over
    the shots have not brought the best loss down by a thousandth of the first; then, or when the
    budget ends it, the delta is as the last step left it. If anything is raised it has its old
    values.

    Args:
        delta: Live, as `peft.lora` and the others make it; not a snapshot.
        shots: A `data.Batch`, a tuple (x, y), or a list of these; x a tensor [n, ...] or the
            model's inputs by name, y int64 labels [n] or whatever `loss_fn` takes. Of a list each
            step takes one batch, each pass in a new order.
        steps: Most steps, >= 1.
        lr: Adam's learning rate, > 0.
        loss_fn: ``loss_fn(output, y)``, a 0-d tensor, the mean over the rows. None: the loss in the
            model's output if there is one (transformers, given labels in x), else cross entropy on
            the output or its ``logits``.
        budget: Caps steps, milliseconds or joules of the whole call, the preparation included.
            Afterwards it says what was spent, and in ``stopped_by`` what ended the fit; None if
            that was the loss or `steps`.
        model: The base; None: the model that the delta was made from, while that lives.
        seed: Of the order of the batches in a list; nothing else is random.

    Returns:
        The same delta.

    Raises:
        InputError: A setting is out of range; there are no shots, their lengths differ, a label is
            none of the model's classes, or NaN is in x.
        DeltaError: The delta is a snapshot, of another base, or its model is gone.
        NonFiniteError: The loss became NaN or infinite; the delta is as it was.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> delta = Delta(
        ...     kind="ia3", tensors={"gain_out": torch.ones(2, requires_grad=True)}
        ... )
        >>> shots = torch.eye(3)[:2], torch.tensor([0, 1])
        >>> def loss():
        ...     gained = model(shots[0]) * delta.tensors["gain_out"]
        ...     return nn.functional.cross_entropy(gained, shots[1]).item()
        >>> before = loss()
        >>> fit(delta, shots, steps=5, model=model) is delta, loss() < before
        (True, True)
    """
    course = Course(steps=steps, lr=lr, loss_fn=loss_fn, seed=seed, purse=Purse(budget))
    base = home_of(delta, model, "peft.fit")
    leaves = require_trainable(delta, "peft.fit")
    parts = read_shots(shots, "peft.fit", base)
    with fitting(leaves, course.purse):
        fit_one(delta, base, parts, course, name="peft.fit")
    return delta


def fit_one(
    delta: Delta,
    base: nn.Module,
    parts: Sequence[Shots],
    course: Course,
    *,
    name: str,
    waiting: int = 0,
) -> None:
    """Fit a delta of `base` to checked shots; the purse is shared by `waiting` more fits."""
    leaves = delta.parameters()
    with contextlib.closing(Memo(frozen_shadow(base, delta), leaves)) as memo:

        def losses(part: int) -> Tensor:
            own = parts[part]

            def work() -> Tensor:
                return loss_of(own.through(memo.model), own.y, course.loss_fn, name)

            return memo.run(part, work)[None]

        descend(leaves, losses, course, names=[name], parts=len(parts), waiting=waiting)


@contextlib.contextmanager
def fitting(leaves: Sequence[Tensor], purse: Purse) -> Iterator[None]:
    """Record gradients, whatever the caller is in; if it fails, the leaves are as they were."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), unless_it_fails(leaves):
            yield
    finally:
        purse.settle()


def home_of(delta: Delta, model: nn.Module | None, who: str) -> nn.Module:
    """The whole model that a delta is run in.

    Raises:
        DeltaError: None was given, and the delta knows of none.
    """
    if not isinstance(delta, Delta):
        raise DeltaError(
            f"{who} needs a delta, as peft.lora(model, r=8) makes it, got {type(delta).__name__}"
        )
    found = delta.model() if model is None else model
    if found is None:
        raise DeltaError(
            f"{who} does not know the base of {delta!r}: it was loaded from a file, or the model "
            "is gone. Say model="
        )
    return found


def require_trainable(delta: Delta, who: str) -> list[Tensor]:
    """The tensors of a delta that can be fitted.

    Raises:
        DeltaError: There are none: it is a snapshot.
    """
    leaves = delta.parameters()
    if not leaves:
        raise DeltaError(
            f"{who}: {delta!r} is a snapshot, nothing in it is trainable; fit delta.trainable()"
        )
    return leaves


def frozen_shadow(model: nn.Module, delta: Delta) -> nn.Module:
    """A tree of the model's modules of one's own, in eval mode, under a delta.

    Raises:
        DeltaError: The delta is of another base.
    """
    shadow = overlay(model, [(delta, 1.0)], frozen=True)
    for module in shadow.modules():
        module.__dict__["training"] = False
    return shadow
