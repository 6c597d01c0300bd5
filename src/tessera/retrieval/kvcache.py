"""What was computed for an entry of an index, kept as long as it is still true."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from tessera.errors import InputError
from tessera.retrieval.index import Index

__all__ = ["CacheStats", "KVCache"]

Binding = tuple[str, str]  # hash of the base, hash of the adapter
Compute = Callable[[list[Any]], Sequence[Any]]


class Adapter(Protocol):
    """What a value depends on beside the base: an `arch.Delta`, or anything with these two."""

    @property
    def hash(self) -> str:
        """Of the content, as it is now."""
        ...

    @property
    def base_hash(self) -> str:
        """Of the model it belongs to; "": not known."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CacheStats:
    """Counts since the cache was made, and what it holds now.

    Attributes:
        hits: Values found.
        misses: Values asked for and not found, those no longer true included.
        evictions: Values that made room for others.
        stale: Values dropped because the adapter, the base or the entry was no longer the same.
        refused: Values larger than the capacity, which were not kept.
        bytes: Of the values held now.
        entries: Their number.

    Example:
        >>> stats = CacheStats(hits=3, misses=1)
        >>> stats.hits / (stats.hits + stats.misses)
        0.75
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    stale: int = 0
    refused: int = 0
    bytes: int = 0
    entries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Held:
    value: Any
    bytes: int
    binding: Binding


@final
class _Tenant:
    """One namespace: its values, least recently used first, and its counts."""

    def __init__(self) -> None:
        self.held: OrderedDict[int, _Held] = OrderedDict()
        self.counts = dict.fromkeys(CacheStats.__dataclass_fields__, 0)

    def drop(self, entry: int, why: str) -> None:
        self.counts["bytes"] -= self.held.pop(entry).bytes
        self.counts[why] += 1


@final
class _Flight:
    """A value that one thread computes and others wait for; None at the end: it failed."""

    def __init__(self) -> None:
        self.landed = threading.Event()
        self.held: _Held | None = None


@final
class KVCache:
    """Tensors computed for entries of an index: encoder states, prefix keys and values, prompts.

    A value is bound to the entry, to the base model's hash, and to the adapter's content hash. It
    is found only while all three are the same: after one more step of the adapter, with another
    base, or once the entry is deleted, it is a miss and is dropped. Each namespace has room of its
    own, `capacity_bytes`, where the least recently used value goes first; nothing that one
    namespace does shows in another. A value that is larger than the capacity is not kept.

    A value is a tensor, or a tuple, list or dict of values. What goes in is copied and what comes
    out is a copy, both without gradient: nobody changes what is held. Any number of threads.

    Args:
        index: Whose entries the values are for.
        adapter: What they depend on beside the base, e.g. an `arch.Delta`; None: the base alone.
            Its `hash` is read at each call, which costs 0.2 ms for a LoRA of 300 kB.
        base_hash: Of the base model, ``arch.base_hash(model)``; "": the adapter's.
        capacity_bytes: For each namespace, >= 1.

    Raises:
        InputError: An argument is out of range, or the adapter is of another base.

    Example:
        >>> index = Index(dim=2)
        >>> ids = index.add(torch.eye(2), ["a passage", "another"])
        >>> cache = KVCache(index, base_hash="5eed", capacity_bytes=1 << 20)
        >>> encode = lambda passages: [torch.full((3,), float(len(p))) for p in passages]
        >>> [state] = cache.get_or_compute([ids[0]], encode)
        >>> state, torch.equal(cache.get(ids[0]), state)
        (tensor([9., 9., 9.]), True)
        >>> index.delete(ids)
        >>> cache.get(ids[0]), cache.stats().stale
        (None, 1)
    """

    def __init__(
        self,
        index: Index,
        *,
        adapter: Adapter | None = None,
        base_hash: str = "",
        capacity_bytes: int = 1 << 28,
    ) -> None:
        if isinstance(capacity_bytes, bool) or not isinstance(capacity_bytes, int):
            raise InputError(f"KVCache needs whole capacity_bytes, got {capacity_bytes!r}")
        if capacity_bytes < 1:
            raise InputError(f"KVCache needs capacity_bytes >= 1, got {capacity_bytes}")
        self._index, self._capacity = index, capacity_bytes
        self._lock = threading.Lock()  # taken before the index's, never after
        self._tenants: dict[str, _Tenant] = {}
        self._flights: dict[tuple[str, int, Binding], _Flight] = {}
        self._computing = threading.local()
        self._deletions = index.deletions
        self.bind(adapter, base_hash=base_hash)

    def bind(self, adapter: Adapter | None, *, base_hash: str = "") -> None:
        """From now on the values are this adapter's, on this base; those of others are misses.

        Raises:
            InputError: The adapter is of another base, or has no hash. Nothing changed.
        """
        of_adapter = ""
        if adapter is not None:
            if not all(isinstance(getattr(adapter, n, None), str) for n in ("hash", "base_hash")):
                raise InputError(
                    f"KVCache needs an adapter with .hash and .base_hash, as an arch.Delta has "
                    f"them, got {type(adapter).__name__}"
                )
            of_adapter = adapter.base_hash
        if base_hash and of_adapter and base_hash != of_adapter:
            raise InputError(
                f"KVCache: the adapter is of the base {of_adapter[:12]}..., the values of "
                f"{base_hash[:12]}...; leave base_hash away to take the adapter's"
            )
        self._bound = (adapter, base_hash)  # in one step: other threads read it

    def _binding(self) -> Binding:
        adapter, base_hash = self._bound
        if adapter is None:
            return base_hash, ""
        return base_hash or adapter.base_hash, adapter.hash

    def get(self, entry: int, *, namespace: str = "") -> Any | None:
        """The value, or None where there is none that is still true.

        Args:
            entry: Id in the index.
            namespace: Whose it is; another's values are not found.
        """
        binding = self._binding()
        with self._lock:
            held = self._look(namespace, int(entry), binding)
        return None if held is None else _copy(held.value, "")[0]

    def put(self, entry: int, value: Any, *, namespace: str = "") -> bool:
        """Keep a value, computed with the adapter as it is now.

        Args:
            entry: Id in the index.
            value: Tensor, or tuple, list or dict of such.
            namespace: The entry's.

        Returns:
            Whether it was kept: it is not if it is larger than the capacity.

        Raises:
            UnknownNameError: The namespace has no such entry.
            InputError: The value is something else. Nothing changed.
        """
        binding = self._binding()
        copied, size = _copy(value, f"the value of entry {entry}")
        with self._lock:
            self._index.payloads([entry], namespace=namespace)
            return self._keep(
                namespace, int(entry), _Held(value=copied, bytes=size, binding=binding)
            )

    def get_or_compute(
        self, entries: Iterable[int] | Tensor, compute: Compute, *, namespace: str = ""
    ) -> list[Any]:
        """The values of several entries; `compute` makes those that are missing, in one call.

        Threads that miss the same value at the same time get it from one computation. If the
        adapter changes meanwhile, what was computed is returned and not kept.

        Args:
            entries: Ids, such as `Hits.ids`.
            compute: From the payloads of the missing entries to a value each. It may not ask this
                cache.
            namespace: The entries'.

        Returns:
            A value each, in the order of `entries`: copies, without gradient.

        Raises:
            UnknownNameError: The namespace has no such entry. Nothing was computed.
            InputError: `compute` gave something else than a value each, or asked the cache.
        """
        if getattr(self._computing, "now", False):
            raise InputError(
                "KVCache.get_or_compute: the function that computes values asked the cache for "
                "some, which could wait for itself; ask before, and pass them in"
            )
        given = entries.reshape(-1).tolist() if isinstance(entries, Tensor) else entries
        wanted = [int(entry) for entry in given]
        payloads = dict(zip(wanted, self._index.payloads(wanted, namespace=namespace), strict=True))
        found: dict[int, _Held] = {}
        while missing := [entry for entry in payloads if entry not in found]:
            binding = self._binding()
            mine: dict[int, _Flight] = {}
            others: dict[int, _Flight] = {}
            with self._lock:
                for entry in missing:
                    held = self._look(namespace, entry, binding)
                    flight = self._flights.get((namespace, entry, binding))
                    if held is not None:
                        found[entry] = held
                    elif flight is not None:
                        others[entry] = flight
                    else:
                        mine[entry] = self._flights[namespace, entry, binding] = _Flight()
            # First what others may wait for, then what this one waits for: no circle.
            if mine:
                self._fly(namespace, binding, mine, payloads, compute)
            for entry, flight in (mine | others).items():
                flight.landed.wait()
                if flight.held is not None:  # else it failed in another thread: once more, here
                    found[entry] = flight.held
        return [_copy(found[entry].value, "")[0] for entry in wanted]

    def _fly(
        self,
        namespace: str,
        binding: Binding,
        flights: dict[int, _Flight],
        payloads: dict[int, Any],
        compute: Compute,
    ) -> None:
        """Compute the values of these flights, keep what is still true, and let them land."""
        try:
            self._computing.now = True
            try:
                values = compute([payloads[entry] for entry in flights])
            finally:
                self._computing.now = False
            if not isinstance(values, Sequence | Tensor) or len(values) != len(flights):
                got = len(values) if isinstance(values, Sequence | Tensor) else type(values)
                raise InputError(
                    f"KVCache.get_or_compute: compute must give a value for each of {len(flights)} "
                    f"payloads, got {got}"
                )
            copies = [
                _copy(value, f"the computed value of entry {entry}")
                for entry, value in zip(flights, values, strict=True)
            ]
            made = {
                entry: _Held(value=value, bytes=size, binding=binding)
                for entry, (value, size) in zip(flights, copies, strict=True)
            }
            same = self._binding() == binding
            with self._lock:
                there = self._index.holds(made, namespace=namespace)
                for (entry, held), still in zip(made.items(), there, strict=True):
                    flights[entry].held = held
                    if same and still:
                        self._keep(namespace, entry, held)
        finally:
            with self._lock:
                for entry, flight in flights.items():
                    del self._flights[namespace, entry, binding]
                    flight.landed.set()

    def stats(self, namespace: str | None = None) -> CacheStats:
        """Counts of one namespace; None: of all together."""
        with self._lock:
            self._sweep()
            tenants = [t for name, t in self._tenants.items() if namespace in (None, name)]
            sums = {
                name: sum(t.counts[name] for t in tenants)
                for name in CacheStats.__dataclass_fields__
            }
            return CacheStats(**sums | {"entries": sum(len(t.held) for t in tenants)})

    def clear(self, namespace: str | None = None) -> None:
        """Drop the values of one namespace; None: of all. The counts stay."""
        with self._lock:
            for name, tenant in self._tenants.items():
                if namespace in (None, name):
                    tenant.held.clear()
                    tenant.counts["bytes"] = 0

    def _tenant(self, namespace: str) -> _Tenant:
        return self._tenants.setdefault(namespace, _Tenant())

    def _look(self, namespace: str, entry: int, binding: Binding) -> _Held | None:
        """The value if it is still true; counts."""
        self._sweep()
        tenant = self._tenant(namespace)
        held = tenant.held.get(entry)
        if held is not None and held.binding != binding:
            tenant.drop(entry, "stale")
            held = None
        tenant.counts["misses" if held is None else "hits"] += 1
        if held is not None:
            tenant.held.move_to_end(entry)
        return held

    def _keep(self, namespace: str, entry: int, held: _Held) -> bool:
        tenant = self._tenant(namespace)
        old = tenant.held.pop(entry, None)
        tenant.counts["bytes"] -= 0 if old is None else old.bytes
        if held.bytes > self._capacity:
            tenant.counts["refused"] += 1
            return False
        self._sweep()
        tenant.held[entry] = held
        tenant.counts["bytes"] += held.bytes
        while tenant.counts["bytes"] > self._capacity:
            tenant.drop(next(iter(tenant.held)), "evictions")
        return True

    def _sweep(self) -> None:
        """Drop the values of entries that were deleted since the last look."""
        now = self._index.deletions  # read first: a deletion during the sweep calls for another
        if now == self._deletions:
            return
        for name, tenant in self._tenants.items():
            entries = list(tenant.held)
            for entry, there in zip(
                entries, self._index.holds(entries, namespace=name), strict=True
            ):
                if not there:
                    tenant.drop(entry, "stale")
        self._deletions = now


def _copy(value: Any, what: str) -> tuple[Any, int]:
    """A copy without gradient that shares no memory, and its bytes."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise InputError(f"KVCache keeps dense tensors; {what} holds one of {value.layout}")
        # Made outside inference mode, so that it may take part in training.
        with torch.inference_mode(False):
            copied = value.detach().clone(memory_format=torch.contiguous_format)
        return copied, copied.nbytes
    if type(value) in (tuple, list):
        parts = [_copy(part, what) for part in value]
        return type(value)(part for part, _ in parts), sum(size for _, size in parts)
    if type(value) is dict:
        named = {key: _copy(part, what) for key, part in value.items()}
        return {key: part for key, (part, _) in named.items()}, sum(s for _, s in named.values())
    raise InputError(
        f"KVCache keeps tensors, and tuples, lists and dicts of such; {what} holds a "
        f"{type(value).__name__}"
    )
