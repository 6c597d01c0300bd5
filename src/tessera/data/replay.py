"""A replay buffer that holds an exact uniform sample of everything it has seen.

There is no random state. The item at stream position t has the key ``bits(key(seed), t)``, and the
buffer holds the `capacity` items with the smallest keys: contents and layout are a function of
the stream alone, however it was cut into batches and wherever it was interrupted.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from tessera import random
from tessera.data.draws import UInt64s, Words
from tessera.data.rows import Column, Index, Place, row_problem, shown
from tessera.errors import CheckpointError, InputError, unknown_name

__all__ = ["ReplayBuffer"]

_POLICIES = ("reservoir",)
_STATE_VERSION = 1
_STATE_NAMES = {
    *("version", "policy", "capacity", "seed", "fields"),
    *("seen", "draws", "carry", "keys", "rows"),
}


@final
class ReplayBuffer:
    """A bounded memory of a stream, in which every item seen is equally likely to be.

    Each of the `seen` items is held with probability ``min(1, capacity / seen)``, and all sets of
    that size are equally likely. `add` costs O(batch + accepted * log(capacity)).

    Args:
        capacity: Most rows to hold, >= 1. Memory for all of them is set aside by the first
            `add`, and the system hands it over as it fills.
        policy: Which items stay: "reservoir".
        seed: Of the choice of items and of the samples; the two do not influence each other.
        fields: Names of what an item consists of, in the order of `add` and `sample`.

    Raises:
        UnknownNameError: No such policy.
        InputError: `capacity` or `fields` is out of range.

    Source:
        Vitter 1985, "Random sampling with a reservoir", ACM TOMS 11(1); as bottom-k sketch:
        Cohen & Kaplan 2007, "Summarizing data using bottom-k sketches", PODC.

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
        if policy not in _POLICIES:
            raise unknown_name("replay policy", policy, _POLICIES)
        if not _is_count(capacity) or capacity < 1:
            raise InputError(f"ReplayBuffer needs a whole capacity >= 1, got {capacity!r}")
        names = () if isinstance(fields, str) else tuple(fields)
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"ReplayBuffer needs different names as fields, like ('x', 'y'), got {fields!r}"
            )
        self._capacity = int(capacity)
        self._policy = policy
        self._seed = int(seed)
        self._fields = names
        self._columns: tuple[Column, ...] = ()
        self._keys: UInt64s = np.empty(0, np.uint64)
        self._heap: list[int] = []
        self._seen = 0
        self._draws = 0
        self._carry = 0.0
        self._arrivals = Words(random.key(seed, "replay"))
        self._sampling = Words(random.key(seed, "sample"))

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
        """Bytes set aside for rows and their keys; 0 before the first `add`."""
        return self._keys.nbytes + sum(column.store.nbytes for column in self._columns)

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
        self._check(values)
        columns = self._columns or tuple(Column.like(value, self._capacity) for value in values)
        if not self._columns:
            self._columns, self._keys = columns, np.empty(self._capacity, np.uint64)
        held, count = len(self), len(values[0])
        keys = self._arrivals.read(self._seen, count)
        free = min(count, self._capacity - held)
        if free:
            self._put(slice(held, held + free), values, keys, slice(0, free))
        if free < count and (taken := self._take_over(keys, free)):
            self._put(taken[0], values, keys, taken[1])
        self._seen += count

    def sample(self, n: int, *, device: torch.device | str | None = None) -> tuple[Tensor, ...]:
        """`n` different rows, every set of `n` and every order of it equally likely.

        Args:
            n: How many, >= 0. More than `len(self)` gives all rows, in random order.
            device: Where to put them; None is the CPU.

        Returns:
            One tensor [min(n, len), ...] a field, in the order of `fields`. They share no memory
            with the buffer.

        Raises:
            InputError: The buffer is empty, or `n` is negative.

        Example:
            >>> buffer = ReplayBuffer(10)
            >>> buffer.add(torch.rand(4, 2), torch.arange(4))
            >>> x, y = buffer.sample(3)
            >>> x.shape, len(set(y.tolist()))
            (torch.Size([3, 2]), 3)
        """
        if not _is_count(n):
            raise InputError(f"ReplayBuffer.sample needs a whole n >= 0, got {n!r}")
        if not len(self):
            raise InputError(
                "ReplayBuffer.sample has nothing to draw from: add() a batch first, or call "
                "sample_like(x), which gives zero rows as long as the buffer is empty"
            )
        index, self._draws = self._sampling.distinct(self._draws, min(int(n), len(self)), len(self))
        rows = tuple(column.rows(index) for column in self._columns)
        return rows if device is None else tuple(row.to(device) for row in rows)

    def sample_like(self, x: Tensor, ratio: float = 1.0) -> tuple[Tensor, ...]:
        """Rows to train on beside a new batch: ``len(x) * ratio`` of them on average.

        What a call rounds away is carried to the next, so a ratio of 0.25 with batches of one
        gives one row in every four calls. Call it before `add`, else the new batch may come back.

        Args:
            x: The new batch's first field, [n, ...].
            ratio: Replayed rows a new row, finite and >= 0.

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
        wanted = self._carry + len(x) * ratio
        if not (math.isfinite(wanted) and ratio >= 0):
            raise InputError(f"ReplayBuffer.sample_like needs a finite ratio >= 0, got {ratio}")
        # The slack lets 10 x 0.1 be one row, though the sum falls short of 1 in binary.
        n = math.floor(wanted + 1e-9)
        self._carry = wanted - n
        if len(self):
            first, *others = self.sample(min(n, len(self)))
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
        held = slice(0, len(self))
        pairs = zip(self._fields, self._columns, strict=False)
        return {
            **self._settings(),
            "seen": self._seen,
            "draws": self._draws,
            "carry": self._carry,
            "keys": torch.from_numpy(self._keys[held].view(np.int64).copy()),
            "rows": {name: column.rows(held) for name, column in pairs},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` gave, replacing all that is held.

        Args:
            state: Of a buffer with the same capacity, policy, seed and fields.

        Raises:
            CheckpointError: The state is damaged or of another buffer; this one is unchanged.
        """
        _check_state(state, self._settings())
        held = min(state["seen"], self._capacity)
        rows = [state["rows"][name] for name in self._fields] if state["rows"] else []
        columns = tuple(Column.like(row, self._capacity) for row in rows)
        for column, row in zip(columns, rows, strict=True):
            column.put(slice(0, held), row, slice(0, held))
        keys = np.empty(self._capacity if columns else 0, np.uint64)
        keys[:held] = state["keys"].cpu().numpy().view(np.uint64)
        self._columns, self._keys, self._heap = columns, keys, []
        self._seen, self._draws = int(state["seen"]), int(state["draws"])
        self._carry = float(state["carry"])

    def _settings(self) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION,
            "policy": self._policy,
            "capacity": self._capacity,
            "seed": self._seed,
            "fields": list(self._fields),
        }

    def _check(self, values: tuple[Tensor, ...]) -> None:
        if len(values) != len(self._fields):
            raise self._refusal(
                f"needs {len(self._fields)} tensors, got {len(values)}; "
                "other names are given by ReplayBuffer(..., fields=(...))"
            )
        for name, value in zip(self._fields, values, strict=True):
            if problem := row_problem(value):
                raise self._refusal(f"cannot keep {name}: it {problem}")
            if len(value) != len(values[0]):
                sizes = ", ".join(str(len(value)) for value in values)
                raise self._refusal(f"needs as many rows in each, got {sizes}")
        for name, value, column in zip(self._fields, values, self._columns, strict=False):
            if value.dtype != column.dtype or value.shape[1:] != column.row_shape:
                raise self._refusal(
                    f"got {name} {shown(value)}, but the buffer holds rows of {column.dtype} "
                    f"{list(column.row_shape)} since its first add; convert it, or start another"
                )

    def _refusal(self, why: str) -> InputError:
        return InputError(f"ReplayBuffer.add({', '.join(self._fields)}) {why}")

    def _put(self, slots: Place, values: tuple[Tensor, ...], keys: UInt64s, source: Place) -> None:
        for column, value in zip(self._columns, values, strict=True):
            column.put(slots, value, source)
        self._keys[slots] = keys[source]

    def _take_over(self, keys: UInt64s, first: int) -> tuple[Index, Index] | None:
        """The slots that rows `first`, `first + 1`, ... take over, and the row each ends with.

        One at a time, as the stream came: a row with a smaller key than the largest held takes
        that one's slot, and the next row meets the new largest. Each slot is named once, with
        its last row, so the rows can be written in any order.
        """
        width = self._capacity.bit_length()
        if not self._heap:
            # heapq puts the smallest on top, we need the largest key there: invert the bits.
            # Packing the slot below them makes an entry one integer; keys never tie.
            inverse = (~self._keys).tolist()
            self._heap = [key << width | slot for slot, key in enumerate(inverse)]
            heapq.heapify(self._heap)
        heap, slot_bits = self._heap, (1 << width) - 1
        inverted = ~keys[first:]
        hopeful = np.flatnonzero(inverted > heap[0] >> width)
        if not len(hopeful):
            return None
        winners: dict[int, int] = {}
        for row, key in zip(hopeful.tolist(), inverted[hopeful].tolist(), strict=True):
            entry = key << width
            if entry > heap[0]:  # The top has risen since `hopeful` was computed.
                slot = heap[0] & slot_bits
                heapq.heapreplace(heap, entry | slot)
                winners[slot] = first + row
        count = len(winners)
        return np.fromiter(winners, np.intp, count), np.fromiter(winners.values(), np.intp, count)


