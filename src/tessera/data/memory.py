"""What a replay buffer holds in memory: rows in slots, the policy's knowledge, the counters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from torch import Tensor

from tessera import random
from tessera.data import checks
from tessera.data.draws import Words
from tessera.data.policies import Policy
from tessera.data.prioritized import POLICIES, Prioritized
from tessera.data.rows import Column, Index, Place
from tessera.errors import CheckpointError, InputError

__all__ = ["Memory", "Volatile"]


@final
class Memory:
    """The state of a `ReplayBuffer`, and what changes it; who calls holds the buffer's lock.

    Args:
        settings: "policy", "capacity", "seed" and "fields", checked.

    Example:
        >>> import torch
        >>> settings = {"policy": "ring", "capacity": 4, "seed": 0, "fields": ["x"]}
        >>> memory = Memory(settings)
        >>> memory.put([torch.arange(6)])
        [slice(2, 4, None), slice(0, 2, None)]
        >>> memory.seen, memory.held, memory.rows(slice(0, 4))[0].tolist()
        (6, 4, [4, 5, 2, 3])
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.fields: tuple[str, ...] = tuple(settings["fields"])
        self.capacity: int = settings["capacity"]
        self.policy: Policy = POLICIES[settings["policy"]](self.capacity, settings["seed"])
        self.columns: tuple[Column, ...] = ()
        self.seen = 0
        self.draws = 0  # words of the sampling stream that were used
        self.carry = 0.0  # what `share` rounded away
        self._sampling = Words(random.key(settings["seed"], "sample"))

    @classmethod
    def of(
        cls,
        state: Mapping[str, Any],
        settings: Mapping[str, Any],
        columns: tuple[Column, ...] | None = None,
    ) -> Memory:
        """One in this state; `columns` are taken over, where they hold its rows already.

        Raises:
            CheckpointError: The state is damaged or of a buffer with other settings.
        """
        checks.check_state(state, settings)
        memory = cls(settings)
        policy, seen = memory.policy, int(state["seen"])
        held = min(seen, memory.capacity)
        checks.check_slots(state["slots"], policy, held)
        try:
            policy.check(state["slots"], state["rule"], seen)
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"damaged replay state: rule={state['rule']!r}") from error
        if columns is None:
            rows = [state["rows"][name] for name in memory.fields] if state["rows"] else []
            columns = tuple(Column.like(row, memory.capacity) for row in rows)
            for column, row in zip(columns, rows, strict=True):
                column.put(slice(0, held), row, slice(0, held))
        if columns:
            policy.load(state["slots"], state["rule"], seen)
        memory.columns, memory.seen = columns, seen
        memory.draws, memory.carry = int(state["draws"]), float(state["carry"])
        return memory

    @property
    def held(self) -> int:
        """How many rows there are; they are in the first slots."""
        return min(self.seen, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes set aside for rows and what is known of them."""
        known = sum(array.nbytes for array in self.policy.slots.values())
        return known + sum(column.store.nbytes for column in self.columns)

    def put(self, values: Sequence[Tensor]) -> list[Place]:
        """Let checked rows arrive; the slots that changed, of which some may be named twice."""
        if not self.columns:
            self.columns = tuple(Column.like(value, self.capacity) for value in values)
            self.policy.reserve()
        labels = None
        if self.policy.needs_labels:
            labels = values[self.fields.index("y")].detach().cpu().numpy().astype(np.int64)
        count, places = len(values[0]), []
        for slots, rows in self.policy.place(self.seen, count, labels):
            for column, value in zip(self.columns, values, strict=True):
                column.put(slots, value, rows)
            places.append(slots)
        self.seen += count
        return places

    def prioritize(self, positions: Tensor, priorities: Tensor) -> int:
        """As `ReplayBuffer.update_priorities`, of a buffer with that policy."""
        assert isinstance(self.policy, Prioritized)
        return self.policy.prioritize(positions, priorities, self.seen)

    def rows(self, place: Place) -> tuple[Tensor, ...]:
        """A copy of the rows in these slots."""
        return tuple(column.rows(place) for column in self.columns)

    def choose(self, n: int, exclude_last: int) -> Index:
        """The slots of a sample."""
        held, since = self.held, self.seen - exclude_last
        if isinstance(self.policy, Prioritized):
            words = self._sampling.read(self.draws, n)
            self.draws += n
            new = np.arange(max(since, self.seen - held), self.seen) % self.capacity
            return self.policy.choose(words, new)
        # Of a random order of different slots, those that are not too new are in random order.
        wanted = min(n + min(exclude_last, held), held)
        index, self.draws = self._sampling.distinct(self.draws, wanted, held)
        if exclude_last:
            index = index[self.policy.positions(index, self.seen) < since]
        return index[:n]

    def share(self, count: int, ratio: float) -> int:
        """How many rows to replay beside `count` new ones; what is rounded away is carried on.

        Raises:
            InputError: The ratio is negative or not finite.
        """
        wanted = self.carry + count * ratio
        if not (math.isfinite(wanted) and ratio >= 0):
            raise InputError(f"ReplayBuffer.sample_like needs a finite ratio >= 0, got {ratio}")
        # The slack lets 10 x 0.1 be one row, though the sum falls short of 1 in binary.
        n = math.floor(wanted + 1e-9)
        self.carry = wanted - n
        return n

    def state(self) -> dict[str, Any]:
        """As `ReplayBuffer.state_dict`."""
        pairs = zip(self.fields, self.columns, strict=False)
        return {
            **self.settings,
            "seen": self.seen,
            "draws": self.draws,
            "carry": self.carry,
            "slots": self.policy.known(self.held),
            "rule": self.policy.rule(),
            "rows": {name: column.rows(slice(0, self.held)) for name, column in pairs},
        }


@final
class Volatile:
    """Keeps a memory in memory only; `Durable` is its neighbour that keeps a folder too."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def put(self, values: Sequence[Tensor]) -> None:
        """Let checked rows arrive."""
        self.memory.put(values)

    def prioritize(self, positions: Tensor, priorities: Tensor) -> int:
        """As `ReplayBuffer.update_priorities`."""
        return self.memory.prioritize(positions, priorities)

    def replace(self, memory: Memory) -> None:
        """Be another."""
        self.memory = memory

    def flush(self) -> None:
        """There is nothing to put on disk."""

    def close(self) -> None:
        """There is nothing to let go of."""
