"""The largest keys of a set of slots, at a cost that does not grow with the set."""

from __future__ import annotations

import heapq
from array import array
from typing import final

import numpy as np

from tessera.data.draws import UInt64s
from tessera.data.rows import Index

__all__ = ["Largest"]


@final
class Largest:
    """Slots by their keys, of which the one with the largest can be taken out or get a new key.

    A heap of all keys would do, but a pop walks down it, and in a heap of millions nearly every
    step misses the cache. So only the largest eighth of the keys is in order: sorted and walked
    from its end, beside a heap of those that came since. A key below that eighth is laid aside.
    When the eighth is used up, or as many have come into the heap, the largest eighth of all keys
    is found and sorted again.

    A call costs O(log n) at most in the heap, which few keys of a reservoir enter. Finding the
    eighth again is O(n) every n / 8 calls: for 2,000,000 keys 40 ms (100 the first time), a fifth
    of the 0.8 us that a call costs on average. Up to `at_least` keys it is a heap and no more.

    Args:
        keys: uint64 [n], no two the same.
        slots: int64 [n], >= 0.
        at_least: Order no fewer keys than this, >= 1: a pass over an array has a price of its own.

    Attributes:
        size: How many there are.
        largest: The largest key; -1 if there is none.

    Example:
        >>> held = Largest(np.array([5, 9, 7], np.uint64), np.array([0, 1, 2]))
        >>> held.largest, held.replace(6), held.largest, held.pop(), held.size
        (9, 1, 7, 2, 2)
    """

    def __init__(self, keys: UInt64s, slots: Index, *, at_least: int = 256) -> None:
        self._at_least = at_least
        self._order(keys, slots)

    def _order(self, keys: UInt64s, slots: Index) -> None:
        self.size = len(keys)
        self._eighth = max(self.size // 8, self._at_least)
        self._floor = -1  # Keys above it are in order, the others aside.
        aside = np.zeros(self.size, bool)
        if (rest := self.size - self._eighth) > 0:
            floor = np.partition(keys, rest - 1)[rest - 1]
            self._floor, aside = int(floor), keys <= floor
        self._aside = keys[aside], slots[aside]
        self._aside_since = array("Q"), array("q")
        keys, slots = keys[~aside], slots[~aside]
        order = np.argsort(keys)
        self._keys: list[int] = keys[order].tolist()
        self._slots: list[int] = slots[order].tolist()
        self._since: list[tuple[int, int]] = []  # A heap of (-key, slot).
        self.largest: int = self._keys[-1] if self._keys else -1

    def _order_again(self) -> None:
        heap_keys = np.array([-key for key, _ in self._since], np.uint64)
        heap_slots = np.array([slot for _, slot in self._since], np.intp)
        (keys, slots), (more_keys, more_slots) = self._aside, self._aside_since
        self._order(
            np.concatenate([keys, more_keys, np.array(self._keys, np.uint64), heap_keys]),
            np.concatenate([slots, more_slots, np.array(self._slots, np.intp), heap_slots]),
        )

    def push(self, key: int, slot: int) -> None:
        """Let `slot` in with `key`."""
        self.size += 1
        if key <= self._floor:
            keys, slots = self._aside_since
            keys.append(key)
            slots.append(slot)
            return
        heapq.heappush(self._since, (-key, slot))
        if key > self.largest:
            self.largest = key
        if len(self._since) > self._eighth:
            self._order_again()

    def pop(self) -> int:
        """Take out the slot with the largest key.

        Raises:
            IndexError: There is none.
        """
        keys, since = self._keys, self._since
        if since and -since[0][0] == self.largest:
            _, slot = heapq.heappop(since)
        else:
            keys.pop()
            slot = self._slots.pop()
        self.size -= 1
        self.largest = keys[-1] if keys else -1
        if since and -since[0][0] > self.largest:
            self.largest = -since[0][0]
        if self.largest < 0 and self.size:
            self._order_again()
        return slot

    def replace(self, key: int) -> int:
        """Give the slot with the largest key a new one; the slot.

        Raises:
            IndexError: There is none.
        """
        slot = self.pop()
        self.push(key, slot)
        return slot
