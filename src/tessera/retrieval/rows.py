"""The entries of an index, row by row: vectors, ids, namespaces, payloads."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import numpy.typing as npt

from tessera.errors import UnknownNameError
from tessera.retrieval.vectors import Floats

__all__ = ["Rows"]

_ARRAYS = ("vectors", "ids", "spaces", "homes")


@final
class Rows:
    """Arrays that grow by doubling; what was deleted stays as a gap until `compact`.

    Attributes:
        count: Rows in use, gaps included.
        dead: Gaps.
        payloads: `count` of them.

    Args:
        vectors: float32 [n, dim].
        ids: int64 [n], ascending.
        spaces: int64 [n], of each the number of its namespace, >= 0; of a gap -1.
        payloads: n of them.
    """

    def __init__(
        self,
        vectors: Floats,
        ids: npt.NDArray[np.int64],
        spaces: npt.NDArray[np.int64],
        payloads: list[Any],
    ) -> None:
        self._vectors, self._ids, self._spaces = vectors, ids, spaces
        self._homes = np.zeros(len(ids), np.int32)
        self.payloads, self.count, self.dead = payloads, len(ids), 0

    @property
    def vectors(self) -> Floats:
        """float32 [count, dim]."""
        return self._vectors[: self.count]

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """int64 [count], ascending."""
        return self._ids[: self.count]

    @property
    def spaces(self) -> npt.NDArray[np.int64]:
        """int64 [count]; -1: a gap."""
        return self._spaces[: self.count]

    @property
    def homes(self) -> npt.NDArray[np.int32]:
        """int32 [count], of each its list, where there are lists."""
        return self._homes[: self.count]

    def append(
        self, vectors: Floats, ids: npt.NDArray[np.int64], space: int, payloads: list[Any]
    ) -> None:
        """Add rows of one namespace."""
        first, after = self.count, self.count + len(ids)
        if after > len(self._ids):
            size = max(after, 2 * len(self._ids), 256)
            for name in _ARRAYS:
                old = getattr(self, name)
                new = np.zeros((size, *old.shape[1:]), old.dtype)
                new[:first] = old
                setattr(self, f"_{name}", new)
        self._vectors[first:after], self._ids[first:after] = vectors, ids
        self._spaces[first:after] = space
        self.payloads += payloads
        self.count = after

    def find(
        self, ids: npt.NDArray[np.int64], space: int | None
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
        """Where these entries stand, and whether each does (in `space`; None: in any)."""
        at = np.searchsorted(self.ids, ids)
        found = at < self.count
        found[found] = self._ids[at[found]] == ids[found]
        spaces = self._spaces[at[found]]
        found[found] = spaces >= 0 if space is None else spaces == space
        return at, found

    def at(self, ids: list[int], space: int | None) -> npt.NDArray[np.intp]:
        """Where these entries stand.

        Raises:
            UnknownNameError: One does not.
        """
        wanted = np.array(ids, np.int64)
        at, found = self.find(wanted, space)
        if not found.all():
            where = "" if space is None else " in this namespace"
            raise UnknownNameError(
                f"this retrieval.Index: there is no entry {int(wanted[~found][0])}{where}; ids are "
                "those that encode() and add() returned, less what was deleted"
            )
        return at

    def remove(self, at: npt.NDArray[np.intp]) -> None:
        """Make gaps of these rows."""
        self._spaces[at] = -1
        for row in at.tolist():
            self.payloads[row] = None
        self.dead += len(at)

    def compact(self) -> None:
        """Close the gaps."""
        alive = np.flatnonzero(self.spaces >= 0)
        for name in _ARRAYS:
            setattr(self, f"_{name}", getattr(self, name)[alive])
        self.payloads = [self.payloads[row] for row in alive.tolist()]
        self.count, self.dead = len(alive), 0
