"""One fit: an order in, a delta out. The same in a thread of the server and in its process."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from tessera import peft
from tessera.arch import Delta
from tessera.errors import DeltaError, InputError, NonFiniteError, TesseraError
from tessera.peft.shots import LossFn, loss_of
from tessera.profiler import Budget, Measurement, measure
from tessera.serve.batch import device_of
from tessera.serve.fitting_values import FitSettings, Rehearsal
from tessera.serve.rehearsal import rehearsing

__all__ = ["Fitted", "FitterSettings", "Load", "Order", "run_order"]

_RANKS = (4, 2, 1)
_USES = {
    "lora": {"r", "alpha", "sites", "head"},
    "ia3": {"sites", "feedforward", "head"},
    "mask": {"sites", "head"},
    "prefix": {"tokens", "head"},
    "prompt": {"tokens", "head"},
}
_OWN = ("kind", "r", "alpha", "sites", "feedforward", "head", "tokens")
_CAPS = ("ms", "joules", "steps")


class Load(Protocol):
    """`Registry.load`, or what stands in for it."""

    def __call__(self, hash: str, *, tenant: str | None = None) -> Delta:
        """The delta of that hash, as the tenant holds it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FitterSettings:
    """How much a server takes on.

    Attributes:
        workers: Fits at a time; each has a process, and with it a copy of the base.
        waiting: Fits that may wait behind them.
        threads: Of torch, for each.
        rows: Most shots.
        steps: Most steps.
        ms: Most milliseconds of one fit, whatever its budget says.
        wait_s: A fit that has not begun after so long is refused.
        niceness: How far their process stands back where processors are short, 0 to 19, as the
            system counts it: at 19 it has what the others leave, at 0 as much as any of them. A fit
            in a thread never stands back further than 5: it holds the interpreter's lock at times.
        grace_s: A process that has not ended a fit so long after `ms` is ended with it.

    Example:
        >>> FitterSettings(workers=2).threads
        1
    """

    workers: int = 1
    waiting: int = 8
    threads: int = 1
    rows: int = 256
    steps: int = 1000
    ms: float = 30_000.0
    wait_s: float = 30.0
    niceness: int = 19
    grace_s: float = 30.0


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """A fit that is wanted.

    Attributes:
        tenant: For whom.
        inputs: Name -> [shots, ...], as the model's forward takes them.
        labels: int64 [shots]; None: among the inputs, for a model that computes its own loss.
        settings: How.
        rehearsal: Examples of before that are fitted along; None: there are none.
    """

    tenant: str
    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    settings: FitSettings
    rehearsal: Rehearsal | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """What a fit brought.

    Attributes:
        delta: A snapshot.
        steps: That were taken.
        stopped_by: "steps", "loss", "ms" or "joules".
        losses: Before each step; where the loss ended it, at the end too.
        spent: Time and energy.
    """

    delta: Delta
    steps: int
    stopped_by: str
    losses: tuple[float, ...]
    spent: Measurement


def run_order(
    model: nn.Module, load: Load | None, order: Order, settings: FitterSettings
) -> Fitted:
    """Fit what is ordered; the model is neither changed nor locked, for a fit runs a shadow of it.

    Args:
        model: The base, in eval mode.
        load: Loads what the fit goes on from; None: nothing can be gone on from.
        order: Checked here.
        settings: What the server takes on.

    Raises:
        InputError: A field is not as it should be, or the model cannot run the shots; the message
            names the field.
        DeltaError: What it goes on from is of another base.
        NonFiniteError: The loss became NaN or infinite.

    Example:
        >>> order = Order(
        ...     tenant="acme",
        ...     inputs={"input": torch.eye(3)[:2]},
        ...     labels=torch.tensor([0, 1]),
        ...     settings=FitSettings(r=1, steps=5),
        ... )
        >>> found = run_order(nn.Linear(3, 2), None, order, FitterSettings())
        >>> found.steps, found.losses[-1] < found.losses[0]
        (5, True)
    """
    how = order.settings
    budget = _budget(how, settings)
    rows = _rows(order, settings)
    device = device_of(model)
    delta = _fresh(model, load, order, device)
    before, losses = delta.hash, list[Tensor]()
    try:
        with measure() as preparing:
            own, shots = _shots(model, delta, order, rows, device)

        def loss_fn(output: Any, y: Any) -> Tensor:
            loss = _loss(output, y, own)
            losses.append(loss.detach())
            return loss

        peft.fit(
            delta,
            shots,
            steps=how.steps,
            lr=how.lr,
            loss_fn=loss_fn,
            budget=budget,
            model=model,
            seed=how.seed,
        )
    except (DeltaError, NonFiniteError):
        raise
    except TesseraError as error:
        raise InputError(_named(error)) from error
    except Exception as error:  # whatever the model says of inputs it cannot take
        raise InputError(f"inputs: the model could not run these {rows} shots: {error}") from error
    why = budget.stopped_by or "loss"
    # The first loss is computed before the first step, be there one or not.
    if why in ("ms", "joules") and len(losses) == 1 and delta.hash == before:
        raise InputError(
            f"budget: {budget.spent.ms:.3g} ms went into the preparation, and no step was left "
            "to take; allow more. Nothing was kept"
        )
    said = tuple(float(loss) for loss in losses)
    return Fitted(
        delta=delta.to("cpu"),
        steps=len(said) - (why == "loss"),
        stopped_by=why,
        losses=said,
        spent=Measurement(
            ms=preparing.ms + budget.spent.ms,
            joules=preparing.joules + budget.spent.joules,
            joules_source=budget.spent.joules_source,
        ),
    )


