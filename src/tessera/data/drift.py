"""Drift detectors: has the mean of what a stream says about us changed?

Both take one number at a time, such as the loss of a batch or 1 for an error. Their state is plain
numbers, so a resumed stream goes on as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

from tessera.errors import CheckpointError, InputError, unknown_name

__all__ = ["ADWIN", "PageHinkley"]

_MODES = ("up", "down", "both")


@final
class PageHinkley:
    """Page-Hinkley's test: the sum of what exceeds the mean so far has risen by a threshold.

    ``m_t = alpha m_{t-1} + (x_t - mean_t - delta)``; a rise is detected when
    ``m_t - min_s m_s > threshold``, a fall likewise with signs exchanged. After a detection the
    test starts anew with the next value.

    Args:
        min_instances: Values to see before anything is detected, >= 1.
        delta: Change of the mean that is tolerated, in the unit of the values, >= 0.
        threshold: Larger is slower and surer, > 0.
        alpha: Forgetting factor of the sums, in (0, 1].
        mode: "up", "down" or "both": which changes of the mean count.

    Raises:
        InputError: A setting is out of range.
        UnknownNameError: No such mode.

    Source:
        Page 1954, "Continuous inspection schemes", Biometrika 41 (1/2).

    Example:
        >>> detector = PageHinkley(threshold=5.0)
        >>> [i for i in range(200) if detector.update(float(i >= 100))]
        [105]
    """

    def __init__(
        self,
        *,
        min_instances: int = 30,
        delta: float = 0.005,
        threshold: float = 50.0,
        alpha: float = 0.9999,
        mode: str = "both",
    ) -> None:
        if mode not in _MODES:
            raise unknown_name("mode of PageHinkley", mode, _MODES)
        _require("PageHinkley", "min_instances >= 1", min_instances, min_instances >= 1)
        _require("PageHinkley", "delta >= 0", delta, delta >= 0)
        _require("PageHinkley", "threshold > 0", threshold, threshold > 0)
        _require("PageHinkley", "alpha in (0, 1]", alpha, 0 < alpha <= 1)
        self._settings: dict[str, Any] = {
            "min_instances": min_instances,
            "delta": delta,
            "threshold": threshold,
            "alpha": alpha,
            "mode": mode,
        }
        self._detected = False
        self._begin()

    def _begin(self) -> None:
        self._count, self._mean = 0, 0.0
        self._up, self._lowest = 0.0, math.inf
        # The sum of falls starts from its first value or from -1, whichever is higher, as in River.
        self._down, self._highest = 0.0, -1.0

    @property
    def drift_detected(self) -> bool:
        """Whether the last value was where a change was detected."""
        return self._detected

    def update(self, value: float) -> bool:
        """Take one value, finite; whether a change was detected at it.

        Raises:
            InputError: The value is NaN or infinite; nothing was changed.
        """
        _require("PageHinkley.update", "a finite value", value, math.isfinite(value))
        if self._detected:
            self._begin()
        s = self._settings
        self._count += 1
        self._mean += (value - self._mean) / self._count
        gap, alpha, delta = value - self._mean, s["alpha"], s["delta"]
        self._up = alpha * self._up + gap - delta
        self._down = alpha * self._down + gap + delta
        self._lowest = min(self._lowest, self._up)
        self._highest = max(self._highest, self._down)
        rose = self._up - self._lowest > s["threshold"] and s["mode"] != "down"
        fell = self._highest - self._down > s["threshold"] and s["mode"] != "up"
        self._detected = (rose or fell) and self._count >= s["min_instances"]
        return self._detected

    def state_dict(self) -> dict[str, Any]:
        """Settings and state as plain numbers, exact.

        Example:
            >>> a, b = PageHinkley(), PageHinkley()
            >>> _ = a.update(1.0)
            >>> b.load_state_dict(a.state_dict())
            >>> b.state_dict() == a.state_dict()
            True
        """
        names = ("_detected", "_count", "_mean", "_up", "_lowest", "_down", "_highest")
        # Before the first value the lowest is infinity, which JSON has no number for.
        values = {n[1:]: getattr(self, n) for n in names}
        values["lowest"] = None if math.isinf(self._lowest) else self._lowest
        return {"kind": "PageHinkley", "settings": dict(self._settings), **values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            CheckpointError: It is of another detector or of other settings; nothing was changed.
        """
        _require_same(state, "PageHinkley", self._settings)
        self._detected, self._count = bool(state["detected"]), int(state["count"])
        self._mean, self._up = float(state["mean"]), float(state["up"])
        self._down, self._highest = float(state["down"]), float(state["highest"])
        self._lowest = math.inf if state["lowest"] is None else float(state["lowest"])


