"""`OnlineSchedule` by injected clocks and events: what starts, what waits, what is swapped when."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tessera.errors import InputError
from tessera.graph.schedule import Job, OnlineSchedule, current_stream

PATIENCE_S = 30.0  # only a test that fails waits so long


class Bench:
    """A schedule without thread on a clock that only the test moves, with a log."""

    def __init__(self, cap_ms: float = 10.0, *, allow_hot_swap: bool = True) -> None:
        self.ms = 0
        self.log: list[str] = []
        self.sched = OnlineSchedule(
            allow_hot_swap, cap_ms, thread=False, clock=lambda: self.ms / 1e3
        )

    def units(self, name: str, durations: list[int], value: Any = None) -> Iterator[None]:
        """A job whose units take so long; its end takes no time."""
        for i, duration in enumerate(durations):
            self.log.append(f"{name}{i}")
            self.ms += duration
            yield
        return value

    def submit(self, name: str, durations: list[int], *, priority: int = 0, **how: Any) -> Job:
        with self.sched.stream(f"{name}-{priority}", priority=priority) as stream:
            return stream.submit(self.units(name, durations), name=name, **how)

    def serve(self, ms: int = 0) -> None:
        with self.sched.foreground():
            assert not self.sched.tick()
            self.ms += ms


# --- order ---------------------------------------------------------------------------------------


def test_units_run_by_priority_then_submission_and_change_over_between_units() -> None:
    b = Bench()
    b.submit("a", [1, 1])
    b.submit("low", [1], priority=-1)
    b.submit("b", [1])
    assert b.sched.tick()
    b.submit("high", [1], priority=5)
    while b.sched.tick():
        pass
    assert b.log == ["a0", "high0", "a1", "b0", "low0"]


def test_the_current_stream_is_that_of_the_scope_and_of_the_unit() -> None:
    sched = OnlineSchedule(thread=False)
    seen = []

    def work(job: Job) -> Iterator[None]:
        seen.append(current_stream())
        yield
        seen.append(current_stream())

    assert current_stream() is None
    with sched.stream("updates") as updates:
        assert current_stream() is updates
        with sched.stream("checks") as checks:
            assert current_stream() is checks
        assert current_stream() is updates
        updates.submit(work)
    assert current_stream() is None
    assert sched.wait()
    assert seen == [updates, updates]
    with sched.stream("updates") as again:
        assert again is updates


# --- the cap -------------------------------------------------------------------------------------


def test_the_first_unit_of_unknown_length_waits_until_the_foreground_is_idle() -> None:
    b = Bench(cap_ms=10)
    b.serve()
    b.submit("a", [3, 3])
    b.ms += 9
    assert not b.sched.tick()
    b.serve()
    b.ms += 9
    assert not b.sched.tick()  # the section in between began the wait anew
    b.ms += 1
    assert b.sched.tick()
    b.serve()
    assert b.sched.tick()  # known by now: no need to be idle
    assert b.log == ["a0", "a1"]


def test_a_job_that_says_how_long_its_units_are_need_not_wait() -> None:
    b = Bench(cap_ms=10)
    b.serve()
    b.submit("a", [3], expected_ms=4)
    b.submit("long", [30], expected_ms=30)
    assert b.sched.tick()
    assert b.sched.tick()  # the end of a
    assert not b.sched.tick()
    b.ms += 10_000
    assert not b.sched.tick()  # a gap is no licence for what is known to be too long
    assert b.log == ["a0"]


def test_a_job_of_long_units_delays_the_foreground_once_and_is_held_with_one_warning() -> None:
    b = Bench(cap_ms=10)
    job = b.submit("a", [25, 25, 25])
    expected = r"'a' is held back until sched.wait\(\) .* take 25 ms, the cap is 10 ms; yield more"
    with pytest.warns(RuntimeWarning, match=expected):
        assert b.sched.tick()
    for _ in range(50):
        b.ms += 1000
        b.serve()
        assert not b.sched.tick()
    assert (job.state, job.units, job.longest_ms) == ("queued", 1, pytest.approx(25))
    assert b.sched.wait()  # warns no second time, or this would be an error
    assert (job.state, job.units) == ("done", 4)


def test_one_long_unit_among_short_ones_pauses_its_job_a_hundred_times_as_long() -> None:
    b = Bench(cap_ms=10)
    b.submit("a", [1, 1, 20, 1, 1])
    b.submit("b", [1], priority=-1)
    for _ in range(3):
        assert b.sched.tick()
    assert b.log == ["a0", "a1", "a2"]
    assert b.sched.tick()  # b: its stream is not paused
    b.ms += 1998
    assert b.sched.tick()  # the end of b
    assert not b.sched.tick()
    b.ms += 1
    assert b.sched.tick()
    assert b.sched.tick()
    assert b.log == ["a0", "a1", "a2", "b0", "a3", "a4"]


def test_whoever_waits_for_a_job_lifts_the_cap_for_it_alone() -> None:
    b = Bench(cap_ms=10)
    job = b.submit("a", [30, 30], expected_ms=30)
    other = b.submit("b", [30], expected_ms=30)
    with pytest.warns(RuntimeWarning, match="held back"):
        assert job.result() is None
    assert (job.state, other.state) == ("done", "queued")
    assert b.log == ["a0", "a1"]


# --- with the thread -----------------------------------------------------------------------------


def test_a_section_waits_for_the_unit_in_progress_and_nothing_starts_while_it_is_open() -> None:
    sched = OnlineSchedule(max_latency_ms=1e9)
    started, finish = threading.Event(), threading.Event()
    asked, inside, leave = threading.Event(), threading.Event(), threading.Event()
    log = []

    def work() -> Iterator[None]:
        log.append("first")
        started.set()
        assert finish.wait(PATIENCE_S)
        log.append("first ends")
        yield
        log.append("second")

    def serve() -> None:
        asked.set()
        with sched.foreground():
            log.append("served")
            inside.set()
            assert leave.wait(PATIENCE_S)
            log.append("section ends")

    with sched.stream("updates") as updates:
        job = updates.submit(work())
    assert started.wait(PATIENCE_S)
    server = threading.Thread(target=serve)
    server.start()
    assert asked.wait(PATIENCE_S)
    assert not inside.wait(0.02)  # it cannot be: the unit is in progress
    finish.set()
    assert inside.wait(PATIENCE_S)
    with pytest.raises(TimeoutError, match=r"'work' is not done after 0\.02 s"):
        job.result(timeout_s=0.02)  # it cannot be: the section is open
    leave.set()
    server.join(PATIENCE_S)
    assert sched.wait(PATIENCE_S)
    assert log == ["first", "first ends", "served", "section ends", "second"]
    assert sched.report()["worst_wait_ms"] > 0
    sched.close()


def test_sections_nest_and_overlap() -> None:
    b = Bench()
    b.submit("a", [1])
    opened, leave = threading.Event(), threading.Event()

    def serve() -> None:
        with b.sched.foreground():
            opened.set()
            assert leave.wait(PATIENCE_S)

    other = threading.Thread(target=serve)
    with b.sched.foreground():
        with b.sched.foreground():
            pass
        assert not b.sched.tick()
        other.start()
        assert opened.wait(PATIENCE_S)
    assert not b.sched.tick()  # the other thread is still in its own
    leave.set()
    other.join(PATIENCE_S)
    b.ms += 10
    assert b.sched.tick()


def test_a_unit_may_open_a_section_and_neither_may_wait_for_the_background() -> None:
    refusal = "a foreground section or a unit cannot wait for background work"
    with OnlineSchedule() as sched, sched.stream("updates") as updates:

        def work(job: Job) -> Iterator[None]:
            with sched.foreground():
                pass
            yield
            job.result()

        job = updates.submit(work)
        with pytest.raises(InputError, match=refusal):
            job.result(PATIENCE_S)
        assert job.units == 2
        with sched.foreground(), pytest.raises(InputError, match=refusal):
            sched.wait()


def test_an_exception_is_kept_and_the_worker_lives_on() -> None:
    with OnlineSchedule() as sched, sched.stream("updates") as updates:
        failing = updates.submit(lambda job: [1][2], name="failing")
        exiting = updates.submit(lambda job: sys.exit("out"), name="exiting")
        fine = updates.submit(range(2), name="fine")
        assert fine.result(PATIENCE_S) is None
        with pytest.raises(IndexError):
            failing.result(PATIENCE_S)
        with pytest.raises(SystemExit):
            exiting.result(PATIENCE_S)
        jobs = {j["name"]: j for j in sched.report()["jobs"]}
    assert jobs["failing"]["state"] == "failed"
    assert jobs["failing"]["error"] == "IndexError('list index out of range')"
    assert jobs["fine"] == {
        "number": 2,
        "name": "fine",
        "stream": "updates",
        "state": "done",
        "units": 3,
        "longest_ms": fine.longest_ms,
        "error": None,
    }


def test_a_generators_return_is_the_result() -> None:
    with OnlineSchedule() as sched, sched.stream("updates") as updates:
        assert updates.submit(Bench().units("a", [1], value=7)).result(PATIENCE_S) == 7


def test_a_worker_under_warnings_as_errors_lives_on() -> None:
    """This suite makes warnings errors; the clock jumps, so that the first unit is long."""
    ms = iter(range(0, 10_000_000, 1000))
    sched = OnlineSchedule(max_latency_ms=10, clock=lambda: next(ms) / 1e3)
    with sched.stream("updates") as updates:
        assert updates.submit(range(3)).result(PATIENCE_S) is None
        assert updates.submit(range(3)).result(PATIENCE_S) is None
    sched.close()


# --- hot swap ------------------------------------------------------------------------------------


def test_a_swap_takes_effect_between_sections_in_order() -> None:
    b = Bench()
    cell = SimpleNamespace(fn="old")
    job = b.submit("a", [1])
    with b.sched.foreground():
        job.swap(cell, "fn", "new")
        with b.sched.foreground():
            pass
        assert cell.fn == "old"
        job.swap(cell, "fn", "newer")
        assert cell.fn == "old"
    assert cell.fn == "newer"
    job.swap(cell, "fn", "newest")  # no section is open
    assert cell.fn == "newest"
    assert b.sched.report()["swaps"] == 3


def test_a_unit_swaps_while_a_section_waits_to_begin_only_after_that_section() -> None:
    sched = OnlineSchedule(max_latency_ms=1e9)
    cell = SimpleNamespace(fn="old")
    started, waiting = threading.Event(), threading.Event()
    seen = []

    def work(job: Job) -> Iterator[None]:
        started.set()
        assert waiting.wait(PATIENCE_S)
        while not sched._open:  # the section has asked to begin
            pass
        job.swap(cell, "fn", "new")
        yield

    with sched.stream("updates") as updates:
        job = updates.submit(work)
    assert started.wait(PATIENCE_S)
    waiting.set()
    with sched.foreground():
        seen.append(cell.fn)
    assert job.result(PATIENCE_S) is None
    assert (seen, cell.fn) == (["old"], "new")
    sched.close()


def test_a_swap_that_is_not_allowed_or_fails_is_the_jobs_error() -> None:
    b = Bench(allow_hot_swap=False)
    job = b.submit("a", [1])
    with pytest.raises(InputError, match=r"swaps 'fn', which .* OnlineSchedule\(allow_hot_swap"):
        job.swap(SimpleNamespace(), "fn", 1)
    b = Bench()
    job = b.submit("a", [1])
    with b.sched.foreground():
        job.swap((), "fn", 1)  # a tuple has no such attribute
    with pytest.raises(AttributeError):
        job.result()
    assert job.state == "failed"


# --- the end -------------------------------------------------------------------------------------


def test_close_joins_the_worker_and_cancels_what_is_queued() -> None:
    cleaned = []
    started, finish = threading.Event(), threading.Event()

    def work() -> Iterator[None]:
        try:
            started.set()
            assert finish.wait(PATIENCE_S)
            yield
        finally:
            cleaned.append("first")

    sched = OnlineSchedule(max_latency_ms=1e9)
    with sched.stream("updates") as updates:
        first = updates.submit(work())
        second = updates.submit(range(3))
    assert started.wait(PATIENCE_S)
    worker = sched._worker
    assert worker is not None
    assert worker.daemon
    threading.Timer(0.01, finish.set).start()
    sched.close()
    sched.close()
    assert not worker.is_alive()
    assert (first.state, second.state) == ("cancelled", "cancelled")
    assert cleaned == ["first"]
    with pytest.raises(InputError, match="'range' has no result: the schedule was closed"):
        second.result()
    with pytest.raises(InputError, match="'range' was submitted to a schedule that is closed"):
        updates.submit(range(3))
    with sched.foreground():
        pass


def test_close_cleans_up_a_job_between_its_units() -> None:
    cleaned = []

    def work() -> Iterator[None]:
        try:
            yield
        finally:
            cleaned.append(True)

    sched = OnlineSchedule(thread=False)
    with sched.stream("updates") as updates:
        job = updates.submit(work())
    assert sched.tick()
    assert not cleaned
    sched.close()
    assert (cleaned, job.state) == ([True], "cancelled")
    assert not sched.tick()


def test_the_worker_ends_with_the_queue_and_a_dropped_schedule_is_gone() -> None:
    sched = OnlineSchedule()
    with sched.stream("updates") as updates:
        updates.submit(range(3)).result(PATIENCE_S)
    worker = sched._worker
    if worker is not None:
        worker.join(PATIENCE_S)
    assert sched._worker is None
    gone = weakref.ref(sched)
    del sched, updates
    gc.collect()
    assert gone() is None


def test_the_interpreter_exits_cleanly_with_work_in_progress() -> None:
    code = """
