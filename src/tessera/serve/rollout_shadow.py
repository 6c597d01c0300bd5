"""Shadows: a candidate computes what the incumbent answers, and only how they differ is kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, final

from torch import Tensor

from tessera.errors import TesseraError
from tessera.serve.ports import Answering, Recording
from tessera.serve.records import Alias
from tessera.serve.rollout import Arm

__all__ = ["Shadows", "compare"]

_ROWS = 128  # that may be under way
_LATE_S = 10.0  # a shadow that has not started by then is dropped
_LOG = logging.getLogger("tessera.serve")


@final
class Shadows:
    """Sends requests to candidates as well, beside the answer's way.

    A shadow's request goes to the engine right behind the one that is answered, so that both may be
    rows of one batch; it takes its own tenant's turn. Nobody waits for it, it is dropped where too
    many are under way or the queue is full, and an error of it is counted, not raised.

    Args:
        engine: Computes.
        recorder: Told how the two differ, as events of the kind "shadow".

    Attributes:
        dropped: How many were not computed.
    """

    def __init__(self, engine: Answering, recorder: Recording | None) -> None:
        self._engine, self._recorder = engine, recorder
        self._turn = threading.Lock()
        self._rows = 0
        self.dropped = 0
        # Reads candidates that are not in memory, and compares: neither is the loop's business.
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="tessera-shadow")

    def mirror(
        self,
        request: str,
        alias: Alias,
        arm: Arm,
        inputs: Mapping[str, Tensor],
        answer: Future[Any],
    ) -> None:
        """Have `arm.shadow` compute a request too; never raises, never waits.

        Args:
            request: Its id.
            alias: That it named.
            arm: That answers.
            inputs: What it asked.
            answer: That the client gets.
        """
        if arm.shadow is None or self._recorder is None:
            return
        rows = len(next(iter(inputs.values())))
        with self._turn:
            if self._rows + rows > _ROWS:
                self.dropped += 1
                return
            self._rows += rows
        job = _Job(self, request, alias, arm, inputs, answer, rows)
        if self._engine.has(arm.shadow):
            job.begin()
        else:
            self._later(job.begin, job)

    def close(self) -> None:
        """Compare no more."""
        self._aside.shutdown(cancel_futures=True)

    def done(self, rows: int, *, dropped: bool) -> None:
        """Make room for others."""
        with self._turn:
            self._rows -= rows
            self.dropped += dropped

    def _later(self, act: Any, job: _Job) -> None:
        try:
            self._aside.submit(act)
        except RuntimeError:  # it is closed
            self.done(job.rows, dropped=True)


@final
class _Job:
    """One request's shadow."""

    def __init__(
        self,
        owner: Shadows,
        request: str,
        alias: Alias,
        arm: Arm,
        inputs: Mapping[str, Tensor],
        answer: Future[Any],
        rows: int,
    ) -> None:
        self.owner, self.request, self.alias, self.arm = owner, request, alias, arm
        self.inputs, self.answer, self.rows = inputs, answer, rows

    def begin(self) -> None:
        """Queue it."""
        owner, candidate = self.owner, self.arm.shadow
        assert candidate is not None
        try:
            tenant = self.alias.tenant
            shadow = owner._engine.submit(self.inputs, candidate, tenant=tenant, timeout_s=_LATE_S)
        except TesseraError as error:
            _LOG.debug("the shadow of %s was dropped: %s", self.request, error)
            owner.done(self.rows, dropped=True)
            return
        # Called in the engine's thread: it only hands over.
        shadow.add_done_callback(lambda _: owner._later(lambda: self.end(shadow), self))

    def end(self, shadow: Future[Any]) -> None:
        """Compare, and note it."""
        owner, found = self.owner, False
        try:
            # Queued before its shadow, so it is done, or about to be.
            real = self.answer.result(timeout=1.0)
            note = compare(real.outputs, shadow.result().outputs)
            note |= {
                "request": self.request,
                "alias": self.alias.name,
                "experiment": self.arm.experiment,
                "incumbent": self.arm.delta,
                "candidate": self.arm.shadow,
            }
            assert owner._recorder is not None
            owner._recorder.note("shadow", self.alias.tenant, note)
            found = True
        except Exception as error:  # cancelled, refused, late: none of the client's business
            _LOG.debug("the shadow of %s came to nothing: %s", self.request, error)
        finally:
            owner.done(self.rows, dropped=not found)


def compare(real: Mapping[str, Tensor], shadow: Mapping[str, Tensor]) -> dict[str, Any]:
    """How two answers differ, in a few numbers.

    Args:
        real: Name -> [rows, ...].
        shadow: Likewise.

    Returns:
        ``rows``; ``differ``: name -> the largest and the mean absolute difference; ``agree``: rows
        whose largest score is in the same place, of the first output [rows, classes >= 2].

    Example:
        >>> import torch
        >>> y = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> compare({"y": y}, {"y": torch.tensor([[0.0, 1.0], [1.0, 1.5]])})
        {'rows': 2, 'differ': {'y': [1.5, 0.375]}, 'agree': 1}
    """
    found: dict[str, Any] = {"rows": 0, "differ": {}}
    for name in sorted(real):
        a, b = real[name], shadow.get(name)
        found["rows"] = len(a)
        if b is None or a.shape != b.shape or not a.is_floating_point() or not a.numel():
            continue
        gap = (a.double() - b.double()).abs()
        largest, mean = float(gap.max()), float(gap.mean())
        # JSON has no infinity; where one arm is not finite, that is what is to be seen.
        finite = largest < float("inf")
        found["differ"][name] = [largest, mean] if finite else "not finite"
        if "agree" not in found and a.dim() == 2 and a.shape[1] > 1:
            found["agree"] = int((a.argmax(dim=1) == b.argmax(dim=1)).sum())
    return found
