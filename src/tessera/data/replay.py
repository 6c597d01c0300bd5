"""A replay buffer: a bounded memory of a stream, by one of four policies.

There is no random state. The item at stream position t has the key ``bits(key(seed), t)``, and
samples count the words they use: all is the same wherever the stream was cut or interrupted.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, final

import torch
from torch import Tensor

from tessera.data import checks
from tessera.data.durable import Durable
from tessera.data.memory import Memory, Volatile
from tessera.data.merge import merged_state
from tessera.data.prioritized import POLICIES, Prioritized, ReplayDraw
from tessera.data.rows import shown
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
        path: A folder, made if missing, that holds all of it too: a batch is in it when `add`
            returns, and a buffer built again with this path, after `close` or a crash, goes on bit
            for bit from `seen`. None keeps it in memory only.

    Raises:
        UnknownNameError: No such policy.
        InputError: `capacity` or `fields` is out of range.
        CheckpointError: The folder is damaged, of other settings, or no replay store.
        StorageError: It cannot be written, or has a writer already.

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
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise unknown_name("replay policy", policy, POLICIES)
        labelled = POLICIES[policy].needs_labels
        names = checks.checked_fields(capacity, fields, labelled=labelled)
        self._settings = {
            "version": checks.STATE_VERSION,
            "policy": policy,
            "capacity": int(capacity),
            "seed": int(seed),
            "fields": list(names),
        }
        self._lock: AbstractContextManager[object] = threading.RLock()
        self._keeper: Volatile | Durable = (
            Volatile(Memory(self._settings)) if path is None else Durable(path, self._settings)
        )

    @property
    def capacity(self) -> int:
        """Most rows it holds."""
        return self._keeper.memory.capacity

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of what an item consists of, in the order of `add` and `sample`."""
        return self._keeper.memory.fields

    @property
    def seen(self) -> int:
        """How many rows were ever added."""
        return self._keeper.memory.seen

    @property
    def nbytes(self) -> int:
        """Bytes set aside for rows and what is known of them; 0 before the first `add`."""
        return self._keeper.memory.nbytes

    def __len__(self) -> int:
        return self._keeper.memory.held

    def add(self, *values: Tensor) -> None:
        """Show the buffer a batch; it copies the rows that it keeps.

        The first call fixes each field's dtype and row shape. A batch with no rows is allowed.

        Args:
            *values: One tensor a field, in the order of `fields`, each [n, ...] with the same n,
                on any device. Floating values are finite.

        Raises:
            InputError: Another number of fields, dtype or row shape, different n, NaN or
                infinity. The buffer is unchanged.
            StorageError: With `path`: the folder could not take it, because the disk is full
                perhaps. The buffer is as it was; add the batch again when there is room.

        Example:
            >>> buffer = ReplayBuffer(10)
            >>> buffer.add(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]))
            >>> len(buffer)
            4
        """
        with self._lock:
            memory = self._keeper.memory
            labelled = memory.policy.needs_labels
            checks.check_batch(values, memory.fields, memory.columns, labelled=labelled)
            self._keeper.put(values)

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
            memory = self._keeper.memory
            rows = memory.rows(memory.choose(int(n), int(exclude_last)))
        return rows if device is None else tuple(row.to(device) for row in rows)

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
        self._prioritized("draw")
        if not checks.is_count(n) or n < 1 or not 0 <= beta <= 1:
            raise InputError(f"ReplayBuffer.draw needs n >= 1 and beta in [0, 1], got {n}, {beta}")
        with self._lock:
            checks.require_rows("draw", len(self))
            policy, memory = self._prioritized("draw"), self._keeper.memory
            index = memory.choose(int(n), 0)
            positions, weights = policy.positions(index, memory.seen), policy.weights(index, beta)
            rows = memory.rows(index)
        return ReplayDraw(rows, torch.from_numpy(positions), torch.from_numpy(weights))

    def update_priorities(self, positions: Tensor, priorities: Tensor) -> int:
        """Set how much rows of a draw are wanted, such as ``loss ** 0.6`` of each.

        A row that has left the buffer since is passed over: its slot belongs to another by now.
        With `path`, the next `add`, `flush` or `close` records it.

        Args:
            positions: int64 [n], of `draw`.
            priorities: [n], finite and > 0.

        Returns:
            How many of them are still held.

        Raises:
            InputError: The policy is another, the shapes differ, a position was never added, or a
                priority is not finite and > 0. Nothing was changed.
        """
        with self._lock:
            self._prioritized("update_priorities")
            return self._keeper.prioritize(positions, priorities)

    def _prioritized(self, who: str) -> Prioritized:
        policy = self._keeper.memory.policy
        if isinstance(policy, Prioritized):
            return policy
        name = self._settings["policy"]
        raise InputError(f"ReplayBuffer.{who} is for 'prioritized', this one is {name!r}")

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
            memory = self._keeper.memory
            n = min(memory.share(len(x), ratio), memory.held)
            if memory.held:
                first, *others = memory.rows(memory.choose(n, int(exclude_last)))
            elif memory.columns:
                first, *others = memory.rows(slice(0, 0))
            else:
                first = x.new_empty((0, *x.shape[1:]))
                others = [torch.empty(0, dtype=torch.int64) for _ in memory.fields[1:]]
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
            return self._keeper.memory.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` gave, replacing all that is held.

        Args:
            state: Of a buffer with the same capacity, policy, seed and fields.

        Raises:
            CheckpointError: The state is damaged or of another buffer; this one is unchanged.
        """
        memory = Memory.of(state, self._settings)
        with self._lock:
            self._keeper.replace(memory)

    def clear(self) -> None:
        """Hold nothing, as when it was built: for a world that is gone."""
        with self._lock:
            self._keeper.replace(Memory(self._settings))

    def flush(self) -> None:
        """Have the disk hold, with `path`, what was added so far: for power cuts.

        Raises:
            StorageError: It could not. What was added is there as long as the machine is.
        """
        with self._lock:
            self._keeper.flush()

    def close(self) -> None:
        """Flush, and let another process write to the folder; only `len` and `seen` remain.

        Raises:
            StorageError: It could not be flushed; it is closed nevertheless.
        """
        if isinstance(self._lock, _Shut):
            return
        with self._lock:
            self._lock = _Shut()
            self._keeper.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
        state = self.state_dict()
        other = ReplayBuffer(
            state["capacity"], state["policy"], seed=state["seed"], fields=state["fields"]
        )
        other.load_state_dict(state)
        return other


@final
class _Shut:
    """The lock of a closed buffer: lets nobody in."""

    def __enter__(self) -> None:
        raise InputError("this ReplayBuffer was closed; build it again, with the same path")

    def __exit__(self, *error: object) -> None:
        """Never reached."""
