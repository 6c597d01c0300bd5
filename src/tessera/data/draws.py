"""Draws from a counter-based stream: random words by position, and indices without repeats."""

from __future__ import annotations

from itertools import islice

import numpy as np
import numpy.typing as npt

from tessera import random
from tessera.data.rows import Index

__all__ = ["UInt64s", "Words"]

UInt64s = npt.NDArray[np.uint64]

_AHEAD = 1024


class Words:
    """`random.bits` of one stream, computed a block ahead: a small request costs a slice.

    What it gives is a function of the position alone; the block is only a cache.

    Args:
        stream_key: From `random.key`.

    Example:
        >>> words = Words(random.key(0, "demo"))
        >>> bool((words.read(5, 3) == random.bits(random.key(0, "demo"), 5, 3)).all())
        True
    """

    def __init__(self, stream_key: int) -> None:
        self._key = stream_key
        self._start = 0
        self._block: UInt64s = np.empty(0, np.uint64)

    def read(self, start: int, count: int) -> UInt64s:
        """The words at positions `start` .. `start + count - 1`; do not write to them."""
        offset = start - self._start
        if offset < 0 or offset + count > len(self._block):
            self._start, offset = start, 0
            self._block = random.bits(self._key, start, max(count, _AHEAD))
        return self._block[offset : offset + count]

    def distinct(self, start: int, n: int, size: int) -> tuple[Index, int]:
        """`n` different indices below `size`, every set and every order equally likely.

        Args:
            start: Position of the first word that may be used.
            n: How many, 0 .. `size`.
            size: Bound of the indices, >= 1.

        Returns:
            (int64 array of shape (n,), position after the last word used).

        Example:
            >>> index, position = Words(random.key(0, "demo")).distinct(0, 3, 100)
            >>> len(set(index.tolist())), position > 0
            (3, True)
        """
        if 2 * n >= size:
            # Sorting random words is a random permutation. Words never tie: SplitMix64 is
            # one-to-one in its counter.
            return np.argsort(self.read(start, size))[:n], start + size
        # The first n different values of independent uniform draws favour no set and no order.
        # Words from the last multiple of `size` on would favour small indices: skip them.
        last = (1 << 64) // size * size - 1
        count = n * 5 // 4 + 4
        words = self.read(start, count)[:n]
        if n and words.max() <= last:
            index = words % size
            if len(set(index.tolist())) == n:  # as good as always, in a large store
                return index.view(np.intp), start + count
        drawn: dict[int, None] = {}
        while len(drawn) < n:
            count = (n - len(drawn)) * 5 // 4 + 4
            words = self.read(start, count)
            start += count
            drawn.update(dict.fromkeys((words[words <= last] % size).tolist()))
        return np.fromiter(islice(drawn, n), np.intp, n), start
