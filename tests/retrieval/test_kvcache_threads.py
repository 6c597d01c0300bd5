"""The cache under threads: each value once, whoever asks, also where a computation fails."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from tessera.retrieval.index import Index
from tessera.retrieval.kvcache import KVCache


def some_index(entries: int = 8) -> Index:
    index = Index(dim=4)
    index.add(torch.eye(4).repeat(entries, 1)[:entries], [str(i) for i in range(entries)])
    return index


def floats(n: int, value: float) -> Tensor:
    return torch.full((n,), value)


def test_each_value_is_computed_once_under_threads() -> None:
    index = some_index(40)
    cache = KVCache(index)
    made: dict[str, int] = {}
    lock, start = threading.Lock(), threading.Barrier(8)
    wrong: list[Any] = []

    def compute(payloads: list[str]) -> list[Tensor]:
        with lock:
            for p in payloads:
                made[p] = made.get(p, 0) + 1
        threading.Event().wait(0.002)  # long enough for the others to ask for the same
        return [floats(3, float(p)) for p in payloads]

    def ask(seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        start.wait()
        for _ in range(30):
            entries = torch.randint(0, 40, (5,), generator=g)
            values = cache.get_or_compute(entries, compute)
            if [v[0].item() for v in values] != entries.tolist():
                wrong.append(entries)
            values[0].fill_(-1)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not wrong
    assert set(made.values()) == {1}
    assert not cache._flights


def test_a_computation_that_fails_is_done_again_by_who_waited_for_it() -> None:
    cache = KVCache(some_index())
    begun, fail = threading.Event(), threading.Event()
    failed: list[Exception] = []

    def bad(payloads: list[str]) -> list[Tensor]:
        begun.set()
        fail.wait(60)
        raise OSError("no encoder")

    def first() -> None:
        try:
            cache.get_or_compute([0], bad)
        except OSError as error:
            failed.append(error)

    got: list[Tensor] = []
    waiter = threading.Thread(
        target=lambda: got.extend(cache.get_or_compute([0], lambda p: [floats(1, 7.0)]))
    )
    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    waiter.start()
    fail.set()
    thread.join(60)
    waiter.join(60)
    assert len(failed) == 1
    assert [v.item() for v in got] == [7.0]
    assert not cache._flights


def test_two_that_wait_for_each_others_values_both_get_them() -> None:
    cache = KVCache(some_index())
    both = threading.Barrier(2)
    got: dict[int, list[float]] = {}

    def ask(mine: int, others: int) -> None:
        def compute(payloads: list[str]) -> list[Tensor]:
            both.wait(60)  # each computes its own before either waits
            return [floats(1, float(p)) for p in payloads]

        cache.get_or_compute([mine], compute)
        got[mine] = [v.item() for v in cache.get_or_compute([mine, others], compute)]

    threads = [threading.Thread(target=ask, args=pair) for pair in ((0, 1), (1, 0))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert got == {0: [0.0, 1.0], 1: [1.0, 0.0]}