def _shots(
    model: nn.Module, delta: Delta, order: Order, rows: int, device: torch.device
) -> tuple[LossFn | None, tuple[dict[str, Tensor], Tensor | None]]:
    """The loss, None the usual one; and the shots, the new ones first."""
    # Copies: the last bits of a product depend on where in memory its factors begin, and these may
    # be parts of a request's body, of a message, or of a file.
    x = _copies(order.inputs, device)
    y = None if order.labels is None else order.labels.to(device, copy=True)
    if order.rehearsal is None:
        return None, (x, y)
    old = replace(order.rehearsal, inputs=_copies(order.rehearsal.inputs, device))
    if x.keys() != old.inputs.keys() or y is None or old.labels is None:
        raise InputError(
            f"a rehearsal has labels and the inputs that the shots have: {sorted(x)}; this one has "
            f"{sorted(old.inputs)}"
        )
    loss_fn = rehearsing(model, delta, old, rows)
    both = {name: torch.cat([tensor, old.inputs[name]]) for name, tensor in x.items()}
    return loss_fn, (both, torch.cat([y, old.labels.to(device)]))


def _copies(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, copy=True) for name, tensor in inputs.items()}


def _fresh(model: nn.Module, load: Load | None, order: Order, device: torch.device) -> Delta:
    how = order.settings
    said = sorted(n for n in _OWN if getattr(how, n) is not None)
    if how.parent:
        if said:
            raise InputError(f"parent: the delta it goes on from has its own {said[0]!r}")
        if load is None:
            raise InputError("parent: there is no registry to load it from")
        return load(how.parent, tenant=order.tenant).to(device).trainable()
    try:
        return _make(model, how)
    except TesseraError as error:
        # A module that is not there is a fault of the request, not of the path.
        raise InputError(f"{', '.join(said) or 'kind'}: {error}") from error


def _make(model: nn.Module, how: FitSettings) -> Delta:
    kind = how.kind or "lora"
    if kind not in _USES:
        raise InputError(f"kind is one of {', '.join(_USES)}; got {kind!r:.40}")
    extra = {n for n in _OWN if getattr(how, n) is not None} - _USES[kind] - {"kind"}
    if extra:
        raise InputError(f"a {kind} has no {min(extra)!r}; it has {', '.join(sorted(_USES[kind]))}")
    head = how.head
    if kind == "lora":
        return _lora(model, how)
    if kind == "ia3":
        return peft.ia3(model, sites=how.sites, feedforward=how.feedforward, head=head)
    if kind == "mask":
        if how.sites is None:
            raise InputError("a mask needs sites: which parameters change, as ['*.bias']")
        return peft.mask(model, how.sites, head=head)
    if how.tokens is None or not 1 <= how.tokens <= 512:
        raise InputError(f"a {kind} needs tokens, 1 to 512; got {how.tokens}")
    make = peft.prefix if kind == "prefix" else peft.prompt
    return make(model, how.tokens, head=head, seed=how.seed)


def _lora(model: nn.Module, how: FitSettings) -> Delta:
    ranks = _RANKS if how.r is None else (how.r,)
    for rank in ranks[:-1]:  # a layer may be smaller than the usual rank
        with contextlib.suppress(InputError):
            return peft.lora(model, rank, how.alpha, sites=how.sites, head=how.head, seed=how.seed)
    return peft.lora(model, ranks[-1], how.alpha, sites=how.sites, head=how.head, seed=how.seed)


def _budget(how: FitSettings, most: FitterSettings) -> Budget:
    if type(how.steps) is not int or not 1 <= how.steps <= most.steps:
        raise InputError(f"steps is 1 to {most.steps}, got {how.steps!r:.40}")
    if not (type(how.lr) in (int, float) and 0 < how.lr < math.inf):
        raise InputError(f"lr is a finite number > 0, got {how.lr!r:.40}")
    for name, cap in how.budget.items():
        if name not in _CAPS:
            raise InputError(f"budget has a field {name[:40]!r}; it has {', '.join(_CAPS)}")
        whole = type(cap) is int if name == "steps" else type(cap) in (int, float)
        if not (whole and 0 < cap < math.inf):
            raise InputError(f"budget.{name} is a number > 0, got {cap!r:.40}")
    return Budget(
        ms=min(float(how.budget.get("ms", most.ms)), most.ms),
        joules=how.budget.get("joules"),
        # Said in any case, so that what ends a fit and is none of these is the loss.
        steps=min(how.steps, int(how.budget.get("steps", how.steps))),
    )


def _rows(order: Order, most: FitterSettings) -> int:
    if not order.inputs:
        raise InputError("inputs: there are no shots")
    for name, tensor in order.inputs.items():
        if tensor.dim() < 1 or not len(tensor):
            raise InputError(f"inputs: {name!r} {tuple(tensor.shape)} holds no shots")
        if len(tensor) > most.rows:
            raise InputError(
                f"inputs: {name!r} holds {len(tensor)} shots, at most {most.rows} are taken"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"inputs: {name!r} holds NaN or infinity")
    rows = len(next(iter(order.inputs.values())))
    if order.labels is not None and order.labels.shape[:1] != (rows,):
        raise InputError(
            f"labels: there are {tuple(order.labels.shape)} for {rows} shots; give one for each"
        )
    return rows


def _loss(output: Any, y: Any, own: LossFn | None) -> Tensor:
    try:
        return loss_of(output, y, own, "labels")
    except InputError as error:
        raise InputError(f"labels: {str(error).removeprefix('labels: ')}") from error


def _named(error: TesseraError) -> str:
    """The message, with the field of the request that it is about in front."""
    text = str(error)
    return text if text.startswith("labels: ") else f"inputs: {text}"
