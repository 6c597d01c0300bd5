"""`Budget`: as many units of work as fit under a cap of milliseconds, joules or steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, final

from tessera.errors import InputError
from tessera.profiler.measure import DEFAULT, Measurement, Meter, Reading
from tessera.profiler.pace import Pace, is_positive

__all__ = ["Budget"]

_MOST_REFUSALS = 1024


@final
class Budget:
    """Caps an online step: ``for i in budget: work()`` stops before a unit that would cross a cap.

    A unit is one pass through the loop's body. Before each one its cost is predicted from the
    earlier ones of this object, over all its loops (`Pace`): ``spent + high > cap`` ends the loop.
    So keep one Budget for each kind of work. It cannot cut a unit short: what is promised is
    that no unit *predicted* to cross a cap is begun.

    The first unit of a loop is always allowed, unless typical units are known to be longer than
    the cap; then the loop runs nothing. So that this is no verdict for ever (the first step of a
    process is slow), one unit is tried again after 1 empty loop, then after 4, 16, ... at most
    1,024.

    Args:
        ms: Cap on wall-clock milliseconds of a loop, > 0.
        joules: Cap on the joules of a loop, > 0, from whatever source `measure` has here; an
            estimate is enforced as if it were measured.
        steps: Cap on the number of units, >= 1.
        meter: Where time and energy are read.

    Attributes:
        stopped_by: "ms", "joules" or "steps": what ended the last loop; None when it was left by
            `break` or an exception, or before the first.
        spent: The `Measurement` of the last loop.
        meter: Where time and energy are read.

    Raises:
        InputError: No cap is given, or one is negative, zero, NaN or infinite.

    Example:
        >>> budget = Budget(ms=50, steps=3)
        >>> [i for i in budget], budget.stopped_by
        ([0, 1, 2], 'steps')
        >>> budget.spent.ms < 50
        True
    """

    def __init__(
        self,
        ms: float | None = None,
        joules: float | None = None,
        steps: int | None = None,
        *,
        meter: Meter | None = None,
    ) -> None:
        if ms is None and joules is None and steps is None:
            raise InputError(
                "Budget needs a cap: Budget(ms=5), Budget(joules=0.1) or Budget(steps=20)"
            )
        for name, cap in (("ms", ms), ("joules", joules), ("steps", steps)):
            if cap is not None and not is_positive(cap):
                raise InputError(
                    f"Budget needs {name} > 0 and finite, got {cap!r}; leave it out for no cap"
                )
        if steps is not None and not isinstance(steps, int):
            raise InputError(f"Budget needs a whole number of steps, got {steps!r}")
        self.ms = ms
        self.joules = joules
        self.steps = steps
        self.stopped_by: Literal["ms", "joules", "steps"] | None = None
        self.spent = Measurement(ms=0.0, joules=0.0)
        self.meter = meter or DEFAULT
        self._ms, self._joules = Pace(), Pace()
        self._refused, self._patience = 0, 1  # empty loops since a unit ran; how many are due

    def __repr__(self) -> str:
        caps = {"ms": self.ms, "joules": self.joules, "steps": self.steps}
        return f"Budget({', '.join(f'{k}={v}' for k, v in caps.items() if v is not None)})"

    def __iter__(self) -> Iterator[int]:
        self.stopped_by = None
        begun = self.meter.read()
        try:
            yield from self._units(begun)
        finally:
            self.spent = self.meter.since(begun)

    def _units(self, begun: Reading) -> Iterator[int]:
        self.stopped_by = self._refusal()
        if self.stopped_by:
            return
        ms = joules = 0.0
        for i in itertools.count():
            yield i
            before, ms = ms, self.meter.ms_since(begun)
            self._ms.add(max(ms - before, 0.0))
            if self.joules is not None:
                before, joules = joules, self.meter.since(begun).joules
                self._joules.add(max(joules - before, 0.0))
            if self.steps is not None and i + 1 >= self.steps:
                self.stopped_by = "steps"
            elif _crosses(self.ms, ms, self._ms):
                self.stopped_by = "ms"
            elif _crosses(self.joules, joules, self._joules):
                self.stopped_by = "joules"
            if self.stopped_by:
                return

    def _refusal(self) -> Literal["ms", "joules"] | None:
        """Which cap a typical unit alone would cross, unless it is time to try one again."""
        too_long: Literal["ms", "joules"] | None = None
        if self.ms is not None and (self._ms.typical or 0.0) > self.ms:
            too_long = "ms"
        elif self.joules is not None and (self._joules.typical or 0.0) > self.joules:
            too_long = "joules"
        if too_long is None:
            self._refused, self._patience = 0, 1
        elif self._refused < self._patience:
            self._refused += 1
            return too_long
        else:
            self._refused, self._patience = 0, min(4 * self._patience, _MOST_REFUSALS)
        return None


def _crosses(cap: float | None, spent: float, pace: Pace) -> bool:
    return cap is not None and spent + (pace.high or 0.0) > cap
