"""`OnlineSchedule`: background work in small units that keeps out of the foreground's way.

The Schedule IR's queue: named streams by priority, jobs by order of submission, and between two
units the foreground.
"""

from __future__ import annotations

import atexit
import bisect
import contextlib
import math
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

from tessera.errors import InputError
from tessera.graph.jobs import (
    Job,
    Stream,
    Work,
    current_stream,
    entered,
    print_schedule,
)
from tessera.profiler.pace import is_positive

__all__ = ["Job", "OnlineSchedule", "Stream", "current_stream"]

_PAUSE = 100  # times an over-long unit
_KEPT = 100  # finished jobs that `report` still lists
_ALL: weakref.WeakSet[OnlineSchedule] = weakref.WeakSet()


@final
class OnlineSchedule:
    """Runs background jobs unit by unit, between the sections that must not be late.

    What is promised: while ``with sched.foreground():`` is open, no unit starts. Entering it waits
    for the one unit in progress at most, and only units that are predicted to take at most
    `max_latency_ms` are started (`Pace` over the job's own units). So a section is delayed by no
    more than the cap, but for these, which Python cannot prevent as it cannot interrupt a unit:

    * a unit longer than its job's earlier ones. The job then pauses a hundred times as long, so
      that such units take 1 % of the time at most; once they are typical (half of its last 8) it
      is held back, with a warning, until someone waits for it (`wait`, `job.result`);
    * the first unit of a job, of which nothing is known. It starts only after no section was
      open for `max_latency_ms`, unless the job said `expected_ms`;
    * the time the operating system takes to wake the waiting thread.

    Jobs that may start do so by priority, highest first, then by number of submission. The
    worker is a daemon thread that ends when the queue is empty, and is joined by `close` and at
    the exit of the interpreter.

    Args:
        allow_hot_swap: Whether jobs may `swap` results in.
        max_latency_ms: The cap, > 0.
        thread: False for no thread at all: the caller runs one unit at a time by `tick`.
        clock: Seconds.

    Raises:
        InputError: `max_latency_ms` is not positive and finite.

    Example:
        >>> sched = OnlineSchedule(allow_hot_swap=True, max_latency_ms=10)
        >>> with sched.stream("updates") as updates:
        ...     job = updates.submit(iter(range(3)), name="three")
        >>> with sched.foreground():
        ...     served = "no unit starts in here"
        >>> sched.wait(), job.state
        (True, 'done')
        >>> sched.close()
    """

    def __init__(
        self,
        allow_hot_swap: bool = True,
        max_latency_ms: float = 10.0,
        *,
        thread: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not is_positive(max_latency_ms):
            raise InputError(
                f"OnlineSchedule needs max_latency_ms > 0 and finite, got {max_latency_ms!r}"
            )
        self.allow_hot_swap = allow_hot_swap
        self.max_latency_ms = max_latency_ms
        self._threaded = thread
        self._clock = clock
        self._changed = threading.Condition()  # guards everything below
        self._streams: dict[str, Stream] = {}
        self._queue: list[Job] = []
        self._ended: deque[Job] = deque(maxlen=_KEPT)
        self._swaps: deque[tuple[Job, object, str, object]] = deque()
        self._submitted = self._swapped = self._sections = self._waiting = 0
        self._open: list[int] = []  # the thread of every open section
        self._running: Job | None = None
        self._runner = 0  # the thread that runs it
        self._last_section = -math.inf
        self._worst_wait_ms = 0.0
        self._worker: threading.Thread | None = None
        self._closed = False
        _ALL.add(self)

    # --- the foreground ------------------------------------------------------------------------

    @contextmanager
    def foreground(self) -> Iterator[None]:
        """A section that must not be late: a request, the caller's own training step.

        May be nested, and open in several threads.
        """
        me = threading.get_ident()
        with self._changed:
            self._open.append(me)  # from here on no unit starts
            self._sections += 1
        try:
            self._await_unit(me)
            yield
        finally:
            with self._changed:
                self._open.remove(me)
                if not self._open:
                    self._last_section = self._clock()
                    self._apply_swaps()
                    self._changed.notify_all()

    def _await_unit(self, me: int) -> None:
        """Wait for the unit in progress, unless it is the caller's own."""
        with self._changed:
            if self._running and self._runner != me:
                begun = self._clock()
                while self._running and self._runner != me:
                    self._changed.wait()
                waited_ms = 1e3 * (self._clock() - begun)
                self._worst_wait_ms = max(self._worst_wait_ms, waited_ms)

    def _swap(self, job: Job, holder: object, attribute: str, value: object) -> None:
        if not self.allow_hot_swap:
            raise InputError(
                f"job {job.name!r} swaps {attribute!r}, which this schedule does not allow; "
                "make it with OnlineSchedule(allow_hot_swap=True)"
            )
        with self._changed:
            self._swaps.append((job, holder, attribute, value))
            if not self._open:
                self._apply_swaps()

    def _apply_swaps(self) -> None:
        while self._swaps:
            job, holder, attribute, value = self._swaps.popleft()
            try:
                setattr(holder, attribute, value)
                self._swapped += 1
            except Exception as error:  # the job's fault, not that of the section that just ended
                job._error = job._error or error
                job.state = "failed" if job.state == "done" else job.state

    # --- the background ------------------------------------------------------------------------

    @contextmanager
    def stream(self, name: str, *, priority: int | None = None) -> Iterator[Stream]:
        """A scope whose `current_stream` is the stream of this name; made when first named.

        Args:
            name: What to call it.
            priority: Jobs of a higher one run first; 0 for a new stream.

        Returns:
            The `Stream`.

        Raises:
            InputError: The stream is there already, with another priority.
        """
        with self._changed:
            found = self._streams.get(name)
            if found is None:
                found = self._streams[name] = Stream(name, priority or 0, self._submit)
        if priority is not None and priority != found.priority:
            raise InputError(
                f"stream {name!r} has priority {found.priority}, got {priority}; "
                "leave it out, or give the stream another name"
            )
        with entered(found):
            yield found

    def _submit(self, stream: Stream, name: str, work: Work, expected_ms: float | None) -> Job:
        with self._changed:
            if self._closed:
                raise InputError(f"job {name!r} was submitted to a schedule that is closed")
            job = Job(name, self._submitted, stream, work, drain=self._drain, swap=self._swap)
            if expected_ms is not None:
                job._pace.add(expected_ms)
            self._submitted += 1
            bisect.insort(self._queue, job, key=_order)
            if self._threaded and self._worker is None:
                self._worker = threading.Thread(
                    target=self._work, name="tessera-schedule", daemon=True
                )
                self._worker.start()
            self._changed.notify_all()
        return job

    def tick(self) -> bool:
        """Run the next unit in the calling thread; False if none may run now.

        Raises:
            InputError: The schedule has a thread that does this.
        """
        if self._threaded:
            raise InputError("tick() needs a schedule without thread: OnlineSchedule(thread=False)")
        with self._changed:
            job, _ = self._next()
            if job is None:
                return False
            self._begin(job)
        self._run(job)
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                job, delay_s = None, None
                while self._queue and not self._closed and job is None:
                    job, delay_s = self._next()
                    if job is None:
                        self._changed.wait(delay_s)
                if job is None:
                    self._worker = None
                    return
                self._begin(job)
            with contextlib.suppress(Warning):  # where warnings are errors, the worker lives on
                self._run(job)

    def _next(self) -> tuple[Job | None, float | None]:
        """The job whose unit may start now, or seconds until that may change by itself."""
        if self._open or self._running or self._closed:
            return None, None
        now, cap_s = self._clock(), self.max_latency_ms / 1e3
        soonest = math.inf
        for job in self._queue:
            if self._waiting or job._waiting:
                due = now
            elif job._pace.high is None:
                due = self._last_section + cap_s
            elif job._pace.high <= self.max_latency_ms:
                due = now
            elif not self._is_held(job):
                due = job._paused_until
            else:
                continue
            if due <= now:
                return job, None
            soonest = min(soonest, due)
        return None, None if math.isinf(soonest) else soonest - now

    def _is_held(self, job: Job) -> bool:
        """Whether the job's typical unit is over the cap."""
        return (job._pace.typical or 0.0) > self.max_latency_ms

    def _begin(self, job: Job) -> None:
        self._running, self._runner = job, threading.get_ident()

    def _run(self, job: Job) -> None:
        begun = self._clock()
        try:
            job._advance()
        finally:  # Ctrl-C in the caller's tick() goes on to the caller
            ended = self._clock()
            ms = max(1e3 * (ended - begun), 0.0)
            with self._changed:
                self._running = None
                job._note(ms)
                if ms > self.max_latency_ms:
                    job._paused_until = ended + _PAUSE * ms / 1e3
                if self._closed and job.state == "queued":
                    job.state = "cancelled"
                if job.state != "queued":
                    self._queue.remove(job)
                    self._ended.append(job)
                self._changed.notify_all()
        if job.state == "cancelled":
            job._clean_up()
        if job.state == "queued" and self._is_held(job) and not job._warned:
            job._warned = True
            warnings.warn(
                f"job {job.name!r} is held back until sched.wait() or job.result(): its units take "
                f"{job._pace.typical:.3g} ms, the cap is {self.max_latency_ms:g} ms; yield more "
                "often, or raise max_latency_ms",
                RuntimeWarning,
                stacklevel=3,
            )

    # --- the end -------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the queue is empty, held-back jobs included; whether it is.

        Raises:
            InputError: The caller is itself in a foreground section or a unit.
        """
        return self._drain(None, timeout_s)

    def _drain(self, job: Job | None, timeout_s: float | None) -> bool:
        """Wait for one job or for all, while the cap does not hold them back."""
        waiter = self if job is None else job
        me = threading.get_ident()

        def over() -> bool:
            return not self._queue if job is None else job not in self._queue

        with self._changed:
            if me in self._open or (self._running and self._runner == me):
                raise InputError(
                    "a foreground section or a unit cannot wait for background work; "
                    "wait outside of it"
                )
            waiter._waiting += 1
            self._changed.notify_all()
        try:
            if self._threaded:
                with self._changed:
                    return self._changed.wait_for(over, timeout_s)
            deadline = math.inf if timeout_s is None else self._clock() + timeout_s
            while not over() and self._clock() < deadline:
                if not self.tick():  # another thread is in a section
                    with self._changed:
                        left = deadline - self._clock()
                        self._changed.wait(None if math.isinf(left) else left)
            return over()
        finally:
            with self._changed:
                waiter._waiting -= 1

    def close(self, timeout_s: float | None = None) -> None:
        """End the unit in progress, cancel the jobs that are queued, join the worker.

        May be called twice. Sections stay possible; swaps already asked for take effect.
        """
        with self._changed:
            self._closed = True
            worker = self._worker
            dropped = [job for job in self._queue if job is not self._running]
            self._queue = [job for job in self._queue if job is self._running]
            self._ended.extend(dropped)
            for job in dropped:
                job.state = "cancelled"
            self._changed.notify_all()
        for job in dropped:
            job._clean_up()
        if worker is not None and worker is not threading.current_thread():
            worker.join(timeout_s)

    def __enter__(self) -> OnlineSchedule:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def report(self) -> dict[str, Any]:
        """Streams, the queued jobs, the last 100 that ended, and the figures, as plain values.

        Durations are in milliseconds; `error` is None or the exception of a job as text.
        """
        with self._changed:
            streams = sorted(self._streams.values(), key=lambda s: -s.priority)
            jobs = sorted([*self._queue, *self._ended], key=_order)
            return {
                "allow_hot_swap": self.allow_hot_swap,
                "max_latency_ms": self.max_latency_ms,
                "sections": self._sections,
                "worst_wait_ms": self._worst_wait_ms,
                "swaps": self._swapped,
                "streams": [s._report() for s in streams],
                "jobs": [j._report() for j in jobs],
            }

    def text(self) -> str:
        """The schedule in print: streams by priority, their jobs in order, the foreground."""
        return print_schedule(self.report())


def _order(job: Job) -> tuple[int, int]:
    return -job.priority, job.number


def _close_all() -> None:
    for schedule in list(_ALL):
        schedule.close(timeout_s=5.0)  # a unit that never ends must not keep the process


atexit.register(_close_all)
