"""How fast detectors see a change, how often they see one that is not there, and what they cost.

    python benchmarks/drift.py

Delays are of abrupt changes of a Bernoulli stream, 5,000 values before and after, 30 runs: the mean
over the runs that found it. False alarms are of 150,000 stationary values at p = 0.2. Beside ours:
River's (with the extra [dev]), and a dummy that alarms at every 500th value: it finds every change,
so a delay says nothing without its false alarms. The bar: within 1.05x of the delay of River's
ADWIN, and no false alarm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from _timing import interleaved, machine, ratios
from tessera.data import ADWIN, PageHinkley

RUNS, HALF, STATIONARY = 30, 5000, 150_000


class Detector(Protocol):
    drift_detected: bool

    def update(self, value: float) -> Any: ...


class Every500th:
    """A detector that looks at nothing."""

    def __init__(self) -> None:
        self.count, self.drift_detected = 0, False

    def update(self, value: float) -> None:
        self.count += 1
        self.drift_detected = self.count % 500 == 0


def kinds() -> dict[str, Callable[[], Detector]]:
    found: dict[str, Callable[[], Detector]] = {"ADWIN": ADWIN, "PageHinkley": PageHinkley}
    try:
        from river import drift
    except ImportError:
        print("River is not installed: pip install river")
    else:
        found |= {"River's ADWIN": drift.ADWIN, "River's PageHinkley": drift.PageHinkley}
    return found | {"dummy, every 500th": Every500th}


def alarms(detector: Detector, values: list[float]) -> list[int]:
    found = []
    for t, value in enumerate(values):
        detector.update(value)
        if detector.drift_detected:
            found.append(t)
    return found


def delay(make: Callable[[], Detector], before: float, after: float) -> tuple[float, int]:
    """Mean delay of the first alarm after the change, and how many runs had none."""
    delays = []
    for run in range(RUNS):
        rng = np.random.default_rng(run)
        p = np.repeat([before, after], HALF)
        found = alarms(make(), (rng.random(2 * HALF) < p).astype(float).tolist())
        late = [t - HALF for t in found if t >= HALF]
        delays += late[:1]
    return statistics.mean(delays) if delays else float("nan"), RUNS - len(delays)


def main() -> None:
    print(machine())
    detectors = kinds()
    quiet = (np.random.default_rng(99).random(STATIONARY) < 0.2).astype(float).tolist()
    changes = ((0.2, 0.3), (0.2, 0.5), (0.05, 0.2))
    print(f"{'':<20}" + "".join(f"{a} -> {b:<6}" for a, b in changes) + "false alarms / 150k")
    for name, make in detectors.items():
        row = [delay(make, a, b) for a, b in changes]
        shown = "".join(f"{mean:6.0f}{f' ({gone})' if gone else '':<7}" for mean, gone in row)
        print(f"{name:<20}{shown}{len(alarms(make(), quiet)):6d}")
    some = quiet[:20_000]
    times = interleaved({n: lambda m=m: alarms(m(), some) for n, m in detectors.items()}, rounds=7)
    for name in detectors:
        mid = statistics.median(times[name]) / len(some)
        print(f"{name:<20}{1e6 * mid:8.2f} us an update", end="")
        base = f"River's {name}"
        print(f"   {ratios(times, name, base)[1]:.1f}x River's" if base in times else "")


if __name__ == "__main__":
    main()
