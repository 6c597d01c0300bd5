"""How hard to learn, by how long ago the world changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

from torch.optim import Optimizer

from tessera.data.detectors import (
    DriftDetector,
    check_detector,
    detector_state,
    load_detector,
)
from tessera.errors import CheckpointError, InputError

__all__ = ["DriftSchedule"]


@final
class DriftSchedule:
    """A pulse that is 1 when the stream drifts and halves every `half_life` rows.

    ``pulse_t = 2^(-rows since the last drift / half_life)``. Whatever should differ between a calm
    stream and one that just changed is a line between two values (`between`): the learning rate
    (`set_rate`), the weight rho of new data in `loss.recency_weighted`, the steps a batch. It
    starts at 1: a new learner has everything ahead of it.

    Args:
        detector: Told of every error or loss: `data.PageHinkley`, `data.ADWIN`, any of River's.
        half_life: Rows until the pulse has halved, > 0.
        every: Rows whose mean is one value for the detector, >= 1, so that batches of different
            sizes weigh alike: a threshold that suits batches of 32 would take the noise of one of
            4 for a drift.

    Raises:
        InputError: `half_life` or `every` is out of range, or the detector has no ``update`` or no
            ``drift_detected``.

    Example:
        >>> from tessera import data
        >>> schedule = DriftSchedule(data.PageHinkley(threshold=2.0), half_life=100)
        >>> found = [schedule.update(0.1 if i < 50 else 0.9, rows=10) for i in range(60)]
        >>> found.index(True), schedule.drifts, round(schedule.pulse, 3)
        (52, [530], 0.616)
        >>> round(schedule.between(0.2, 0.5), 3)  # rho: 0.2 when calm, 0.5 just after a drift
        0.385
    """

    def __init__(
        self, detector: DriftDetector, *, half_life: float = 800.0, every: int = 1
    ) -> None:
        if every < 1:
            raise InputError(f"DriftSchedule needs every >= 1 rows, got {every}")
        if not (half_life > 0 and math.isfinite(half_life)):
            raise InputError(f"DriftSchedule needs a finite half_life > 0 in rows, got {half_life}")
        check_detector("DriftSchedule", detector)
        self._detector, self._half_life = detector, float(half_life)
        self._every = int(every)
        self._rows = self._since = 0
        self._part: list[float] = [
            0,
            0.0,
        ]  # rows that wait to become a value, and the sum over them
        self._drifts: list[int] = []

    @property
    def pulse(self) -> float:
        """In [0, 1]: 1 just after a drift and at the start, near 0 when calm."""
        return float(2.0 ** (-self._since / self._half_life))

    @property
    def drifts(self) -> list[int]:
        """After how many rows each drift was seen."""
        return list(self._drifts)

    def update(self, value: float, *, rows: int = 1) -> bool:
        """Take the error or loss of the next `rows` rows, measured before they are learned.

        Returns:
            Whether the stream drifted here.

        Raises:
            InputError: The value is not finite, or `rows` < 1. Nothing was changed.
        """
        if not math.isfinite(value) or rows < 1:
            raise InputError(
                f"DriftSchedule.update needs a finite value of >= 1 rows, got {value} of {rows}"
            )
        self._rows += rows
        self._since += rows
        waiting, total = self._part[0] + rows, self._part[1] + value * rows
        if waiting < self._every:
            self._part = [waiting, total]
            return False
        self._part = [0, 0.0]
        self._detector.update(total / waiting)
        if found := bool(self._detector.drift_detected):
            self._since = 0
            self._drifts.append(self._rows)
        return found

    def between(self, calm: float, drifted: float) -> float:
        """``calm + (drifted - calm) pulse``."""
        return calm + (drifted - calm) * self.pulse

    def set_rate(self, optimizer: Optimizer, *, calm: float, drifted: float) -> None:
        """Set the learning rate of every group of `optimizer` to `between` these two."""
        for group in optimizer.param_groups:
            group["lr"] = self.between(calm, drifted)

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain values, the detector's state included.

        Raises:
            CheckpointError: The detector has no ``state_dict``, as River's have none.
        """
        return {
            "half_life": self._half_life,
            "every": self._every,
            "part": list(self._part),
            "rows": self._rows,
            "since": self._since,
            "drifts": self.drifts,
            "detector": detector_state(self._detector, used=True),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            CheckpointError: It is damaged, or of other settings or another detector; nothing was
                changed.
        """
        for name, own in (("half_life", self._half_life), ("every", self._every)):
            if state.get(name) != own:
                raise CheckpointError(
                    f"this state of DriftSchedule has {name}={state.get(name)!r}, the one that "
                    f"loads it {own!r}; build it as the saved one was"
                )
        try:
            rows, since = int(state["rows"]), int(state["since"])
            part = [int(state["part"][0]), float(state["part"][1])]
            drifts, detector = [int(row) for row in state["drifts"]], state["detector"]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"damaged state of DriftSchedule ({type(error).__name__}: {error})"
            ) from error
        load_detector(self._detector, detector)
        self._rows, self._since, self._part, self._drifts = rows, since, part, drifts
