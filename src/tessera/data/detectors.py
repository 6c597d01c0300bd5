"""Any drift detector: what it has to offer, and its state where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tessera.errors import CheckpointError, InputError

__all__ = ["DriftDetector", "check_detector", "detector_state", "load_detector"]


class DriftDetector(Protocol):
    """What a detector is: `PageHinkley`, `ADWIN`, any of River's, or your own.

    Example:
        >>> from tessera.data.drift import ADWIN
        >>> detector: DriftDetector = ADWIN()
        >>> _ = detector.update(0.5)
        >>> detector.drift_detected
        False
    """

    @property
    def drift_detected(self) -> bool:
        """Whether the last value was where a change was detected."""
        ...

    def update(self, x: float, /) -> object:
        """Take one value."""
        ...


def check_detector(who: str, detector: object) -> None:
    """Refuse what is no detector.

    Raises:
        InputError: It has no ``update`` or no ``drift_detected``.
    """
    if not callable(getattr(detector, "update", None)) or not hasattr(detector, "drift_detected"):
        raise InputError(
            f"{who} needs a drift detector with update(value) and drift_detected, got "
            f"{type(detector).__name__}; data.ADWIN() is one"
        )


def detector_state(detector: Any, *, used: bool) -> dict[str, Any] | None:
    """The state of a drift detector; None if there is none, or none that matters.

    Raises:
        CheckpointError: It was used and cannot be saved.
    """
    if detector is None:
        return None
    if callable(getattr(detector, "state_dict", None)):
        return dict(detector.state_dict())
    if used:
        raise CheckpointError(
            f"the drift detector {type(detector).__name__} has no state_dict, so what it has "
            "observed cannot be saved; take data.ADWIN() or data.PageHinkley(), which give River's "
            "answers"
        )
    return None


def load_detector(detector: Any, state: Mapping[str, Any] | None) -> None:
    """Give a detector its state back.

    Raises:
        CheckpointError: There is no such detector, or its state is of another.
    """
    if state is None:
        return
    load = getattr(detector, "load_state_dict", None)
    if not callable(load):
        have = "none" if detector is None else f"{type(detector).__name__}, which cannot load it"
        raise CheckpointError(
            f"this state was saved with a drift detector ({state.get('kind', 'of some kind')}), "
            f"what loads it has {have}; build it with the same detector"
        )
    load(state)