def _is_count(value: object) -> bool:
    # Below 2**62: beyond it a position would not fit numpy's integers.
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < 1 << 62


def _check_state(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping) or set(state) != _STATE_NAMES:
        got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"a replay state has the entries {sorted(_STATE_NAMES)}, got {got}; "
            "give what ReplayBuffer.state_dict() returned"
        )
    for name, own in settings.items():
        saved = list(state[name]) if isinstance(state[name], tuple) else state[name]
        if type(saved) is not type(own) or saved != own:
            raise CheckpointError(
                f"this replay state was saved with {name}={saved!r}, the buffer that loads it has "
                f"{name}={own!r}; build the ReplayBuffer as the saved one was"
            )
    seen, draws, carry = state["seen"], state["draws"], state["carry"]
    if not _is_count(seen) or not _is_count(draws):
        raise CheckpointError(f"damaged replay state: seen={seen!r}, draws={draws!r}")
    if not isinstance(carry, (int, float)) or not -1e-6 < carry < 1:
        raise CheckpointError(f"damaged replay state: carry={carry!r} is not in [0, 1)")
    held, keys, rows = min(seen, settings["capacity"]), state["keys"], state["rows"]
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64 or keys.shape != (held,):
        raise CheckpointError(
            f"damaged replay state: keys must be int64 [{held}], got {shown(keys)}"
        )
    if len(np.unique(keys.cpu().numpy())) < held:
        raise CheckpointError("damaged replay state: two rows have the same key")
    if not isinstance(rows, Mapping) or ((rows or held) and set(rows) != set(settings["fields"])):
        raise CheckpointError(f"damaged replay state: rows must hold {settings['fields']}")
    for name, value in rows.items():
        problem = row_problem(value)
        if problem is None and len(value) != held:
            problem = f"has {len(value)} rows, the buffer held {held}"
        if problem:
            raise CheckpointError(f"damaged replay state: {name} {problem}")
