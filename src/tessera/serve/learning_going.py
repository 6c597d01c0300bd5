"""One round: examples, a fit, a gate, and what it comes to."""

from __future__ import annotations

import concurrent.futures
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import final

from tessera.errors import BusyError, ConflictError
from tessera.profiler.measure import DEFAULT
from tessera.serve.blobs import Blobs
from tessera.serve.fitting import Fitted, Fitter, Order
from tessera.serve.fitting_log import told
from tessera.serve.fitting_values import FitSettings, Rehearsal
from tessera.serve.learning_examples import Spans
from tessera.serve.learning_rounds import Task
from tessera.serve.learning_values import LearningPolicy, Round
from tessera.serve.records import SYSTEM, DeltaRecord
from tessera.serve.registry import Registry
from tessera.serve.rollout_desk import Desk
from tessera.serve.rollout_values import Asked, Gated
from tessera.serve.web import Unavailable

__all__ = ["Going", "Means", "Stopped"]

_ALIVE_S = 15.0  # a turn is prolonged as often
_GATE_TRIES = 30
_GATE_WAIT_S = 1.0


class Stopped(Exception):
    """The server shuts down, or the turn was lost: whoever takes it next begins the round anew."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Means:
    """What a learner works with.

    Attributes:
        registry: Keeps everything.
        blobs: Where inputs are.
        fitter: Fits.
        desk: Holds gates.
        keep: What this server's log keeps of requests: see `Recorder`.
        padding: Of the model's inputs: see `batch.Form`.
    """

    registry: Registry
    blobs: Blobs
    fitter: Fitter
    desk: Desk
    keep: str
    padding: Mapping[str, int]


@final
class Going:
    """A round under way.

    Args:
        means: What it works with.
        task: What it is about.
        stop: Set where the server shuts down.

    Attributes:
        spent: Milliseconds and joules of its fit, so far.
    """

    def __init__(self, means: Means, task: Task, stop: threading.Event) -> None:
        self._means, self._task, self._stop = means, task, stop
        self._learning = means.registry.learning
        self.spent = (0.0, 0.0)

    def skip(self, reason: str, *, wait: int = 0) -> Round:
        """End it without a gate; `wait`: see `Rounds.finish`."""
        body = {"reason": reason[:1000]}
        step = self._learning.rounds.finish(self._task, "learn.skip", body, self.spent, wait=wait)
        return Round(step=step, alias=None)

    def run(self) -> Round:
        """Do it all."""
        means, task, policy = self._means, self._task, self._task.policy
        spans = self._learning.spans(means.blobs, policy, task.seen, means.padding)
        short = _short(spans, policy)
        if short is not None:
            reason, missing = short
            return self.skip(reason, wait=math.ceil(missing / policy.holdout))
        order = _order(task, spans)
        fitted = self._fit(order)
        record = self._keep(order, fitted)
        tenant, alias = task.alias.tenant, task.alias.name
        if record.hash == task.alias.delta:
            return self.skip("the fit changed nothing")
        if means.registry.alias(tenant, alias).generation != task.alias.generation:
            return self.skip("the alias moved while the candidate was fitted")
        gated = self._gate(spans, record.hash)
        gate = gated.gate
        step = self._learning.rounds.finish(
            task,
            "learn.gate",
            {
                "candidate": gate.candidate,
                "gate": gate.id,
                "passed": gate.passed,
                "overall": gate.decision["overall"],
                "reasons": list(gate.decision["reasons"][:20]),
                "generation": None if gated.alias is None else gated.alias.generation,
                "left_out": spans.left_out,
            },
            self.spent,
            moved=gated.alias,
        )
        return Round(step=step, alias=gated.alias)

    def _fit(self, order: Order) -> Fitted:
        began = time.monotonic()
        future = self._means.fitter.submit(order)
        try:
            self._wait(future)
            fitted = future.result()
        except Unavailable as error:  # its process died, perhaps of this very fit
            self._charge(began)
            raise ConflictError(f"the fit was lost: {error}") from error
        except BusyError:  # it was not begun
            raise
        except BaseException:
            self._charge(began)
            raise
        self.spent = (fitted.spent.ms, fitted.spent.joules)
        return fitted

    def _charge(self, began: float) -> None:
        """Charge a fit that brought nothing: its time, and what a core takes in that time."""
        s, turn = time.monotonic() - began, self._task.turn
        self.spent = (min(1e3 * s, turn.ms), min(DEFAULT.watts_per_core * s, turn.aside))

    def _keep(self, order: Order, fitted: Fitted) -> DeltaRecord:
        means = self._means
        try:
            record = means.registry.put_delta(
                order.tenant, fitted.delta, by=SYSTEM, parent=order.settings.parent
            )
        except BusyError as error:  # the tenant holds as many deltas as it may
            raise ConflictError(f"the candidate cannot be kept: {error}") from error
        body = told(
            order,
            fitted,
            hash=record.hash,
            blobs=means.blobs,
            keep=means.keep,
            machine=means.fitter.machine,
        )
        self._learning.rounds.fitted(self._task, body)
        return record

    def _wait(self, future: Future[Fitted]) -> None:
        alive = time.monotonic()
        while not concurrent.futures.wait([future], timeout=0.1).done:
            if self._stop.is_set():
                future.cancel()
                raise Stopped("the server is shutting down")
            if time.monotonic() - alive > _ALIVE_S:
                alive = time.monotonic()
                self._stay()
        if future.cancelled():
            raise Stopped("the server is shutting down")

    def _stay(self) -> None:
        if not self._learning.rounds.keep(self._task):
            raise Stopped("its turn was lost, or the alias learns no more")

    def _gate(self, spans: Spans, candidate: str) -> Gated:
        task, policy = self._task, self._task.policy
        assert spans.held is not None
        asked = Asked(
            candidate=candidate,
            policy=policy.gate,
            shots=spans.held.shots(policy.gate.slices),
            output=policy.output,
            promote=policy.promote,
            watch=policy.watch,
        )
        for left in reversed(range(_GATE_TRIES)):
            self._stay()
            try:
                return self._means.desk.gate(task.alias.tenant, task.alias.name, asked, by=SYSTEM)
            except (BusyError, ConflictError) as error:  # another gate, or the engine is full
                if self._stop.wait(_GATE_WAIT_S if left else 0):
                    raise Stopped("the server is shutting down") from error
                if not left:
                    raise ConflictError(f"no gate could be held: {error}") from error
        raise AssertionError("the last try returns or raises")


def _short(spans: Spans, policy: LearningPolicy) -> tuple[str, int] | None:
    """What there is too little of, and how many held-out examples are missing."""
    out = f"; {spans.left_out} could not be used" if spans.left_out else ""
    held = 0 if spans.held is None else len(spans.held.ids)
    if spans.new is None:
        return f"there is no labelled example to fit to{out}", policy.min_new
    if held < policy.gate.min_n:
        return (
            f"{held} examples are held out since then, and the gate needs {policy.gate.min_n}{out}",
            policy.gate.min_n - held,
        )
    return None


def _order(task: Task, spans: Spans) -> Order:
    policy, turn = task.policy, task.turn
    assert spans.new is not None
    budget = {**policy.fit.budget, "ms": turn.ms}
    if turn.joules is not None:
        budget["joules"] = turn.joules
    how = replace(policy.fit, budget=budget)
    if task.alias.delta:
        own = FitSettings(steps=how.steps, lr=how.lr, seed=how.seed, budget=budget)
        how = replace(own, parent=task.alias.delta)
    old = spans.old
    return Order(
        tenant=task.alias.tenant,
        inputs=spans.new.inputs,
        labels=spans.new.labels,
        settings=how,
        rehearsal=None
        if old is None
        else Rehearsal(inputs=old.inputs, labels=old.labels, rho=policy.rho, lam=policy.lam),
    )
