"""Fits on behalf of tenants: a few threads beside the engine, a short queue, one a tenant."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from tessera import peft
from tessera.arch import Delta
from tessera.errors import BusyError, DeltaError, InputError, NonFiniteError, TesseraError
from tessera.peft.shots import loss_of
from tessera.profiler import Budget, Measurement
from tessera.serve.fitting_values import FitSettings

__all__ = ["Fitted", "Fitter", "FitterSettings", "Order"]

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


class _Loading(Protocol):
    def load(self, hash: str, *, tenant: str | None = None) -> Delta: ...


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FitterSettings:
    """How much a server takes on.

    Attributes:
        workers: Fits at a time.
        waiting: Fits that may wait behind them.
        threads: Of torch, for each.
        rows: Most shots.
        steps: Most steps.
        ms: Most milliseconds of one fit, whatever its budget says.
        wait_s: A fit that has not begun after so long is refused.
        niceness: How far a fit stands back for the engine where the processor is short, 0 to 19.

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
    niceness: int = 5


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """A fit that is wanted.

    Attributes:
        tenant: For whom.
        inputs: Name -> [shots, ...], as the model's forward takes them.
        labels: int64 [shots]; None: among the inputs, for a model that computes its own loss.
        settings: How.
    """

    tenant: str
    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    settings: FitSettings


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


@final
class Fitter:
    """Runs fits over the model that an engine serves, without touching it.

    `peft.fit` runs a shadow of the base, so it needs no lock; its threads have few of torch's own
    and stand back for the engine's.

    Args:
        model: The base, in eval mode.
        registry: Loads what a fit goes on from.
        settings: By default `FitterSettings()`.

    Example:
        >>> fitter = Fitter(nn.Linear(3, 2), registry=None)
        >>> order = Order(
        ...     tenant="acme",
        ...     inputs={"input": torch.eye(3)[:2]},
        ...     labels=torch.tensor([0, 1]),
        ...     settings=FitSettings(r=1, steps=5),
        ... )
        >>> with fitter.place("acme"):
        ...     found = fitter.submit(order).result()
        >>> found.steps, found.losses[-1] < found.losses[0]
        (5, True)
        >>> fitter.close()
    """

    def __init__(
        self, model: nn.Module, registry: _Loading | None, settings: FitterSettings | None = None
    ) -> None:
        self.settings = settings or FitterSettings()
        self._model, self._registry = model, registry
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._closing = False
        self._pool = ThreadPoolExecutor(self.settings.workers, thread_name_prefix="tessera-fit")
        # torch takes the number a thread says as every later thread's too: so all say it now, and
        # afterwards it is what it was.
        threads, gate = torch.get_num_threads(), threading.Barrier(self.settings.workers)
        for done in [
            self._pool.submit(_prepare, gate, self.settings) for _ in range(self.settings.workers)
        ]:
            done.result()
        torch.set_num_threads(threads)

    @contextlib.contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """A place in the queue for this tenant, to be taken before its shots are read.

        Raises:
            BusyError: It has one already, all are taken, or the server is shutting down.
        """
        with self._lock:
            if self._closing:
                raise BusyError("the server is shutting down", retry_after_s=5.0)
            if tenant in self._busy:
                raise BusyError(f"a fit of {tenant}'s is under way; one is taken at a time")
            if len(self._busy) >= self.settings.workers + self.settings.waiting:
                raise BusyError(
                    f"{len(self._busy)} fits are under way, and no more are taken", retry_after_s=2
                )
            self._busy.add(tenant)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(tenant)

    def submit(self, order: Order) -> Future[Fitted]:
        """Queue a fit; the caller has a `place`.

        Raises:
            BusyError: The server is shutting down.
        """
        try:
            return self._pool.submit(self._run, order, time.monotonic() + self.settings.wait_s)
        except RuntimeError as error:
            raise BusyError("the server is shutting down", retry_after_s=5.0) from error

    def close(self) -> None:
        """Drop what waits, and wait for what runs."""
        with self._lock:
            self._closing = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- in a worker -----------------------------------------------------------------------------

    def _run(self, order: Order, until: float) -> Fitted:
        if time.monotonic() > until:
            raise BusyError("the fit waited too long for its turn", retry_after_s=5.0)
        how = order.settings
        budget = _budget(how, self.settings)
        rows = _rows(order, self.settings)
        delta = self._fresh(order)
        before, losses = delta.hash, list[Tensor]()

        def loss_fn(output: Any, y: Any) -> Tensor:
            loss = _loss(output, y)
            losses.append(loss.detach())
            return loss

        x = {name: tensor.to(self._device) for name, tensor in order.inputs.items()}
        y = None if order.labels is None else order.labels.to(self._device)
        try:
            peft.fit(
                delta,
                (x, y),
                steps=how.steps,
                lr=how.lr,
                loss_fn=loss_fn,
                budget=budget,
                model=self._model,
                seed=how.seed,
            )
        except (DeltaError, NonFiniteError):
            raise
        except TesseraError as error:
            raise InputError(_named(error)) from error
        except Exception as error:  # whatever the model says of inputs it cannot take
            raise InputError(f"inputs: the model could not run these {rows} shots: {error}") from (
                error
            )
        why = budget.stopped_by or ("steps" if len(losses) >= how.steps else "loss")
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
            spent=budget.spent,
        )

    def _fresh(self, order: Order) -> Delta:
        how = order.settings
        said = sorted(n for n in _OWN if getattr(how, n) is not None)
        if how.parent:
            if said:
                raise InputError(f"parent: the delta it goes on from has its own {said[0]!r}")
            assert self._registry is not None
            held = self._registry.load(how.parent, tenant=order.tenant)
            return held.to(self._device).trainable()
        try:
            return _make(self._model, how)
        except TesseraError as error:
            # A module that is not there is a fault of the request, not of the path.
            raise InputError(f"{', '.join(said) or 'kind'}: {error}") from error


def _prepare(gate: threading.Barrier, settings: FitterSettings) -> None:
    gate.wait(60)
    torch.get_num_threads()  # the first one in a thread takes what holds for all; later ones stay
    torch.set_num_threads(settings.threads)
    with contextlib.suppress(OSError, AttributeError):  # of a thread on Linux; nowhere else
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), settings.niceness)


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
    steps, joules = how.budget.get("steps"), how.budget.get("joules")
    return Budget(
        ms=min(float(how.budget.get("ms", most.ms)), most.ms),
        joules=joules,
        steps=None if steps is None else int(steps),
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


def _loss(output: Any, y: Any) -> Tensor:
    try:
        return loss_of(output, y, None, "labels")
    except InputError as error:
        raise InputError(f"labels: {str(error).removeprefix('labels: ')}") from error


def _named(error: TesseraError) -> str:
    """The message, with the field of the request that it is about in front."""
    text = str(error)
    return text if text.startswith("labels: ") else f"inputs: {text}"
