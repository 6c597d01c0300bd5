"""What an `OnlineSchedule` runs: streams of jobs, and how they are printed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias, final

from tessera.errors import InputError
from tessera.profiler.pace import Pace, is_positive

__all__ = ["Job", "Stream", "Work", "current_stream", "entered", "print_schedule"]

_STREAM: ContextVar[Stream | None] = ContextVar("tessera_stream", default=None)

Work: TypeAlias = "Iterable[Any] | Callable[[Job], Iterable[Any]]"


def current_stream() -> Stream | None:
    """The stream whose ``with sched.stream(...)`` this code runs in; None outside of any.

    In a unit of a job it is the job's own stream.

    Example:
        >>> from tessera.graph.schedule import OnlineSchedule
        >>> with OnlineSchedule() as sched, sched.stream("updates"):
        ...     current_stream().name
        'updates'
        >>> current_stream() is None
        True
    """
    return _STREAM.get()


@contextmanager
def entered(stream: Stream) -> Iterator[None]:
    """A block in which `current_stream` is this one."""
    token = _STREAM.set(stream)
    try:
        yield
    finally:
        _STREAM.reset(token)


class _Submit(Protocol):
    def __call__(
        self, stream: Stream, name: str, work: Work, expected_ms: float | None, /
    ) -> Job: ...


@final
class Stream:
    """A named queue of a schedule; ``with sched.stream("updates") as updates:`` makes it.

    Attributes:
        name: Its name.
        priority: Jobs of a higher one run first.
        units: How many units of its jobs have run.
        longest_ms: The longest of them.

    Example:
        >>> from tessera.graph.schedule import OnlineSchedule
        >>> with OnlineSchedule() as sched, sched.stream("updates", priority=-1) as updates:
        ...     updates.submit(range(3)).result(), updates.priority
        (None, -1)
    """

    def __init__(self, name: str, priority: int, submit: _Submit) -> None:
        self.name = name
        self.priority = priority
        self.units = 0
        self.longest_ms = 0.0
        self._submit = submit

    def submit(
        self, work: Work, *, name: str | None = None, expected_ms: float | None = None
    ) -> Job:
        """Queue a job.

        Args:
            work: An iterable, each step of which is one unit (a generator that yields between
                its units; what it returns is the job's result), or a function that makes one of
                the `Job`, so that its units can call `job.swap`.
            name: For the printed schedule; by default the work's own.
            expected_ms: The longest unit, if known beforehand, > 0. Then the first one need not
                wait until the foreground is idle.

        Raises:
            InputError: `work` is neither, `expected_ms` is not positive and finite, or the
                schedule is closed. Nothing was queued.
        """
        if not (callable(work) or isinstance(work, Iterable)):
            raise InputError(
                "Stream.submit needs an iterable of units, or a function of the job that returns "
                f"one, got {type(work).__name__}"
            )
        if expected_ms is not None and not is_positive(expected_ms):
            raise InputError(f"Stream.submit needs expected_ms > 0 and finite, got {expected_ms!r}")
        name = name or str(getattr(work, "__name__", type(work).__name__))
        return self._submit(self, name, work, expected_ms)

    def _report(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("name", "priority", "units", "longest_ms")}


@final
class Job:
    """One piece of background work, made by `Stream.submit`: each step of an iterable is a unit.

    The stretch after the last item, up to the return, is a unit too.

    Attributes:
        name: For the printed schedule.
        number: Jobs are numbered by submission, from 0.
        stream: The name of its stream.
        priority: That of its stream.
        state: "queued", "done", "failed" or "cancelled".
        units: How many units have run.
        longest_ms: The longest of them.

    Example:
        >>> from tessera.graph.schedule import OnlineSchedule
        >>> sched = OnlineSchedule(thread=False)
        >>> with sched.stream("updates") as updates:
        ...     job = updates.submit(range(3), name="three")
        >>> while sched.tick():
        ...     pass
        >>> job.state, job.units
        ('done', 4)
    """

    def __init__(
        self,
        name: str,
        number: int,
        stream: Stream,
        work: Work,
        *,
        drain: Callable[[Job, float | None], bool],
        swap: Callable[[Job, object, str, object], None],
    ) -> None:
        self.name = name
        self.number = number
        self.stream = stream.name
        self.priority = stream.priority
        self.state = "queued"
        self.units = 0
        self.longest_ms = 0.0
        self._of = stream
        self._work = work
        self._iterator: Iterator[Any] | None = None
        self._drain = drain
        self._swap = swap
        self._pace = Pace()
        self._waiting = 0  # callers that do nothing but wait for it
        self._paused_until = -math.inf
        self._warned = False
        self._value: Any = None
        self._error: BaseException | None = None

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the end of the job; what its generator returned.

        Who waits here is not served late by a long unit, so the job is not held back meanwhile.

        Raises:
            Exception: What the job itself raised.
            TimeoutError: It is not done in time.
            InputError: The schedule was closed before the job ended, or the caller is itself in
                a foreground section or in a unit.
        """
        if not self._drain(self, timeout_s):
            raise TimeoutError(f"job {self.name!r} is not done after {timeout_s} s")
        if self._error is not None:
            raise self._error
        if self.state == "cancelled":
            raise InputError(
                f"job {self.name!r} has no result: the schedule was closed before it ended"
            )
        return self._value

    def swap(self, holder: object, attribute: str, value: object) -> None:
        """Let ``holder.attribute = value`` take effect between two foreground sections.

        At once if no section is open, else when the last open one ends; in the order of the
        calls. A section that begins sees the old values or the new ones throughout.

        Raises:
            InputError: The schedule was made with ``allow_hot_swap=False``.
        """
        self._swap(self, holder, attribute, value)

    def _advance(self) -> None:
        """Run one unit; what the job raises is kept, what ends the process goes on too."""
        try:
            with entered(self._of):
                if self._iterator is None:
                    work = self._work
                    self._iterator = iter(work if isinstance(work, Iterable) else work(self))
                next(self._iterator)
        except StopIteration as end:
            self._value = end.value
            self.state = "failed" if self._error else "done"  # a swap may have failed before
        except BaseException as error:
            self._error = self._error or error
            self.state = "failed"
            if isinstance(error, KeyboardInterrupt):
                raise

    def _note(self, ms: float) -> None:
        self._pace.add(ms)
        for counted in (self, self._of):
            counted.units += 1
            counted.longest_ms = max(counted.longest_ms, ms)

    def _clean_up(self) -> None:
        close = getattr(self._iterator or self._work, "close", None)
        if close is not None:
            with contextlib.suppress(Exception):  # its clean-up is its own affair
                close()

    def _report(self) -> dict[str, Any]:
        names = ("number", "name", "stream", "state", "units", "longest_ms")
        error = None if self._error is None else repr(self._error)
        return {k: getattr(self, k) for k in names} | {"error": error}


def print_schedule(report: dict[str, Any]) -> str:
    """The text of `OnlineSchedule.report`: the printed Schedule IR."""
    swap, cap = str(report["allow_hot_swap"]).lower(), report["max_latency_ms"]
    lines = [f"schedule {{allow_hot_swap = {swap}, max_latency_ms = {cap:g}}} {{"]
    for s in report["streams"]:
        lines.append(f"  stream @{s['name']} {{priority = {s['priority']}, {_figures(s)}}} {{")
        for j in report["jobs"]:
            if j["stream"] == s["name"]:
                error = f", error = {j['error']}" if j["error"] else ""
                lines.append(
                    f"    {j['state']} @{j['name']}#{j['number']} {{{_figures(j)}{error}}}"
                )
        lines.append("  }")
    lines.append(
        f"  foreground {{sections = {report['sections']}, swaps = {report['swaps']}, "
        f"worst_wait_ms = {report['worst_wait_ms']:.3f}}}"
    )
    return "\n".join([*lines, "}", ""])


def _figures(values: dict[str, Any]) -> str:
    return f"units = {values['units']}, longest_ms = {values['longest_ms']:.3f}"
