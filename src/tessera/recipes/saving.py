"""When and where a run saves itself, and what beside the model is kept with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, final

from tessera import checkpoint

__all__ = ["Saver", "Stateful"]


class Stateful(Protocol):
    """Anything that can be saved and restored."""

    def state_dict(self) -> Any:
        """Plain values and tensors."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take over what `state_dict` gave."""


S = TypeVar("S", bound=Stateful)


@final
class Saver:
    """The checkpoint of a run.

    Args:
        folder: Where ``checkpoint.safetensors`` lies; None saves nothing.
        every: Steps between checkpoints; None: every second, or less often where saving would take
            more than a tenth of the time, however large the replay is.
    """

    def __init__(self, folder: Path | None, every: int | None) -> None:
        self._folder, self._every = folder, every
        self._things: dict[str, Stateful] = {}
        self.pending: dict[str, Any] = {}
        """States that wait for the thing they are of."""
        self._step, self._time, self._took = 0, time.perf_counter(), 0.0

    def keep(self, name: str, thing: S) -> S:
        """Save `thing` with the run, and restore it now if its state is pending."""
        self._things[name] = thing
        if name in self.pending:
            thing.load_state_dict(self.pending.pop(name))
        return thing

    def drop(self, name: str) -> None:
        """Keep it no longer."""
        del self._things[name]

    def due(self, step: int) -> bool:
        """Whether it is time to save."""
        if self._folder is None:
            return False
        if self._every is not None:
            return step - self._step >= self._every
        return time.perf_counter() - self._time > max(1.0, 10 * self._took)

    def save(self, step: int, state: Callable[[dict[str, Any]], checkpoint.State]) -> None:
        """Write what `state` makes of the states of all that is kept, by name."""
        if self._folder is None:
            return
        begun = time.perf_counter()
        kept = {name: thing.state_dict() for name, thing in self._things.items()}
        checkpoint.save(self._folder / "checkpoint.safetensors", state(kept))
        self._step, self._time = step, time.perf_counter()
        self._took = self._time - begun

    def restored(self, state: checkpoint.State, kept: Mapping[str, Any]) -> None:
        """Go on from a saved run: what was kept is pending now."""
        self.pending = dict(kept)
        for name, values in (("optimizer", state.optimizer), ("replay", state.replay)):
            if values is not None:
                self.pending[name] = values
        self._step = state.step
