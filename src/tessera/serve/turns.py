"""A queue in which tenants take turns."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, final

from tessera.arch import Delta
from tessera.errors import BusyError
from tessera.serve.batch import Part

__all__ = ["Turns", "Waiting"]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Waiting:
    """A request in the queue.

    Attributes:
        tenant: Whose turn it takes.
        part: What is to be computed.
        delta: Under which delta; None: the base.
        form: Requests of equal form can share a batch; its first is the bucket.
        since: When it came, by the monotonic clock.
        until: When it is too late; None: never.
        future: Of its answer.
    """

    tenant: str
    part: Part
    delta: Delta | None
    form: tuple[Any, ...]
    since: float
    until: float | None
    future: Future[Any] = field(default_factory=Future)

    def alive(self) -> bool:
        """Whether it is still wanted; one that is late is told so."""
        if self.until is not None and time.monotonic() > self.until:
            if self.future.set_running_or_notify_cancel():
                self.future.set_exception(BusyError("the request waited too long"))
            return False
        return not self.future.cancelled()


@final
class Turns:
    """Requests by tenant, the tenants in the order in which it is their turn. Not locked.

    Attributes:
        rows: In all of them.

    Example:
        >>> from tessera.serve.batch import Part
        >>> turns = Turns()
        >>> def ask(tenant):
        ...     part = Part(inputs={}, delta="", rows=1, length=0)
        ...     return Waiting(
        ...         tenant=tenant, part=part, delta=None, form=(0,), since=0.0, until=None
        ...     )
        >>> for tenant in ("busy", "busy", "busy", "quiet"):
        ...     turns.add(ask(tenant))
        >>> [w.tenant for w in turns.take(max_rows=2, max_deltas=1)], turns.rows
        (['busy', 'quiet'], 2)
    """

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self.rows = 0

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __iter__(self) -> Iterator[Waiting]:
        for queue in self._queues.values():
            yield from queue

    def add(self, waiting: Waiting) -> None:
        """Put a request behind its tenant's others."""
        self._queues.setdefault(waiting.tenant, deque()).append(waiting)
        self.rows += waiting.part.rows

    def clear(self) -> None:
        """Forget them all."""
        self._queues.clear()
        self.rows = 0

    def first(self) -> Waiting:
        """The first request of the tenant whose turn it is."""
        return next(iter(self._queues.values()))[0]

    def take(self, *, max_rows: int, max_deltas: int) -> list[Waiting]:
        """Requests of one form, one a tenant and turn; they leave the queue.

        A tenant whose first request does not fit in keeps its place before those who are served.
        """
        taken: list[Waiting] = []
        deltas: set[str] = set()
        passed: list[str] = []
        rows, form = 0, None
        while self._queues and rows < max_rows and len(passed) < len(self._queues):
            tenant, queue = next(iter(self._queues.items()))
            waiting = queue[0]
            if not waiting.alive():
                self._drop(tenant, queue)
                continue
            form = form or waiting.form
            wanted = deltas | ({waiting.part.delta} - {""})
            fits = rows + waiting.part.rows <= max_rows and len(wanted) <= max_deltas
            if waiting.form == form and fits:
                taken.append(waiting)
                rows, deltas = rows + waiting.part.rows, wanted
                self._drop(tenant, queue)
                passed.clear()
            else:
                passed.append(tenant)
            if tenant in self._queues:
                self._queues.move_to_end(tenant)
        for tenant in reversed(passed):
            if tenant in self._queues:
                self._queues.move_to_end(tenant, last=False)
        return taken

    def _drop(self, tenant: str, queue: deque[Waiting]) -> None:
        self.rows -= queue.popleft().part.rows
        if not queue:
            del self._queues[tenant]
