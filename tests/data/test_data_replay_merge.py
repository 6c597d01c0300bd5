"""Merging the reservoirs of several streams: exact, idempotent, associative."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tessera import random
from tessera.data import ReplayBuffer
from tessera.errors import InputError


def shard(rank: int, n: int, *, capacity: int = 20, seed: int | None = None) -> ReplayBuffer:
    """Rows 1000 rank, 1000 rank + 1, ..."""
    buffer = ReplayBuffer(capacity, seed=rank if seed is None else seed)
    t = torch.arange(n) + 1000 * rank
    for rows in t.split(7):
        buffer.add(rows[:, None].float(), rows)
    return buffer


def rows(buffer: ReplayBuffer) -> list[int]:
    state = buffer.state_dict()["rows"]
    assert torch.equal(state["x"][:, 0].long(), state["y"])
    return state["y"].tolist()


def same(a: ReplayBuffer, b: ReplayBuffer) -> bool:
    one, two = a.state_dict(), b.state_dict()
    slots = all(torch.equal(one["slots"][k], two["slots"][k]) for k in one["slots"])
    return slots and rows(a) == rows(b) and all(one[k] == two[k] for k in ("seed", "seen", "rule"))


def test_it_holds_the_smallest_keys_of_all() -> None:
    sizes = {0: 500, 1: 30, 2: 9}
    keys = {
        1000 * rank + t: int(k)
        for rank, n in sizes.items()
        for t, k in enumerate(random.bits(random.key(rank, "replay"), 0, n))
    }
    merged = ReplayBuffer.merge([shard(rank, n) for rank, n in sizes.items()])
    assert rows(merged) == sorted(keys, key=keys.__getitem__)[:20]
    assert (merged.seen, len(merged)) == (539, 20)


def test_every_row_of_every_shard_is_as_likely() -> None:
    runs, sizes, counts = 3000, (60, 25, 5), np.zeros(90)
    place = {1000 * r + t: sum(sizes[:r]) + t for r, n in enumerate(sizes) for t in range(n)}
    equal_split = np.zeros(90)
    for run in range(runs):
        shards = [
            shard(r, n, capacity=12, seed=random.key(run, "shard", r) >> 1)
            for r, n in enumerate(sizes)
        ]
        counts[[place[t] for t in rows(ReplayBuffer.merge(shards))]] += 1
        thirds = [t for s in shards for t in rows(s)[:4]]
        equal_split[[place[t] for t in thirds]] += 1
    p = 12 / 90

    def chi(found: np.ndarray) -> float:
        return float(((found - runs * p) ** 2 / (runs * p * (1 - p))).sum() / 89)

    assert abs(chi(counts) - 1) < 4 * math.sqrt(2 / 89), chi(counts)
    assert chi(equal_split) > 10  # as many of each shard: wrong, and seen to be


def test_a_shard_counts_once_and_the_order_of_merging_does_not_matter() -> None:
    a, b, c = shard(0, 100), shard(1, 40), shard(2, 300)
    early = shard(0, 50)
    whole = ReplayBuffer.merge([a, b, c])
    assert same(ReplayBuffer.merge([c, a, b, a]), whole)
    assert same(ReplayBuffer.merge([ReplayBuffer.merge([a, b]), c]), whole)
    assert same(ReplayBuffer.merge([a, ReplayBuffer.merge([b, c]), whole]), whole)
    assert same(ReplayBuffer.merge([early, a, b, c]), whole)  # what a shard was counts as it is


def test_a_merged_buffer_goes_on() -> None:
    merged = ReplayBuffer.merge([shard(0, 100), shard(1, 40)])
    new = torch.arange(5000, 5400)
    merged.add(new[:, None].float(), new)
    assert merged.seen == 540
    assert any(t >= 5000 for t in rows(merged))
    assert any(t < 5000 for t in rows(merged))
    old = merged.sample(20, exclude_last=400)[1]
    assert sorted(old.tolist()) == sorted(t for t in rows(merged) if t < 5000)
    again = ReplayBuffer.merge([merged, shard(2, 60)])
    assert again.seen == 600
    other = ReplayBuffer(20, seed=merged.state_dict()["seed"])
    other.load_state_dict(merged.state_dict())
    assert same(other, merged)


def test_empty_shards_add_nothing() -> None:
    a = shard(0, 100)
    assert sorted(rows(ReplayBuffer.merge([ReplayBuffer(20, seed=9), a]))) == sorted(rows(a))
    assert len(ReplayBuffer.merge([ReplayBuffer(20), ReplayBuffer(20, seed=1)])) == 0


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(InputError, match="at least one buffer"):
        ReplayBuffer.merge([])
    with pytest.raises(InputError, match="one capacity, got 20 and 21"):
        ReplayBuffer.merge([shard(0, 5), shard(1, 5, capacity=21)])
    with pytest.raises(InputError, match="one fields"):
        ReplayBuffer.merge([ReplayBuffer(2), ReplayBuffer(2, fields=("x",))])
    with pytest.raises(InputError, match=r"hold different rows \(x\).*seed=rank"):
        ReplayBuffer.merge([shard(0, 50), shard(1, 50, seed=0)])
    with pytest.raises(InputError, match="cannot merge 'ring' buffers: rings"):
        ReplayBuffer.merge([ReplayBuffer(2, "ring")])
    with pytest.raises(InputError, match="cannot merge 'class_balanced' buffers"):
        ReplayBuffer.merge([ReplayBuffer(2, "class_balanced")])
    wide = ReplayBuffer(20, seed=3)
    wide.add(torch.zeros(2, 2), torch.arange(2))
    with pytest.raises(InputError, match="the rows of x differ"):
        ReplayBuffer.merge([shard(0, 5), wide])
