"""A replay buffer: a bounded memory of a stream, by one of four policies.

There is no random state. The item at stream position t has the key ``bits(key(seed), t)``, and
samples count the words they use: all is the same wherever the stream was cut or interrupted.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from tessera import random
from tessera.data import checks
from tessera.data.draws import Words
from tessera.data.merge import merged_state
from tessera.data.prioritized import POLICIES, Prioritized, ReplayDraw
from tessera.data.rows import Column, Index, shown
from tessera.errors import InputError, unknown_name

__all__ = ["ReplayBuffer"]


@final
class ReplayBuffer:
    """A bounded memory of a stream.

    The policies, after `seen` rows of which `capacity` fit:

    - "reservoir": every row is held with probability ``min(1, capacity / seen)``, and all sets of
      that size are equally likely. `add` costs O(batch + accepted * log(capacity)).
    - "class_balanced": labels, in the field "y", share the capacity as equally as their numbers
      allow; the rows of one label are a uniform sample of that label's.
    - "ring": the last rows.
    - "prioritized": the last rows, drawn in proportion to priorities (`draw`).

    One thread may add while others sample: each call is done as a whole.

    Args:
        capacity: Most rows to hold, >= 1. Memory for all of them is set aside by the first
            `add`, and the system hands it over as it fills.
        policy: Which rows stay, and how they are drawn.
        seed: Of the choice of items and of the samples; the two do not influence each other.
        fields: Names of what an item consists of, in the order of `add` and `sample`.

    Raises:
        UnknownNameError: No such policy.
        InputError: `capacity` or `fields` is out of range.

    Source:
        Vitter 1985, "Random sampling with a reservoir", ACM TOMS 11(1); as bottom-k sketch:
        Cohen & Kaplan 2007, "Summarizing data using bottom-k sketches", PODC. Class-balanced:
        Chrysakis & Moens 2020, "Online continual learning from imbalanced data", ICML.
        Prioritized: Schaul et al. 2016 (arXiv:1511.05952).

    Example:
        >>> buffer = ReplayBuffer(100, seed=0)
        >>> for step in range(50):
        ...     x, y = torch.full((8, 3), float(step)), torch.full((8,), step)
        ...     x_old, y_old = buffer.sample_like(x, ratio=0.5)
        ...     buffer.add(x, y)
        >>> len(buffer), buffer.seen, x_old.shape, bool((x_old[:, 0] == y_old).all())
        (100, 400, torch.Size([4, 3]), True)
    """

    def __init__(
        self,
        capacity: int,
        policy: str = "reservoir",
        *,
        seed: int = 0,
        fields: Sequence[str] = ("x", "y"),
    ) -> None:
        if policy not in POLICIES:
            raise unknown_name("replay policy", policy, POLICIES)
        labelled = POLICIES[policy].needs_labels
        names = checks.checked_fields(capacity, fields, labelled=labelled)
        self._capacity = int(capacity)
        self._name = policy
        self._seed = int(seed)
        self._fields = names
        self._policy = POLICIES[policy](self._capacity, self._seed)
        self._columns: tuple[Column, ...] = ()
        self._seen = 0
        self._draws = 0
        self._carry = 0.0
        self._sampling = Words(random.key(seed, "sample"))
        self._lock = threading.RLock()

    @property
    def capacity(self) -> int:
        """Most rows it holds."""
        return self._capacity

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of what an item consists of, in the order of `add` and `sample`."""
        return self._fields

    @property
    def seen(self) -> int:
        """How many rows were ever added."""
        return self._seen

    @property
    def nbytes(self) -> int:
        """Bytes set aside for rows and what is known of them; 0 before the first `add`."""
        known = sum(array.nbytes for array in self._policy.slots.values())
        return known + sum(column.store.nbytes for column in self._columns)

    def __len__(self) -> int:
        return min(self._seen, self._capacity)

    def add(self, *values: Tensor) -> None:
        """Show the buffer a batch; it copies the rows that it keeps.

        The first call fixes each field's dtype and row shape. A batch with no rows is allowed.

        Args:
            *values: One tensor a field, in the order of `fields`, each [n, ...] with the same n,
                on any device. Floating values are finite.

        Raises:
            InputError: Another number of fields, dtype or row shape, different n, NaN or
                infinity. The buffer is unchanged.

        Example:
            >>> buffer = ReplayBuffer(10)
            >>> buffer.add(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]))
            >>> len(buffer)
            4
        """
        with self._lock:
            labelled = self._policy.needs_labels
            checks.check_batch(values, self._fields, self._columns, labelled=labelled)
            if not self._columns:
                self._columns = tuple(Column.like(value, self._capacity) for value in values)
                self._policy.reserve()
            labels = None
            if labelled:
                labels = values[self._fields.index("y")].detach().cpu().numpy().astype(np.int64)
            for slots, rows in self._policy.place(self._seen, len(values[0]), labels):
                for column, value in zip(self._columns, values, strict=True):
                    column.put(slots, value, rows)
            self._seen += len(values[0])

    def sample(
        self, n: int, *, device: torch.device | str | None = None, exclude_last: int = 0
    ) -> tuple[Tensor, ...]:
        """`n` different rows, every set of `n` and every order of it equally likely.

        Under "prioritized" the rows are drawn one by one in proportion to their priorities, so one
        may come more than once; `draw` gives their weights too.

        Args:
            n: How many, >= 0. More than there are gives all rows, in random order.
            device: Where to put them; None is the CPU.
            exclude_last: Leave out the last so many rows added: for those who add a batch before
                they sample beside it.

        Returns:
            One tensor [min(n, there are), ...] a field, in the order of `fields`. They share no
            memory with the buffer.

        Raises:
            InputError: The buffer is empty, or `n` or `exclude_last` is negative.

        Example:
            >>> buffer = ReplayBuffer(10)
            >>> buffer.add(torch.rand(4, 2), torch.arange(4))
            >>> x, y = buffer.sample(3)
            >>> x.shape, len(set(y.tolist()))
            (torch.Size([3, 2]), 3)
            >>> sorted(buffer.sample(4, exclude_last=2)[1].tolist())
            [0, 1]
        """
        checks.require_count("sample", "n", n)
        checks.require_count("sample", "exclude_last", exclude_last)
        with self._lock:
            checks.require_rows("sample", len(self))
            rows = self._rows(self._choose(int(n), int(exclude_last)))
        return rows if device is None else tuple(row.to(device) for row in rows)

    def _rows(self, index: Index) -> tuple[Tensor, ...]:
        return tuple(column.rows(index) for column in self._columns)

    def _choose(self, n: int, exclude_last: int) -> Index:
        """The slots of a sample."""
        held, since = len(self), self._seen - exclude_last
        if isinstance(self._policy, Prioritized):
            words = self._sampling.read(self._draws, n)
            self._draws += n
            new = np.arange(max(since, self._seen - held), self._seen) % self._capacity
            return self._policy.choose(words, new)
        # Of a random order of different slots, those that are not too new are in random order.
        wanted = min(n + min(exclude_last, held), held)
        index, self._draws = self._sampling.distinct(self._draws, wanted, held)
        if exclude_last:
            index = index[self._policy.positions(index, self._seen) < since]
        return index[:n]

    def draw(self, n: int, *, beta: float = 0.4) -> ReplayDraw:
        """`n` rows by priority, with replacement: row i with ``P_i = p_i / sum p`` each time.

        Args:
            n: How many, >= 1.
            beta: How far the weights undo the priorities, in [0, 1]: 1 is fully.

        Raises:
            InputError: The policy is another, the buffer is empty, or an argument is out of range.

        Source:
            Schaul et al. 2016, section 3.4 (arXiv:1511.05952).

        Example:
            >>> buffer = ReplayBuffer(10, "prioritized")
            >>> buffer.add(torch.rand(4, 2), torch.arange(4))
            >>> (x, y), positions, weights = buffer.draw(8)
            >>> x.shape, bool((positions == y).all()), weights.min().item()
            (torch.Size([8, 2]), True, 1.0)
            >>> buffer.update_priorities(positions, torch.ones(8))
            8
        """
        policy = self._prioritized("draw")
        if not checks.is_count(n) or n < 1 or not 0 <= beta <= 1:
            raise InputError(f"ReplayBuffer.draw needs n >= 1 and beta in [0, 1], got {n}, {beta}")
        with self._lock:
            checks.require_rows("draw", len(self))
            index = self._choose(int(n), 0)
            positions, weights = policy.positions(index, self._seen), policy.weights(index, beta)
            rows = self._rows(index)
        return ReplayDraw(rows, torch.from_numpy(positions), torch.from_numpy(weights))

    def update_priorities(self, positions: Tensor, priorities: Tensor) -> int:
        """Set how much rows of a draw are wanted, such as ``loss ** 0.6`` of each.

        A row that has left the buffer since is passed over: its slot belongs to another by now.

        Args:
            positions: int64 [n], of `draw`.
            priorities: [n], finite and > 0.

        Returns:
            How many of them are still held.

        Raises:
            InputError: The policy is another, the shapes differ, a position was never added, or a
                priority is not finite and > 0. Nothing was changed.
        """
        policy = self._prioritized("update_priorities")
        with self._lock:
            return policy.prioritize(positions, priorities, self._seen)

    def _prioritized(self, who: str) -> Prioritized:
        if isinstance(self._policy, Prioritized):
            return self._policy
        raise InputError(f"ReplayBuffer.{who} is for 'prioritized', this one is {self._name!r}")

    def sample_like(
        self, x: Tensor, ratio: float = 1.0, *, exclude_last: int = 0
    ) -> tuple[Tensor, ...]:
        """Rows to train on beside a new batch: ``len(x) * ratio`` of them on average.

        What a call rounds away is carried to the next, so a ratio of 0.25 with batches of one
        gives one row in every four calls. Call it before `add`, else the new batch may come back;
        or after `add` with ``exclude_last=len(x)``.

        Args:
            x: The new batch's first field, [n, ...].
            ratio: Replayed rows a new row, finite and >= 0.
            exclude_last: As for `sample`.

        Returns:
            As `sample`, on x's device; a floating first field is cast to x's dtype if that is
            floating too. Zero rows while the buffer is empty: shaped like x for the first field,
            and before the first `add` int64 [0] for the others.

        Raises:
            InputError: `ratio` is negative or not finite, or x has no rows.

        Example:
            >>> x, y = torch.rand(4, 2), torch.tensor([0, 1, 0, 1])
            >>> buffer = ReplayBuffer(10)
            >>> x_old, y_old = buffer.sample_like(x)
            >>> torch.cat([x, x_old]).shape, torch.cat([y, y_old]).dtype
            (torch.Size([4, 2]), torch.int64)
        """
        if not isinstance(x, Tensor) or x.ndim < 1:
            raise InputError(f"ReplayBuffer.sample_like needs a batch x [n, ...], got {shown(x)}")
        checks.require_count("sample_like", "exclude_last", exclude_last)
        with self._lock:
            wanted = self._carry + len(x) * ratio
            if not (math.isfinite(wanted) and ratio >= 0):
                raise InputError(f"ReplayBuffer.sample_like needs a finite ratio >= 0, got {ratio}")
            # The slack lets 10 x 0.1 be one row, though the sum falls short of 1 in binary.
            n = math.floor(wanted + 1e-9)
            self._carry = wanted - n
            if len(self):
                first, *others = self._rows(self._choose(min(n, len(self)), int(exclude_last)))
            elif self._columns:
                first, *others = (column.rows(slice(0, 0)) for column in self._columns)
            else:
                first = x.new_empty((0, *x.shape[1:]))
                others = [torch.empty(0, dtype=torch.int64) for _ in self._fields[1:]]
        floating = first.is_floating_point() and x.is_floating_point()
        first = first.to(x.device, x.dtype if floating else first.dtype)
        return (first, *(other.to(x.device) for other in others))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue bit for bit, as plain values and tensors.

        Example:
            >>> buffer = ReplayBuffer(2)
            >>> buffer.add(torch.zeros(5, 1), torch.arange(5))
            >>> other = ReplayBuffer(2)
            >>> other.load_state_dict(buffer.state_dict())
            >>> bool((other.sample(2)[1] == buffer.sample(2)[1]).all())
            True
        """
        with self._lock:
            held = len(self)
            pairs = zip(self._fields, self._columns, strict=False)
            return {
                **self._settings(),
                "seen": self._seen,
                "draws": self._draws,
                "carry": self._carry,
                "slots": self._policy.known(held),
                "rule": self._policy.rule(),
                "rows": {name: column.rows(slice(0, held)) for name, column in pairs},
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` gave, replacing all that is held.

        Args:
            state: Of a buffer with the same capacity, policy, seed and fields.

        Raises:
            CheckpointError: The state is damaged or of another buffer; this one is unchanged.
        """
        checks.check_state(state, self._settings())
        seen = int(state["seen"])
        held = min(seen, self._capacity)
        policy = POLICIES[self._name](self._capacity, self._seed)
        checks.check_slots(state["slots"], policy, held)
        policy.check(state["slots"], state["rule"], seen)
        rows = [state["rows"][name] for name in self._fields] if state["rows"] else []
        columns = tuple(Column.like(row, self._capacity) for row in rows)
        for column, row in zip(columns, rows, strict=True):
            column.put(slice(0, held), row, slice(0, held))
        if columns:
            policy.load(state["slots"], state["rule"], seen)
        with self._lock:
            self._columns, self._policy, self._seen = columns, policy, seen
            self._draws, self._carry = int(state["draws"]), float(state["carry"])

    @staticmethod
    def merge(buffers: Sequence[ReplayBuffer]) -> ReplayBuffer:
        """The reservoir one buffer would hold that had seen all these streams.

        Exact; a shard met twice counts once. The result may go on adding, and be merged again.

        Args:
            buffers: Reservoirs with one capacity and the same fields, each with a seed of its own.

        Raises:
            InputError: There are none, or they do not fit; the message says how.

        Example:
            >>> shards = [ReplayBuffer(10, seed=rank) for rank in range(2)]
            >>> for rank, shard in enumerate(shards):
            ...     shard.add(torch.rand(30, 2), torch.full((30,), rank))
            >>> both = ReplayBuffer.merge(shards)
            >>> len(both), both.seen
            (10, 60)
        """
        state = merged_state([buffer.state_dict() for buffer in buffers])
        whole = ReplayBuffer(state["capacity"], seed=state["seed"], fields=state["fields"])
        whole.load_state_dict(state)
        return whole

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayBuffer:
        other = ReplayBuffer(self._capacity, self._name, seed=self._seed, fields=self._fields)
        other.load_state_dict(self.state_dict())
        return other

    def _settings(self) -> dict[str, Any]:
        return {
            "version": checks.STATE_VERSION,
            "policy": self._name,
            "capacity": self._capacity,
            "seed": self._seed,
            "fields": list(self._fields),
        }
