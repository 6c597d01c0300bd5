"""`measure`: what a block of code took, in milliseconds and in joules.

Joules come from the best source there is, and say which:

* ``nvml``: the energy counter of the current CUDA device, once this process uses CUDA and if
  `pynvml` is installed. The device only, whoever uses it.
* ``rapl``: the energy counters of the processor packages and their memory, where the kernel lets
  this user read them. All of the machine, whoever uses it; renewed about once a millisecond.
* ``estimate``: CPU seconds of this process times watts a core. No measurement: right in
  proportion, and only as good as the watts given. It sees no GPU.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, final

import torch

from tessera.errors import InputError

__all__ = ["Measurement", "Meter", "Reading", "Source", "measure"]

Source: TypeAlias = Literal["nvml", "rapl", "estimate"]


@final
class Measurement:
    """Milliseconds and joules of a block; NaN until the block has ended.

    Attributes:
        ms: Wall-clock time.
        joules: Energy, >= 0.
        joules_source: "nvml", "rapl" or "estimate"; see `tessera.profiler.measure`.

    Example:
        >>> Measurement(ms=1.5, joules=0.25, joules_source="estimate")
        Measurement(1.5 ms, 0.25 J (estimate))
    """

    __slots__ = ("joules", "joules_source", "ms")

    def __init__(
        self,
        *,
        ms: float = math.nan,
        joules: float = math.nan,
        joules_source: Source = "estimate",
    ) -> None:
        self.ms = ms
        self.joules = joules
        self.joules_source: Source = joules_source

    def __repr__(self) -> str:
        return f"Measurement({self.ms:.6g} ms, {self.joules:.6g} J ({self.joules_source}))"


class _Counter(NamedTuple):
    """Energy counters: their values, the joules of one count, and where each wraps around."""

    source: Source
    read: Callable[[], tuple[int, ...]]
    joules: float
    ranges: tuple[int, ...]

    def between(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        counts = zip(before, after, self.ranges, strict=True)
        return self.joules * sum(b - a if b >= a else b - a + r for a, b, r in counts)


class Reading(NamedTuple):
    """Where clocks and counters stood, for `Meter.since`."""

    clock: float
    cpu: float
    counter: _Counter | None
    counts: tuple[int, ...]


@final
class Meter:
    """Where time and energy are read; the default one suits all but tests and known hardware.

    Args:
        watts_per_core: For the estimate, > 0. The default is a round figure, not a measurement;
            a processor's rated power divided by its cores is a better one.
        powercap: The kernel's folder of energy counters.
        clock: Seconds of wall-clock time.
        cpu_clock: CPU seconds of this process, all threads.

    Raises:
        InputError: `watts_per_core` is not positive and finite.

    Example:
        >>> with measure(meter=Meter(watts_per_core=7.5)) as m:
        ...     total = sum(range(1000))
        >>> m.ms > 0
        True
    """

    def __init__(
        self,
        *,
        watts_per_core: float = 5.0,
        powercap: str | PathLike[str] = "/sys/class/powercap",
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        if not (math.isfinite(watts_per_core) and watts_per_core > 0):
            raise InputError(f"Meter needs watts_per_core > 0 and finite, got {watts_per_core!r}")
        self.watts_per_core = watts_per_core
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._powercap = Path(powercap)
        self._known: dict[str, _Counter | None] = {}  # a rung is looked for once

    def ms_since(self, begun: Reading) -> float:
        """Milliseconds only, once the current CUDA device is done, if CUDA is in use."""
        if _cuda_in_use():
            torch.cuda.synchronize()
        return 1e3 * (self._clock() - begun.clock)

    def read(self) -> Reading:
        """Clocks and counters as they stand, for `since`."""
        on_gpu = _cuda_in_use()
        if on_gpu:
            torch.cuda.synchronize()
        for counter in (
            self._find("nvml", _nvml) if on_gpu else None,
            self._find("rapl", self._rapl),
        ):
            counts = _counts(counter)
            if counts is not None:
                return Reading(self._clock(), self._cpu_clock(), counter, counts)
        return Reading(self._clock(), self._cpu_clock(), None, ())

    def since(self, begun: Reading) -> Measurement:
        """What passed since a reading; the estimate if its counter can no longer be read."""
        ms = self.ms_since(begun)
        counts = _counts(begun.counter)
        if begun.counter is not None and counts is not None:
            joules = begun.counter.between(begun.counts, counts)
            return Measurement(ms=ms, joules=joules, joules_source=begun.counter.source)
        joules = self.watts_per_core * (self._cpu_clock() - begun.cpu)
        return Measurement(ms=ms, joules=joules, joules_source="estimate")

    def _find(self, name: str, rung: Callable[[], _Counter]) -> _Counter | None:
        if name not in self._known:
            try:
                self._known[name] = rung()
            except Exception:  # whatever a driver or the kernel refuses, the next rung is there
                self._known[name] = None
        return self._known[name]

    def _rapl(self) -> _Counter:
        """Packages and memory; "core" and "uncore" are parts of a package, "psys" holds both."""
        zones = []
        for zone in sorted(self._powercap.glob("intel-rapl:*")):
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                zones.append(zone)
        files = [zone / "energy_uj" for zone in zones]
        if not files:
            raise FileNotFoundError(self._powercap)
        ranges = tuple(int((zone / "max_energy_range_uj").read_text()) for zone in zones)
        return _Counter("rapl", lambda: tuple(int(f.read_text()) for f in files), 1e-6, ranges)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch has no types for it


def _nvml() -> _Counter:
    """The current device's counter of millijoules since the driver was loaded."""
    pynvml: Any = importlib.import_module("pynvml")
    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read() -> tuple[int, ...]:
        return (int(pynvml.nvmlDeviceGetTotalEnergyConsumption(device)),)

    return _Counter("nvml", read, 1e-3, (0,))


def _counts(counter: _Counter | None) -> tuple[int, ...] | None:
    if counter is None:
        return None
    try:
        return counter.read()
    except Exception:  # as in _find
        return None


DEFAULT = Meter()


@contextmanager
def measure(*, meter: Meter | None = None) -> Iterator[Measurement]:
    """Measure a block: ``with measure() as m: ...``, then `m.ms`, `m.joules`, `m.joules_source`.

    Cheap enough to stand around every step. On CUDA the block is waited for, if CUDA is in use.

    Args:
        meter: Where to read; by default this machine, with 5 W a core for the estimate.

    Returns:
        A `Measurement`, filled in when the block ends, also by an exception.

    Example:
        >>> with measure() as m:
        ...     total = sum(range(1000))
        >>> m.ms > 0, m.joules >= 0, m.joules_source in ("nvml", "rapl", "estimate")
        (True, True, True)
    """
    meter = meter or DEFAULT
    m = Measurement()
    begun = meter.read()
    try:
        yield m
    finally:
        done = meter.since(begun)
        m.ms, m.joules, m.joules_source = done.ms, done.joules, done.joules_source
