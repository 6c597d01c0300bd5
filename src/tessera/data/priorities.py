"""Sums over blocks of 64, from which a row is drawn in proportion to its priority."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from itertools import pairwise
from typing import Any, final

import numpy as np
import numpy.typing as npt

from tessera.data.rows import Index
from tessera.ops import kernels

__all__ = ["BlockSums", "Doubles", "find_in_numpy", "put_in_numpy"]

Doubles = npt.NDArray[np.float64]

_WIDTH = 64
_Address = ctypes.c_char * 0  # its from_buffer is the cheapest way to pass where an array lies


@final
class BlockSums:
    """Weights >= 0 at the places 0 .. size-1, and draws in proportion to them.

    Level 0 holds the weights, every level above the sums of 64 neighbours. A change recomputes the
    sums above it from all 64, so rounding errors do not pile up however long it goes on. numpy does
    it at first, and to the same bits a C kernel once one is compiled (`ops.kernels`).

    Args:
        size: How many places, >= 1.

    Example:
        >>> sums = BlockSums(1000)
        >>> sums.put(np.array([3, 700]), np.array([1.0, 3.0]))
        >>> sums.total, sums.find(np.array([0.5, 1.0, 3.9])).tolist()
        (4.0, [3, 700, 700])
    """

    def __init__(self, size: int) -> None:
        levels: list[Doubles] = []
        while True:
            blocks = -(-size // _WIDTH)
            levels.append(np.zeros(blocks * _WIDTH))
            if blocks == 1:
                break
            size = blocks
        self.__setstate__(levels)

    def __getstate__(self) -> list[Doubles]:
        return self._levels

    def __setstate__(self, levels: list[Doubles]) -> None:
        # Of a copy too, whose arrays lie elsewhere.
        self._levels, self._addresses = levels, _addresses(levels)

    @property
    def total(self) -> float:
        """The sum of all weights."""
        return float(np.add.reduce(self._levels[-1]))

    def put(self, places: Index, weights: Doubles | float) -> None:
        """Set the weights at `places`; of a place named twice, the last counts.

        Raises:
            IndexError: There is no such place; nothing was changed.
        """
        kernel = self._kernel()
        if kernel is None:
            put_in_numpy(self._levels, places, weights)
            return
        if not isinstance(weights, np.ndarray):
            weights = np.full(len(places), weights)
        where = np.ascontiguousarray(places, np.int64)
        given = np.ascontiguousarray(weights, np.float64)
        if where.shape != given.shape or not kernel.tessera_put_weights(
            *(self._addresses, len(self._levels), len(self._levels[0])),
            *(_address(where), _address(given), len(where)),
        ):
            raise IndexError(f"BlockSums has the places 0 .. {len(self._levels[0]) - 1}")

    def put_ring(
        self, positions: Index, weights: Doubles, seen: int, capacity: int
    ) -> tuple[int, float]:
        """Set the weights of rows of a ring, by their stream positions.

        Args:
            positions: int64 [n], n >= 1. Rows that have left the ring are passed over; of a row
                named twice, the last counts.
            weights: float64 [n].
            seen: How many rows came by.
            capacity: Of the ring.

        Returns:
            (How many were set, the largest weight given). (-1, NaN), and nothing is done, if a
            position is not in 0 .. seen - 1 or a weight not finite and > 0.
        """
        kernel = self._kernel()
        if kernel is not None:
            where = np.ascontiguousarray(positions)
            given = np.ascontiguousarray(weights)
            largest = ctypes.c_double(math.nan)
            count = kernel.tessera_put_ring(
                *(self._addresses, len(self._levels), capacity, seen),
                *(_address(where), _address(given), len(where), ctypes.byref(largest)),
            )
            return count, largest.value
        in_range = positions.min() >= 0 and positions.max() < seen
        if not (in_range and weights.min() > 0 and weights.max() < math.inf):
            return -1, math.nan
        fresh = positions >= seen - capacity
        put_in_numpy(self._levels, positions[fresh] % capacity, weights[fresh])
        return int(fresh.sum()), float(weights.max())

    def get(self, places: Index) -> Doubles:
        """The weights at `places`."""
        taken: Doubles = self._levels[0].take(places)
        return taken

    def find(self, masses: Doubles) -> Index:
        """For each mass in [0, total): the place at which the running sum of weights exceeds it."""
        kernel = self._kernel()
        if kernel is None:
            return find_in_numpy(self._levels, masses)
        rest, places = masses.copy(), np.empty(len(masses), np.intp)
        kernel.tessera_find_masses(
            *(self._addresses, len(self._levels), _address(rest), _address(places), len(masses))
        )
        return places

    def _kernel(self) -> ctypes.CDLL | None:
        if len(self._levels) == 1:  # not worth starting a compiler
            return None
        library = kernels.library()
        return library if library is not None and _has_numpys_bits(library) else None


def put_in_numpy(levels: list[Doubles], places: Index, weights: Doubles | float) -> None:
    """`BlockSums.put` without a kernel.

    Example:
        >>> levels = [np.zeros(128), np.zeros(64)]
        >>> put_in_numpy(levels, np.array([1, 100]), 2.0)
        >>> levels[1][:3].tolist()
        [2.0, 2.0, 0.0]
    """
    levels[0][places] = weights
    for below, level in pairwise(levels):
        places = places // _WIDTH  # a few sums twice are cheaper than finding out
        places = np.unique(places) if len(places) > 2 * _WIDTH else places
        level[places] = below.reshape(-1, _WIDTH)[places].sum(axis=1)


def find_in_numpy(levels: list[Doubles], masses: Doubles) -> Index:
    """`BlockSums.find` without a kernel.

    Example:
        >>> find_in_numpy([np.repeat([1.0, 0.0], 32)], np.array([0.0, 2.5])).tolist()
        [0, 2]
    """
    rest, rows = masses, np.arange(len(masses))
    places = np.zeros(len(masses), np.intp)
    for level in reversed(levels):
        block = level.reshape(-1, _WIDTH).take(places, 0)
        running = block.cumsum(axis=1)
        beyond = running > rest[:, None]
        inside = beyond.argmax(axis=1)
        # Rounding may leave a mass at or above the last sum: it belongs to the last weight > 0.
        for row in np.flatnonzero(~beyond[rows, inside]):
            inside[row] = max(np.flatnonzero(block[row] > 0), default=0)
        # Or below none, where it belongs to the first.
        rest = np.maximum(rest - (running[rows, inside] - block[rows, inside]), 0.0)
        places = places * _WIDTH + inside
    return places


def _addresses(levels: list[Doubles]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(levels))(*[level.ctypes.data for level in levels])


def _address(array: npt.NDArray[Any]) -> ctypes.Array[ctypes.c_char]:
    return _Address.from_buffer(array.data)


@cache
def _has_numpys_bits(library: ctypes.CDLL) -> bool:
    """Whether the kernel adds up in the order of this numpy; says how it is called."""
    word, pointer = ctypes.c_int64, ctypes.c_void_p
    library.tessera_put_weights.argtypes = (pointer, word, word, pointer, pointer, word)
    library.tessera_put_weights.restype = library.tessera_put_ring.restype = word
    library.tessera_put_ring.argtypes = (pointer, *(word,) * 3, pointer, pointer, word, pointer)
    library.tessera_find_masses.argtypes = (pointer, word, pointer, pointer, word)
    library.tessera_find_masses.restype = None
    places, levels = np.arange(5000), [np.zeros(n) for n in (5056, 128, 64)]
    weights = np.exp(12 * np.sin(places * 0.7)) * (places % 3 > 0)
    mine = [np.zeros_like(level) for level in levels]
    put_in_numpy(mine, places, weights)
    addresses = _addresses(levels)
    library.tessera_put_weights(
        *(addresses, 3, 5056, places.ctypes.data, weights.ctypes.data, 5000)
    )
    masses = np.linspace(0.0, mine[-1].sum(), 500)
    found, rest = np.empty(500, np.intp), masses.copy()
    library.tessera_find_masses(addresses, 3, rest.ctypes.data, found.ctypes.data, 500)
    agree = all(map(np.array_equal, mine, levels))
    return agree and np.array_equal(found, find_in_numpy(mine, masses))
