"""How long the next unit of work may take, judged from the earlier ones."""

from __future__ import annotations

import bisect
import math
from collections import deque
from typing import final

from tessera.errors import InputError

__all__ = ["Pace", "is_positive"]

_WINDOW = 512
_RECENT = 8
_ONE_IN = 200  # of so many units, one is left out as the scheduler's doing


def is_positive(value: object) -> bool:
    """Whether it is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value > 0


@final
class Pace:
    """A high estimate of the next unit's cost: quick to rise, slow to fall.

    ``high = max(largest of the last 8, largest of the last 512 but for one in 200)``. While less
    than 200 units are known that is the largest of all. A slower unit counts at once; faster
    ones lower the estimate only as the slow ones leave the window; a unit that the operating
    system interrupted is forgotten after 8 more.

    Example:
        >>> pace = Pace()
        >>> for ms in (1.0, 3.0, 1.0):
        ...     pace.add(ms)
        >>> pace.high, pace.typical
        (3.0, 1.0)
    """

    __slots__ = ("_recent", "_sorted", "_window")

    def __init__(self) -> None:
        self._window: deque[float] = deque()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._sorted: list[float] = []

    def __len__(self) -> int:
        """How many units the estimate rests on, at most 512."""
        return len(self._window)

    def add(self, cost: float) -> None:
        """Take the cost of one unit, finite and >= 0, in any one unit of measure.

        Raises:
            InputError: The cost is negative or not finite; nothing was changed.
        """
        if not (math.isfinite(cost) and cost >= 0):
            raise InputError(f"Pace.add needs a finite cost >= 0, got {cost!r}")
        if len(self._window) == _WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._window.popleft())]
        self._window.append(cost)
        self._recent.append(cost)
        bisect.insort(self._sorted, cost)

    @property
    def high(self) -> float | None:
        """What the next unit is expected not to exceed; None before the first."""
        if not self._window:
            return None
        spared = len(self._window) // _ONE_IN
        return max(self._sorted[-1 - spared], max(self._recent))

    @property
    def typical(self) -> float | None:
        """The lower median of the last 8 units; None before the first."""
        if not self._recent:
            return None
        return sorted(self._recent)[(len(self._recent) - 1) // 2]
