"""The policy that draws rows in proportion to their priorities; all policies by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from tessera.data.draws import UInt64s
from tessera.data.policies import (
    ClassBalanced,
    Int64s,
    Moves,
    Policy,
    Reservoir,
    Ring,
    ring_moves,
    ring_positions,
)
from tessera.data.priorities import BlockSums, Doubles
from tessera.data.rows import Index, shown
from tessera.errors import CheckpointError, InputError

__all__ = ["POLICIES", "Prioritized", "ReplayDraw"]


class ReplayDraw(NamedTuple):
    """Rows drawn by priority, and what is needed to correct for it and to answer.

    Attributes:
        values: One tensor [n, ...] a field.
        positions: int64 [n]: where in the stream each row was; what `update_priorities` takes.
        weights: float64 [n] in (0, 1]: ``(N P)^-beta`` over the largest of this draw.

    Example:
        >>> draw = ReplayDraw((torch.ones(1, 2),), torch.tensor([7]), torch.ones(1))
        >>> (x,), positions, weights = draw
        >>> positions.tolist()
        [7]
    """

    values: tuple[Tensor, ...]
    positions: Tensor
    weights: Tensor


@final
class Prioritized(Policy):
    """The last rows, each with a priority; a new row gets the largest one ever given."""

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity, seed)
        self._largest = 1.0
        self.sums = BlockSums(1)

    def reserve(self) -> None:
        """Allocate the sums."""
        self.sums = BlockSums(self.capacity)

    def place(self, seen: int, count: int, labels: Int64s | None) -> Moves:
        """As a ring; every new row gets the largest priority."""
        moves = ring_moves(seen, count, self.capacity)
        for slots, _ in moves:
            assert isinstance(slots, slice)
            self.sums.put(np.arange(slots.start, slots.stop), self._largest)
        return moves

    def positions(self, index: Index, seen: int) -> Int64s:
        """Of the rows in the slots `index`."""
        return ring_positions(index, seen, self.capacity)

    def choose(self, words: UInt64s, without: Index) -> Index:
        """A slot for each random word, in proportion to the priorities, never one of `without`."""
        kept = self.sums.get(without)
        if len(without):
            self.sums.put(without, 0.0)
        total = self.sums.total
        chances = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        chosen = self.sums.find(chances * total) if total > 0 else np.empty(0, np.intp)
        if len(without):
            self.sums.put(without, kept)
        return chosen

    def weights(self, index: Index, beta: float) -> Doubles:
        """``(N P)^-beta`` over the largest of these slots."""
        priority = self.sums.get(index)
        corrected: Doubles = (priority / priority.min()) ** -beta
        return corrected

    def prioritize(self, positions: Tensor, priorities: Tensor, seen: int) -> int:
        """Give the rows at these stream positions a priority; how many are still held.

        Raises:
            InputError: As `ReplayBuffer.update_priorities`.
        """
        single = priorities.dtype is torch.float32  # which numpy widens in less time
        given = (priorities if single else priorities.double()).numpy(force=True)
        given = given.astype(np.float64, copy=False)
        where = positions.numpy(force=True)
        who = "ReplayBuffer.update_priorities"
        if given.ndim != 1 or where.shape != given.shape or where.dtype != np.int64:
            raise InputError(
                f"{who} needs int64 positions [n] and priorities [n], got {shown(positions)} and "
                f"{shown(priorities)}"
            )
        if not len(given):
            return 0
        count, largest = self.sums.put_ring(where, given, seen, self.capacity)
        if count < 0:
            low, high = given.min(), given.max()
            if not (low > 0 and high < math.inf):
                raise InputError(
                    f"{who} needs finite priorities > 0; add a small number, as in loss + 1e-6 "
                    f"(the smallest is {low}, the largest {high})"
                )
            raise InputError(
                f"{who}: positions lie in 0 .. {seen - 1}, got {where.min()} .. {where.max()}; "
                "give those of draw()"
            )
        self._largest = max(self._largest, largest)
        return count

    def known(self, held: int) -> dict[str, Tensor]:
        """The priorities of the first `held` slots."""
        return {"priorities": torch.from_numpy(self.sums.get(np.arange(held)).copy())}

    def at(self, index: Index) -> dict[str, Doubles]:
        """The priorities of the slots `index`."""
        return {"priorities": self.sums.get(index)}

    def rule(self) -> dict[str, Any]:
        """The largest priority ever given."""
        return {"largest": self._largest}

    def check(self, slots: Mapping[str, Tensor], rule: Mapping[str, Any], seen: int) -> None:
        """Refuse priorities that are not finite and > 0."""
        super().check(slots, rule, seen)
        given = slots["priorities"]
        if not bool((given.isfinite() & (given > 0)).all()):
            raise CheckpointError("damaged replay state: a priority is not finite and > 0")

    def load(self, slots: Mapping[str, Tensor], rule: Mapping[str, Any], seen: int) -> None:
        """Take over checked priorities."""
        self.reserve()
        given = slots["priorities"].cpu().numpy()
        self.sums.put(np.arange(len(given)), given)
        self._largest = float(rule["largest"])


POLICIES: dict[str, type[Policy]] = {
    "reservoir": Reservoir,
    "ring": Ring,
    "class_balanced": ClassBalanced,
    "prioritized": Prioritized,
}