from tessera.graph.schedule import OnlineSchedule

def work():
    try:
        while True:
            yield
    finally:
        print("cleaned up")

sched = OnlineSchedule()
with sched.stream("updates") as updates:
    job = updates.submit(work())
while job.units < 3:
    pass
print("leaving")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == ["leaving", "cleaned up", ""]


# --- in print, and refused -----------------------------------------------------------------------


def test_the_schedule_in_print() -> None:
    b = Bench()
    b.submit("a", [2, 3], expected_ms=3)
    b.submit("b", [1], priority=7)
    b.submit("late", [99], priority=-1, expected_ms=99)
    while b.sched.tick():
        pass
    b.serve()
    assert b.sched.text() == (
        "schedule {allow_hot_swap = true, max_latency_ms = 10} {\n"
        "  stream @b-7 {priority = 7, units = 2, longest_ms = 1.000} {\n"
        "    done @b#1 {units = 2, longest_ms = 1.000}\n"
        "  }\n"
        "  stream @a-0 {priority = 0, units = 3, longest_ms = 3.000} {\n"
        "    done @a#0 {units = 3, longest_ms = 3.000}\n"
        "  }\n"
        "  stream @late--1 {priority = -1, units = 0, longest_ms = 0.000} {\n"
        "    queued @late#2 {units = 0, longest_ms = 0.000}\n"
        "  }\n"
        "  foreground {sections = 1, swaps = 0, worst_wait_ms = 0.000}\n"
        "}\n"
    )


@pytest.mark.parametrize("cap", [0, -1, float("nan"), float("inf"), True, "5"])
def test_the_cap_is_positive_and_finite(cap: float) -> None:
    with pytest.raises(InputError, match=f"max_latency_ms > 0 and finite, got {cap!r}"):
        OnlineSchedule(max_latency_ms=cap)


def test_what_is_no_work_is_refused_and_nothing_is_queued() -> None:
    sched = OnlineSchedule(thread=False)
    with sched.stream("updates") as updates:
        with pytest.raises(InputError, match=r"an iterable of units, or a function .* got int"):
            updates.submit(3)
        with pytest.raises(InputError, match="expected_ms > 0 and finite, got 0"):
            updates.submit(range(3), expected_ms=0)
        with (
            pytest.raises(InputError, match="'updates' has priority 0, got 3; leave it out"),
            sched.stream("updates", priority=3),
        ):
            pass
    assert sched.report()["jobs"] == []
    with pytest.raises(InputError, match=r"tick\(\) needs .* OnlineSchedule\(thread=False\)"):
        OnlineSchedule().tick()
