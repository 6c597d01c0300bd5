"""Which rows of a stream a replay buffer keeps, and in which slots."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tessera import random
from tessera.data.draws import UInt64s, Words
from tessera.data.largest import Largest
from tessera.data.rows import Index, Place
from tessera.errors import CheckpointError

__all__ = [
    "ClassBalanced",
    "Int64s",
    "Moves",
    "Policy",
    "Reservoir",
    "Ring",
    "ring_moves",
    "ring_positions",
]

Int64s = npt.NDArray[np.int64]
Moves = list[tuple[Place, Place]]  # (slots, rows of the batch), every slot once


class Policy(abc.ABC):
    """The slots of a buffer and the rule by which arrivals take them.

    Attributes:
        slots: What is known of each slot, [capacity] arrays of 8 bytes an element by name; empty
            before `reserve`.
    """

    needs_labels = False

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.slots: dict[str, npt.NDArray[Any]] = {}
        self._arrivals = Words(random.key(seed, "replay"))

    @abc.abstractmethod
    def reserve(self) -> None:
        """Allocate `slots`."""

    @abc.abstractmethod
    def place(self, seen: int, count: int, labels: Int64s | None) -> Moves:
        """Let the rows at stream positions seen .. seen + count - 1 arrive; where they go."""

    @abc.abstractmethod
    def positions(self, index: Index, seen: int) -> Int64s:
        """The stream positions of the rows in the slots `index`; -1 for a row of another stream."""

    def known(self, held: int) -> dict[str, Tensor]:
        """What is known of the first `held` slots, as tensors [held]."""
        arrays = self.slots if held else self._empty()
        return {n: torch.from_numpy(a[:held].view(np.int64).copy()) for n, a in arrays.items()}

    def at(self, index: Index) -> dict[str, npt.NDArray[Any]]:
        """What is known of the slots `index`."""
        return {name: array[index] for name, array in self.slots.items()}

    def _empty(self) -> dict[str, npt.NDArray[Any]]:
        other = type(self)(1, 0)
        other.reserve()
        return other.slots

    def rule(self) -> dict[str, Any]:
        """What else a resumed buffer needs, as plain values."""
        return {}

    def check(self, slots: Mapping[str, Tensor], rule: Mapping[str, Any], seen: int) -> None:
        """Refuse a damaged state.

        Raises:
            CheckpointError: It names what is wrong.
        """
        if set(rule) != set(self.rule()):
            raise CheckpointError(f"damaged replay state: rule holds {sorted(rule)}")

    def load(self, slots: Mapping[str, Tensor], rule: Mapping[str, Any], seen: int) -> None:
        """Take over checked arrays [held, ...]."""
        self.reserve()
        for name, array in self.slots.items():
            array[: len(slots[name])] = slots[name].cpu().numpy().view(array.dtype)


def _filled(seen: int, count: int, capacity: int) -> int:
    """How many of `count` arrivals find a free slot."""
    return min(count, max(0, capacity - seen))


@final
class Reservoir(Policy):
    """The rows with the smallest keys: every row seen is equally likely to be held."""

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity, seed)
        self._largest: Largest | None = None  # made once the slots are full
        self._origins: dict[int, int] = {}  # seed -> rows, of the streams merged into this one

    def reserve(self) -> None:
        """Allocate `slots`."""
        self._largest = None
        self.slots = {
            "keys": np.empty(self.capacity, np.uint64),
            "positions": np.empty(self.capacity, np.int64),
        }

    def place(self, seen: int, count: int, labels: Int64s | None) -> Moves:
        """Where the arrivals go."""
        moves: Moves = []
        keys = self._arrivals.read(seen, count)
        free = _filled(seen, count, self.capacity)
        if free:
            moves.append((slice(seen, seen + free), slice(0, free)))
        if free:
            self._take(moves[0], keys, seen)
        if free < count and (taken := self._take_over(keys, free)):
            moves.append(taken)
            self._take(taken, keys, seen)
        return moves

    def _take(self, move: tuple[Place, Place], keys: UInt64s, seen: int) -> None:
        slots, rows = move
        self.slots["keys"][slots] = keys[rows]
        held = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        self.slots["positions"][slots] = seen + held

    def _take_over(self, keys: UInt64s, first: int) -> tuple[Index, Index] | None:
        """The slots that rows `first`, `first + 1`, ... take over, and the row each ends with.

        One at a time, as the stream came: a row with a smaller key than the largest held takes
        that one's slot, and the next row meets the new largest. Each slot is named once, with
        its last row, so the rows can be written in any order.
        """
        if self._largest is None:
            self._largest = Largest(self.slots["keys"], np.arange(self.capacity))
        held = self._largest
        hopeful = first + np.flatnonzero(keys[first:] < np.uint64(held.largest))
        winners = {}
        for row, key in zip(hopeful.tolist(), keys[hopeful].tolist(), strict=True):
            if key < held.largest:  # It has fallen since `hopeful` was computed.
                winners[held.replace(key)] = row
        return _indices(winners) if winners else None

    def positions(self, index: Index, seen: int) -> Int64s:
        """Of the rows in the slots `index`."""
        found: Int64s = self.slots["positions"][index]
        return found

    def check(self, slots: Mapping[str, Tensor], rule: Mapping[str, Any], seen: int) -> None:
        """Refuse what no run gives."""
        super().check(slots, rule, seen)
        _check_keys(slots["keys"])
        if sum(rule["origins"].values()) > seen:
            raise CheckpointError("damaged replay state: its shards have more rows than were seen")

    def load(self, slots: Mapping[str, Tensor], rule: Mapping[str, Any], seen: int) -> None:
        """Take over checked values."""
        super().load(slots, rule, seen)
        self._origins = {int(seed): int(n) for seed, n in rule["origins"].items()}

    def rule(self) -> dict[str, Any]:
        """Seed -> rows, of each stream merged into this one."""
        return {"origins": dict(self._origins)}


@final
class ClassBalanced(Policy):
    """As many rows of each label as the stream allows; of one label, a uniform sample.

    While a label has never had to give a row up, all its rows are held. Where there is no room, the
    label with most rows gives up the one with its largest key, and from then on a new row of that
    label only takes the place of its largest. So a label holds its smallest keys, and how many
    depends on the labels alone, not on the keys.
    """

    needs_labels = True

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity, seed)
        self._held: dict[int, Largest] = {}  # of each label, once the slots are full
        self._seen: dict[int, int] = {}

    def reserve(self) -> None:
        """Allocate `slots`."""
        self._held = {}
        self.slots = {
            "keys": np.empty(self.capacity, np.uint64),
            "positions": np.empty(self.capacity, np.int64),
            "labels": np.empty(self.capacity, np.int64),
        }

    def place(self, seen: int, count: int, labels: Int64s | None) -> Moves:
        """Where the arrivals go."""
        assert labels is not None
        keys = self._arrivals.read(seen, count)
        free = _filled(seen, count, self.capacity)
        winners: dict[int, int] = {}
        for label, n in zip(*np.unique(labels[:free], return_counts=True), strict=True):
            self._seen[int(label)] = self._seen.get(int(label), 0) + int(n)
        moves: Moves = []
        if free:
            moves.append((slice(seen, seen + free), slice(0, free)))
            self._take(*moves[0], keys, seen, labels)
        if free < count:
            if not self._held:
                self._rebuild()
            arrivals = zip(labels[free:].tolist(), keys[free:].tolist(), strict=True)
            for row, (label, key) in enumerate(arrivals, start=free):
                slot = self._slot_for(label, key)
                if slot is not None:
                    winners[slot] = row
        if winners:
            slots, rows = _indices(winners)
            self._take(slots, rows, keys, seen, labels)
            moves.append((slots, rows))
        return moves

    def _take(self, slots: Place, rows: Place, keys: UInt64s, seen: int, labels: Int64s) -> None:
        self.slots["keys"][slots] = keys[rows]
        self.slots["labels"][slots] = labels[rows]
        held = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        self.slots["positions"][slots] = seen + held

    def _rebuild(self) -> None:
        labels = self.slots["labels"]
        for label in np.unique(labels):
            where = np.flatnonzero(labels == label)
            self._held[int(label)] = Largest(self.slots["keys"][where], where)

    def _slot_for(self, label: int, key: int) -> int | None:
        """The slot a full buffer gives to a new row, or None."""
        mine = self._held.get(label)
        if mine is None:
            mine = self._held[label] = Largest(np.empty(0, np.uint64), np.empty(0, np.intp))
        before = self._seen.get(label, 0)
        self._seen[label] = before + 1
        if before > mine.size:  # it gave rows up: it may only renew its sample
            return mine.replace(key) if key < mine.largest else None
        # Of several fullest the label itself, else the smallest: a rule on labels alone, so that
        # samples stay uniform.
        fullest = max(self._held, key=lambda c: (self._held[c].size, c == label, -c))
        if fullest == label:
            return mine.replace(key) if key < mine.largest else None
        slot = self._held[fullest].pop()
        mine.push(key, slot)
        return slot

    def positions(self, index: Index, seen: int) -> Int64s:
        """Of the rows in the slots `index`."""
        found: Int64s = self.slots["positions"][index]
        return found

    def rule(self) -> dict[str, Any]:
        """Rows seen of each label."""
        return {"seen": dict(self._seen)}

    def check(self, slots: Mapping[str, Tensor], rule: Mapping[str, Any], seen: int) -> None:
        """Refuse what no run gives."""
        super().check(slots, rule, seen)
        _check_keys(slots["keys"])
        counts = rule["seen"]
        held = {} if not len(slots["labels"]) else _counts(slots["labels"])
        if sum(counts.values()) != seen or any(counts.get(c, 0) < n for c, n in held.items()):
            raise CheckpointError("damaged replay state: its labels do not add up to what was seen")

    def load(self, slots: Mapping[str, Tensor], rule: Mapping[str, Any], seen: int) -> None:
        """Take over checked values."""
        super().load(slots, rule, seen)
        self._seen = {int(label): int(n) for label, n in rule["seen"].items()}


def ring_moves(seen: int, count: int, capacity: int) -> Moves:
    """Where rows go whose slot is their stream position modulo the capacity.

    Example:
        >>> ring_moves(3, 2, 4)
        [(slice(3, 4, None), slice(0, 1, None)), (slice(0, 1, None), slice(1, 2, None))]
    """
    first = max(0, count - capacity)
    moves: Moves = []
    while first < count:
        slot = (seen + first) % capacity
        n = min(count - first, capacity - slot)
        moves.append((slice(slot, slot + n), slice(first, first + n)))
        first += n
    return moves


def ring_positions(index: Index, seen: int, capacity: int) -> Int64s:
    """The stream positions of the rows in these slots of a ring.

    Example:
        >>> ring_positions(np.array([0, 1]), 5, 4).tolist()
        [4, 1]
    """
    return seen - 1 - (seen - 1 - index) % capacity


@final
class Ring(Policy):
    """The last rows."""

    def reserve(self) -> None:
        """Allocate `slots`."""
        self.slots = {}

    def place(self, seen: int, count: int, labels: Int64s | None) -> Moves:
        """Where the arrivals go."""
        return ring_moves(seen, count, self.capacity)

    def positions(self, index: Index, seen: int) -> Int64s:
        """Of the rows in the slots `index`."""
        return ring_positions(index, seen, self.capacity)


def _indices(winners: Mapping[int, int]) -> tuple[Index, Index]:
    count = len(winners)
    return np.fromiter(winners, np.intp, count), np.fromiter(winners.values(), np.intp, count)


def _counts(labels: Tensor) -> dict[int, int]:
    values, counts = torch.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _check_keys(keys: Tensor) -> None:
    if len(np.unique(keys.cpu().numpy())) < len(keys):
        raise CheckpointError("damaged replay state: two rows have the same key")
