"""Sums over blocks of 64, from which a row is drawn in proportion to its priority."""

from __future__ import annotations

from typing import final

import numpy as np
import numpy.typing as npt

from tessera.data.rows import Index

__all__ = ["BlockSums", "Doubles"]

Doubles = npt.NDArray[np.float64]

_WIDTH = 64


@final
class BlockSums:
    """Weights >= 0 at the places 0 .. size-1, and draws in proportion to them.

    Level 0 holds the weights, every level above the sums of 64 neighbours. A change recomputes the
    sums above it from all 64, so rounding errors do not pile up however long it goes on.

    Args:
        size: How many places, >= 1.

    Example:
        >>> sums = BlockSums(1000)
        >>> sums.put(np.array([3, 700]), np.array([1.0, 3.0]))
        >>> sums.total, sums.find(np.array([0.5, 1.0, 3.9])).tolist()
        (4.0, [3, 700, 700])
    """

    def __init__(self, size: int) -> None:
        self._levels: list[Doubles] = []
        while True:
            blocks = -(-size // _WIDTH)
            self._levels.append(np.zeros(blocks * _WIDTH))
            if blocks == 1:
                break
            size = blocks

    @property
    def total(self) -> float:
        """The sum of all weights."""
        return float(self._levels[-1].sum())

    def put(self, places: Index, weights: Doubles | float) -> None:
        """Set the weights at `places`, which are different."""
        self._levels[0][places] = weights
        for below, level in zip(self._levels, self._levels[1:], strict=False):
            places = places // _WIDTH  # a few sums twice are cheaper than finding out
            places = np.unique(places) if len(places) > 2 * _WIDTH else places
            level[places] = below.reshape(-1, _WIDTH)[places].sum(axis=1)

    def get(self, places: Index) -> Doubles:
        """The weights at `places`."""
        taken: Doubles = self._levels[0][places]
        return taken

    def find(self, masses: Doubles) -> Index:
        """For each mass in [0, total): the place at which the running sum of weights exceeds it."""
        places = np.zeros(len(masses), np.intp)
        rest = masses.copy()
        for level in reversed(self._levels):
            block = level.reshape(-1, _WIDTH)[places]
            running = block.cumsum(axis=1)
            inside = (running <= rest[:, None]).sum(axis=1)
            # Rounding may leave a mass at or above the last sum: it belongs to the last weight > 0.
            last = _WIDTH - 1 - (block > 0)[:, ::-1].argmax(axis=1)
            inside = np.minimum(inside, last)
            rows = np.arange(len(rest))
            rest = rest - (running[rows, inside] - block[rows, inside])
            places = places * _WIDTH + inside
        return places
