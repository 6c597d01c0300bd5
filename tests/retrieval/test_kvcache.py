"""The cache of computed values: by hand, against a model of it, under threads, by message."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tessera.errors import InputError, UnknownNameError
from tessera.retrieval.index import Index
from tessera.retrieval.kvcache import KVCache


@dataclass
class Adapter:
    """Stands for an arch.Delta: all the cache knows of one."""

    hash: str = "v1"
    base_hash: str = "base"


def some_index(entries: int = 8, *namespaces: str) -> Index:
    index = Index(dim=4)
    for namespace in namespaces or ("",):
        vectors = torch.eye(4).repeat(entries, 1)[:entries]
        index.add(vectors, [f"{namespace}{i}" for i in range(entries)], namespace=namespace)
    return index


def floats(n: int, value: float = 0.0) -> Tensor:
    return torch.full((n,), float(value))


def test_the_least_recently_used_goes_first_and_bytes_are_counted() -> None:
    cache = KVCache(some_index(), capacity_bytes=48)
    for entry in range(3):
        assert cache.put(entry, floats(4, entry))  # 16 bytes each
    assert cache.stats().bytes == 48
    assert cache.get(0) is not None  # now 1 is the oldest
    cache.put(3, floats(4, 3))
    assert [cache.get(e) is None for e in range(4)] == [False, True, False, False]
    cache.put(0, floats(8))  # in place of the 16 bytes it had: 1 more must go
    assert [cache.get(e) is None for e in (0, 2, 3)] == [False, True, False]
    s = cache.stats()
    assert (s.hits, s.misses, s.evictions, s.bytes, s.entries) == (6, 2, 2, 48, 2)


def test_a_value_larger_than_the_capacity_is_not_kept_and_nothing_else_goes() -> None:
    cache = KVCache(some_index(), capacity_bytes=16)
    assert cache.put(0, floats(4))
    assert not cache.put(1, floats(5))
    assert cache.get(1) is None
    assert cache.get(0) is not None
    assert not cache.put(0, floats(5))  # what it replaces is no longer true
    assert cache.get(0) is None
    [value] = cache.get_or_compute([2], lambda p: [floats(9, 2.0)])
    assert value.shape == (9,)
    s = cache.stats()
    assert (s.refused, s.evictions, s.bytes, s.entries) == (3, 0, 0, 0)


def test_a_value_is_bound_to_the_adapters_content_and_to_the_base() -> None:
    adapter = Adapter()
    cache = KVCache(some_index(), adapter=adapter)
    cache.put(0, floats(1))
    assert cache.get(0) is not None
    adapter.hash = "v2"  # a step of training
    assert cache.get(0) is None
    adapter.hash = "v1"
    assert cache.get(0) is None  # dropped, not hidden
    s = cache.stats()
    assert (s.stale, s.bytes, s.entries) == (1, 0, 0)

    cache.put(0, floats(1))
    cache.bind(adapter, base_hash="base")  # the same, in other words
    assert cache.get(0) is not None
    cache.bind(None, base_hash="base")
    assert cache.get(0) is None
    cache.put(0, floats(1))
    cache.bind(None, base_hash="another base")
    assert cache.get(0) is None
    assert cache.stats().stale == 3


def test_a_deleted_entry_takes_its_values_with_it() -> None:
    index = some_index(4, "a", "b")
    cache = KVCache(index)
    for namespace, first in (("a", 0), ("b", 4)):
        for entry in range(first, first + 4):
            cache.put(entry, floats(2), namespace=namespace)
    index.delete([1, 6])
    assert cache.stats("a").bytes == 24  # seen without asking for the entry
    assert cache.stats().stale == 2
    held = [cache.get(e, namespace="a" if e < 4 else "b") is not None for e in range(8)]
    assert held == [True, False, True, True, True, True, False, True]
    with pytest.raises(UnknownNameError, match="no entry 1"):
        cache.put(1, floats(2), namespace="a")
    with pytest.raises(UnknownNameError, match="no entry 1"):
        cache.get_or_compute([0, 1], lambda p: pytest.fail("computed"), namespace="a")


def test_an_entry_deleted_while_its_value_is_computed_is_not_kept() -> None:
    index = some_index()
    cache = KVCache(index)

    def compute(payloads: list[str]) -> list[Tensor]:
        index.delete([3])
        return [floats(1) for _ in payloads]

    assert len(cache.get_or_compute([3, 4], compute)) == 2
    assert cache.get(3) is None
    assert cache.get(4) is not None
    assert cache.stats().entries == 1


def test_an_adapter_that_changes_while_a_value_is_computed_leaves_it_unkept() -> None:
    adapter = Adapter()
    cache = KVCache(some_index(), adapter=adapter)

    def compute(payloads: list[str]) -> list[Tensor]:
        adapter.hash += "+"
        return [floats(1) for _ in payloads]

    cache.get_or_compute([0], compute)
    assert cache.stats().entries == 0
    adapter.hash = "v1"  # as when the computation began: still nobody knows what it saw
    assert cache.get(0) is None


def test_tenants_have_room_of_their_own_and_do_not_see_each_other() -> None:
    cache = KVCache(some_index(8, "a", "b"), capacity_bytes=32)
    cache.put(8, floats(4, 1.0), namespace="b")
    for entry in range(8):
        cache.put(entry, floats(4), namespace="a")
    assert cache.get(8, namespace="b").tolist() == [1.0] * 4
    assert cache.get(8, namespace="a") is None
    assert cache.get(8) is None
    with pytest.raises(UnknownNameError, match="no entry 8 in this namespace"):
        cache.get_or_compute([8], lambda p: pytest.fail("computed"), namespace="a")
    with pytest.raises(UnknownNameError, match="no entry 8 in this namespace"):
        cache.put(8, floats(1), namespace="a")
    assert (cache.stats("a").bytes, cache.stats("a").evictions) == (32, 6)
    assert (cache.stats("b").bytes, cache.stats("b").evictions) == (16, 0)
    cache.clear("a")
    assert (cache.stats("a").bytes, cache.stats("b").bytes) == (0, 16)
    assert cache.stats().bytes == 16


def test_nobody_changes_what_is_held() -> None:
    cache = KVCache(some_index())
    weight = torch.ones(3, requires_grad=True)
    mine = {"kv": (weight * 2, [torch.zeros(2, 2)]), "n": torch.tensor(5)}
    cache.put(0, mine)
    mine["kv"][1][0].add_(1)
    got = cache.get(0)
    assert got["kv"][0].tolist() == [2.0, 2.0, 2.0]
    assert got["kv"][1][0].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert not got["kv"][0].requires_grad
    got["kv"][0].zero_()
    got["n"] = None
    again = cache.get(0)
    assert again["kv"][0].tolist() == [2.0, 2.0, 2.0]
    assert again["n"].item() == 5
    assert cache.stats().bytes == 12 + 16 + 8
    # What was computed is a copy on the first call as on the second.
    made = torch.zeros(2)
    for _ in range(2):
        [value] = cache.get_or_compute([1], lambda p: [made])
        value.add_(1)
    assert made.tolist() == [0.0, 0.0]
    assert cache.get(1).tolist() == [0.0, 0.0]


def test_a_view_of_something_large_costs_what_it_shows() -> None:
    cache = KVCache(some_index())
    cache.put(0, torch.zeros(1000, 1000)[:, :1].expand(-1, 2))
    assert cache.stats().bytes == 1000 * 2 * 4


def test_what_was_made_in_inference_mode_may_take_part_in_training() -> None:
    cache = KVCache(some_index())
    with torch.inference_mode():
        cache.put(0, torch.ones(2))
        got = cache.get(0)
    weight = torch.ones(2, requires_grad=True)
    (weight * got).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1.0, 1.0]


def test_compute_gets_the_payloads_of_what_is_missing_once_and_in_order() -> None:
    cache = KVCache(some_index())
    cache.put(2, floats(1, 2.0))
    asked: list[list[str]] = []

    def compute(payloads: list[str]) -> list[Tensor]:
        asked.append(payloads)
        return [floats(1, float(p)) for p in payloads]

    values = cache.get_or_compute(torch.tensor([5, 2, 1, 5]), compute)
    assert [v.item() for v in values] == [5.0, 2.0, 1.0, 5.0]
    assert asked == [["5", "1"]]
    assert [v.item() for v in cache.get_or_compute([1, 5], compute)] == [1.0, 5.0]
    assert len(asked) == 1
    # Each entry counts once a call: 1 hit of 3, then 2 of 2.
    assert (cache.stats().hits, cache.stats().misses) == (3, 2)
    assert cache.get_or_compute([], compute) == []


Op = tuple[str, int, int]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "compute", "delete", "step", "add"]),
            st.integers(0, 9),
            st.integers(0, 12),
        ),
        max_size=60,
    )
)
def test_it_does_what_a_list_in_order_of_use_would(ops: list[Op]) -> None:
    capacity = 80
    index, adapter = Index(dim=1), Adapter()
    cache = KVCache(index, adapter=adapter, capacity_bytes=capacity)
    alive: dict[int, str] = {}  # id -> namespace
    held: dict[str, list[tuple[int, int, float, str]]] = {"a": [], "b": []}
    clock = 0.0
    for space in "aabb":
        [new] = index.add(torch.ones(1, 1), [clock], namespace=space)
        alive[new] = space

    def keep(space: str, entry: int, size: int, value: float) -> None:
        held[space] = [h for h in held[space] if h[0] != entry]
        if 4 * size <= capacity:
            held[space].append((entry, size, value, adapter.hash))
        while 4 * sum(h[1] for h in held[space]) > capacity:
            held[space].pop(0)

    def look(space: str, entry: int) -> float | None:
        at = [h for h in held[space] if h[0] == entry]
        held[space] = [h for h in held[space] if h[0] != entry]
        if not at or at[0][3] != adapter.hash:
            return None
        held[space].append(at[0])
        return at[0][2]

    for name, number, size in ops:
        clock += 1.0
        space = "ab"[number % 2]
        mine = sorted(e for e, s in alive.items() if s == space)
        entry = mine[number % len(mine)] if mine else None
        if name == "add":
            [new] = index.add(torch.ones(1, 1), [clock], namespace=space)
            alive[new] = space
        elif name == "step":
            adapter.hash = f"v{number % 3}"
        elif entry is None:
            continue
        elif name == "put":
            assert cache.put(entry, floats(size, clock), namespace=space) == (4 * size <= capacity)
            keep(space, entry, size, clock)
        elif name == "get":
            want, got = look(space, entry), cache.get(entry, namespace=space)
            assert (want is None) == (got is None)
            assert got is None or got.tolist() in ([], [want] * len(got))
        elif name == "compute":
            want = look(space, entry)
            [got] = cache.get_or_compute(
                [entry], lambda p, n=size, v=clock: [floats(n, v)], namespace=space
            )
            if want is None:
                keep(space, entry, size, clock)
                want = clock
            assert got.tolist() == [want] * len(got)
        elif name == "delete":
            index.delete([entry])
            del alive[entry]
            held[space] = [h for h in held[space] if h[0] != entry]
        for s in "ab":
            stats = cache.stats(s)
            assert stats.bytes == 4 * sum(h[1] for h in held[s]) <= capacity
            assert stats.entries == len(held[s])


def test_what_it_refuses() -> None:
    index = some_index()
    with pytest.raises(InputError, match="capacity_bytes >= 1, got 0"):
        KVCache(index, capacity_bytes=0)
    with pytest.raises(InputError, match=r"whole capacity_bytes, got 1\.5"):
        KVCache(index, capacity_bytes=1.5)
    with pytest.raises(InputError, match=r"with \.hash and \.base_hash.*got str"):
        KVCache(index, adapter="lora")
    with pytest.raises(InputError, match=r"adapter is of the base base\.\.\., the values of other"):
        KVCache(index, adapter=Adapter(), base_hash="other")
    cache = KVCache(index, adapter=Adapter())
    with pytest.raises(InputError, match="the value of entry 0 holds a str"):
        cache.put(0, (torch.ones(1), "text"))
    with pytest.raises(InputError, match=r"holds one of torch\.sparse_coo"):
        cache.put(0, torch.eye(2).to_sparse())
    with pytest.raises(UnknownNameError, match="no entry 99"):
        cache.put(99, torch.ones(1))
    with pytest.raises(InputError, match="a value for each of 2 payloads, got 1"):
        cache.get_or_compute([0, 1], lambda p: [torch.ones(1)])
    with pytest.raises(InputError, match="for each of 1 payloads, got <class 'NoneType'>"):
        cache.get_or_compute([0], lambda p: None)
    with pytest.raises(InputError, match="the computed value of entry 0 holds a float"):
        cache.get_or_compute([0], lambda p: [1.0])
    with pytest.raises(InputError, match="asked the cache for some"):
        cache.get_or_compute([0], lambda p: cache.get_or_compute([1], lambda q: [floats(1)]))
    with pytest.raises(InputError, match="the adapter is of the base x"):
        cache.bind(Adapter(base_hash="x"), base_hash="y")
    s = cache.stats()
    assert (s.entries, s.bytes) == (0, 0)
    assert not cache._flights
    # And it works on, in this thread too.
    assert len(cache.get_or_compute([0], lambda p: [floats(1)])) == 1