@final
class ADWIN:
    """Adaptive windowing: drop the old part of a window whose two parts differ in mean.

    The window is kept as an exponential histogram, O(max_buckets log(width)) numbers. A cut into
    n0 old and n1 new values is a change when the means differ by more than
    ``sqrt(2/m s^2 ln(2 ln(n)/delta)) + 2/(3m) ln(2 ln(n)/delta)`` with s^2 the variance of the
    window and 1/m = 1/(n0 - l + 1) + 1/(n1 - l + 1), l = `min_window_length`. At a detection the
    window is what follows the change; with the next value the detector starts anew, as River's.

    Args:
        delta: Confidence, in (0, 1): smaller is slower and surer.
        clock: Look for a change at every so many values, >= 1.
        max_buckets: Buckets of one size before two are merged, >= 1.
        min_window_length: Values of either part of a cut, >= 1.
        grace_period: Values to see before anything is detected, >= 0.

    Raises:
        InputError: A setting is out of range.

    Source:
        Bifet & Gavalda 2007, "Learning from time-changing data with adaptive windowing", SDM.

    Example:
        >>> detector = ADWIN()
        >>> [i for i in range(400) if detector.update(float(i >= 200))], detector.width < 200
        ([223], True)
    """

    def __init__(
        self,
        *,
        delta: float = 0.002,
        clock: int = 32,
        max_buckets: int = 5,
        min_window_length: int = 5,
        grace_period: int = 10,
    ) -> None:
        _require("ADWIN", "delta in (0, 1)", delta, 0 < delta < 1)
        _require("ADWIN", "clock >= 1", clock, clock >= 1)
        _require("ADWIN", "max_buckets >= 1", max_buckets, max_buckets >= 1)
        _require("ADWIN", "min_window_length >= 1", min_window_length, min_window_length >= 1)
        _require("ADWIN", "grace_period >= 0", grace_period, grace_period >= 0)
        self._settings: dict[str, Any] = {
            "delta": delta,
            "clock": clock,
            "max_buckets": max_buckets,
            "min_window_length": min_window_length,
            "grace_period": grace_period,
        }
        self._detected = False
        self._begin()

    def _begin(self) -> None:
        self._ticks = self._width = 0
        self._total = self._variance = 0.0  # the variance times the width
        # Row i holds buckets of 2^i values, oldest first: [sum, sum of squared gaps to its mean].
        self._rows: list[list[list[float]]] = [[]]

    @property
    def drift_detected(self) -> bool:
        """Whether the last value was where a change was detected."""
        return self._detected

    @property
    def width(self) -> int:
        """How many values the window holds."""
        return self._width

    @property
    def mean(self) -> float:
        """Of the window; 0 while it is empty."""
        return self._total / self._width if self._width else 0.0

    def update(self, value: float) -> bool:
        """Take one value, finite; whether a change was detected at it.

        Raises:
            InputError: The value is NaN or infinite; nothing was changed.
        """
        _require("ADWIN.update", "a finite value", value, math.isfinite(value))
        if self._detected:
            self._begin()
        self._insert(float(value))
        self._ticks += 1
        self._detected = False
        due = self._ticks % self._settings["clock"] == 0
        if due and self._width > self._settings["grace_period"]:
            while self._is_cut():
                self._detected = True
                self._drop_oldest()
        return self._detected

    def _insert(self, value: float) -> None:
        if self._width:
            gap = value - self._total / self._width
            self._variance += self._width * gap * gap / (self._width + 1)
        self._width += 1
        self._total += value
        self._rows[0].append([value, 0.0])
        size = 1
        for i, row in enumerate(self._rows):
            if len(row) <= self._settings["max_buckets"]:
                break
            if i + 1 == len(self._rows):
                self._rows.append([])
            (a, va), (b, vb) = row[:2]
            del row[:2]
            gap = a / size - b / size
            self._rows[i + 1].append([a + b, va + vb + size * gap * gap / 2])
            size *= 2

    def _drop_oldest(self) -> None:
        total, variance = self._rows[-1].pop(0)
        size = 1 << (len(self._rows) - 1)
        self._width -= size
        self._total -= total
        if self._width:
            gap = total / size - self._total / self._width
            self._variance -= variance + size * self._width * gap * gap / (size + self._width)
        else:
            self._variance = 0.0
        while not self._rows[-1] and len(self._rows) > 1:
            self._rows.pop()

    def _is_cut(self) -> bool:
        """Whether some cut between two buckets tells an older from a newer mean."""
        least, width = self._settings["min_window_length"], self._width
        if width < 2:
            return False
        confidence = math.log(2 * math.log(width) / self._settings["delta"])
        spread = 2 * max(self._variance, 0.0) / width * confidence
        old, old_total = 0, 0.0
        for i in range(len(self._rows) - 1, -1, -1):
            for total, _ in self._rows[i]:
                old += 1 << i
                old_total += total
                new = width - old
                if old < least or new < least:
                    continue
                gap = abs(old_total / old - (self._total - old_total) / new)
                m = 1 / (old - least + 1) + 1 / (new - least + 1)
                if gap > math.sqrt(spread * m) + 2 / 3 * m * confidence:
                    return True
        return False

    def state_dict(self) -> dict[str, Any]:
        """Settings and state as plain numbers, exact.

        Example:
            >>> a, b = ADWIN(), ADWIN()
            >>> _ = [a.update(i % 3) for i in range(100)]
            >>> b.load_state_dict(a.state_dict())
            >>> b.state_dict() == a.state_dict()
            True
        """
        names = ("_detected", "_ticks", "_width", "_total", "_variance")
        rows = [[list(bucket) for bucket in row] for row in self._rows]
        values = {n[1:]: getattr(self, n) for n in names}
        return {"kind": "ADWIN", "settings": dict(self._settings), **values, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            CheckpointError: It is of another detector, of other settings, or damaged; nothing was
                changed.
        """
        _require_same(state, "ADWIN", self._settings)
        rows = [[[float(a), float(b)] for a, b in row] for row in state["rows"]]
        if not rows or sum(len(row) << i for i, row in enumerate(rows)) != state["width"]:
            raise CheckpointError("damaged state of ADWIN: its buckets do not add up to its width")
        self._detected, self._ticks = bool(state["detected"]), int(state["ticks"])
        self._width, self._total = int(state["width"]), float(state["total"])
        self._variance, self._rows = float(state["variance"]), rows


def _require(who: str, what: str, got: float, fine: bool) -> None:
    if not fine:
        raise InputError(f"{who} needs {what}, got {got!r}")


def _require_same(state: Mapping[str, Any], kind: str, settings: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping) or state.get("kind") != kind:
        raise CheckpointError(f"this is no state of {kind}; give what {kind}.state_dict() returned")
    if state.get("settings") != settings:
        raise CheckpointError(
            f"this state is of a {kind} with {state.get('settings')}, the one that loads it has "
            f"{dict(settings)}; build it as the saved one was"
        )
