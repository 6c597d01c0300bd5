"""What each policy of the replay buffer keeps and draws, and that a resume changes no bit."""

from __future__ import annotations

import heapq
import math
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessera import random
from tessera.data import ReplayBuffer
from tessera.data.largest import Largest
from tessera.data.priorities import BlockSums
from tessera.errors import CheckpointError, InputError

POLICIES = ("reservoir", "ring", "class_balanced", "prioritized")


def labels(n: int, seed: int = 0) -> Tensor:
    """Mostly 0, some 1, few 2; and a 3 from the middle on."""
    rng = np.random.default_rng(seed)
    y = rng.choice(3, n, p=[0.8, 0.15, 0.05])
    y[n // 2 :: 7] = 3
    return torch.from_numpy(y)


def filled(
    policy: str, n: int, *, capacity: int = 40, batch: int = 16, seed: int = 0
) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, policy, seed=seed, fields=("t", "y"))
    t = torch.arange(n)
    for rows in t.split(batch):
        buffer.add(rows, labels(n)[rows])
    return buffer


def held(buffer: ReplayBuffer) -> list[int]:
    return buffer.state_dict()["rows"]["t"].tolist()


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict):
        assert isinstance(b, dict)
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        return torch.equal(a, b)
    return a == b


def chi_squared(counts: np.ndarray, expected: float | np.ndarray) -> float:
    """Per degree of freedom."""
    return float(((counts - expected) ** 2 / expected).sum() / (counts.size - 1))


# --- which rows are kept ---------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 16, 39, 40, 41, 1000])
def test_a_ring_holds_the_last_rows(batch: int) -> None:
    for n in (1, 39, 40, 41, 333):
        buffer = filled("ring", n, batch=batch)
        assert sorted(held(buffer)) == list(range(max(0, n - 40), n))
        assert [t % 40 for t in held(buffer)] == list(range(min(n, 40)))


def balanced_oracle(y: list[int], capacity: int) -> Counter[int]:
    """How many rows each label holds: a rule on labels alone, one row at a time."""
    sizes: Counter[int] = Counter()
    full: set[int] = set()
    for label in y:
        if sum(sizes.values()) < capacity:
            sizes[label] += 1
        elif label not in full:
            most = max(sizes.values())
            ties = [c for c, n in sizes.items() if n == most]
            giver = label if label in ties else min(ties)
            sizes[giver] -= 1
            sizes[label] += 1
            full.add(giver)
    return +sizes


@pytest.mark.parametrize("batch", [1, 16, 1000])
@pytest.mark.parametrize("n", [10, 40, 41, 300, 1000])
def test_labels_share_the_capacity(n: int, batch: int) -> None:
    buffer = filled("class_balanced", n, batch=batch)
    state = buffer.state_dict()
    sizes = Counter(state["rows"]["y"].tolist())
    assert sizes == balanced_oracle(labels(n).tolist(), 40)
    assert torch.equal(labels(n)[state["rows"]["t"]], state["rows"]["y"])
    seen = Counter(labels(n).tolist())
    if n == 1000:  # as equal as their numbers allow
        assert max(sizes.values()) - min(sizes.values()) <= 1
        assert min(seen.values()) >= 10
    assert state["rule"]["seen"] == seen
    assert held(buffer) == held(filled("class_balanced", n, batch=7))


def inclusion(policy: str, n: int, runs: int, only: int | None = None) -> np.ndarray:
    counts = np.zeros(n)
    for seed in range(runs):
        counts[held(filled(policy, n, capacity=12, batch=n, seed=seed))] += 1
    return counts if only is None else counts[labels(n).numpy() == only]


@pytest.mark.parametrize("label", [0, 1, 3])
def test_of_one_label_every_row_is_as_likely(label: int) -> None:
    runs = 1500
    counts = inclusion("class_balanced", 120, runs, only=label)
    p = counts.sum() / counts.size / runs
    # Rows of one sample exclude each other: the variance is n p (1 - p), the spread that of chi.
    chi = ((counts - runs * p) ** 2 / (runs * p * (1 - p))).sum() / (counts.size - 1)
    assert abs(chi - 1) < 4 * math.sqrt(2 / (counts.size - 1)), chi


def test_the_test_of_uniformity_can_fail() -> None:
    """Keeping the first rows of a label instead is far from uniform."""
    y = labels(120).numpy()
    counts = np.where(y == 0, 0.0, 0.0)
    counts[np.flatnonzero(y == 0)[:3]] = 1500
    mine = counts[y == 0]
    p = mine.sum() / mine.size / 1500
    assert ((mine - 1500 * p) ** 2 / (1500 * p * (1 - p))).sum() / (mine.size - 1) > 100


# --- the largest keys ------------------------------------------------------------------------

WHERE = st.sampled_from(["far below", "just below", "above", "anywhere"])
COMMANDS = st.tuples(st.sampled_from(["push", "pop", "replace"]), WHERE, st.integers(1, 60))


def unused_key(where: str, largest: int, used: set[int], rng: np.random.Generator) -> int:
    """A key that no slot ever had, on this side of the largest if there is one."""
    near = {"far below": largest // 2, "just below": largest - 1, "above": largest + 1}
    key = min(max(near.get(where, -1), -1), (1 << 64) - 1)
    while key < 0 or key in used:
        key = int(rng.integers(1 << 64, dtype=np.uint64))
    return key


@given(
    st.integers(0, 200),
    st.integers(1, 12),
    st.lists(COMMANDS, max_size=12),
    st.integers(0, 3),
)
@settings(max_examples=200)
def test_the_largest_key_is_that_of_a_heap(
    size: int, at_least: int, commands: list[tuple[str, str, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(1 << 64, size=size, dtype=np.uint64)
    held = Largest(keys, np.arange(size), at_least=at_least)
    heap = [(-key, slot) for slot, key in enumerate(keys.tolist())]
    heapq.heapify(heap)
    used, slots = set(keys.tolist()), size
    for call, where, times in commands:
        for _ in range(times):
            if call != "push" and not heap:
                with pytest.raises(IndexError):
                    held.pop()
                continue
            key = unused_key(where, held.largest, used, rng)
            if call == "pop":
                assert held.pop() == heapq.heappop(heap)[1]
            elif call == "replace":
                slot = heap[0][1]
                assert held.replace(key) == slot
                heapq.heapreplace(heap, (-key, slot))
            else:
                held.push(key, slots)
                heapq.heappush(heap, (-key, slots))
                slots += 1
            used.add(key)
            assert held.size == len(heap)
            assert held.largest == (-heap[0][0] if heap else -1)
    assert [held.pop() for _ in range(held.size)] == [slot for _, slot in sorted(heap)]


@pytest.mark.parametrize("classes", [0, 1, 3])
def test_more_rows_than_are_kept_in_order(classes: int) -> None:
    """As a heap of all keys would place them, whether it goes on or is built again half-way."""
    capacity, n = 9000, 60_000
    keys = random.bits(random.key(7, "replay"), 0, n).tolist()
    y = np.random.default_rng(0).integers(max(classes, 1), size=n).tolist()
    slots = list(range(capacity))
    sizes = Counter(y[:capacity])
    heaps = {c: [(-keys[s], s) for s in slots if y[s] == c] for c in sizes}
    for heap in heaps.values():
        heapq.heapify(heap)
    gave: set[int] = set()
    for t in range(capacity, n):
        heap = heaps[y[t]]
        giver = heap
        if y[t] not in gave:
            fullest = max(heaps, key=lambda c: (len(heaps[c]), c == y[t], -c))
            giver = heaps[fullest]
            gave.add(fullest)
        if giver is heap and keys[t] >= -heap[0][0]:
            continue
        slot = heapq.heappop(giver)[1]
        heapq.heappush(heap, (-keys[t], slot))
        slots[slot] = t

    policy = "class_balanced" if classes else "reservoir"
    buffer = ReplayBuffer(capacity, policy, seed=7, fields=("t", "y"))
    for rows in torch.arange(n).split(997):
        if 30_000 < rows[0] <= 30_997:
            state = buffer.state_dict()
            buffer = ReplayBuffer(capacity, policy, seed=7, fields=("t", "y"))
            buffer.load_state_dict(state)
        buffer.add(rows, torch.tensor(y)[rows])
    assert held(buffer) == slots


# --- how rows are drawn ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["reservoir", "ring", "class_balanced"])
def test_a_sample_has_no_row_twice_and_favours_none(policy: str) -> None:
    buffer = filled(policy, 200)
    place = {t: i for i, t in enumerate(held(buffer))}
    counts = np.zeros(40)
    for _ in range(3000):
        t, _ = buffer.sample(8)
        assert len(set(t.tolist())) == 8
        counts[[place[i] for i in t.tolist()]] += 1
    # Without replacement: variance n p (1 - p).
    assert abs(chi_squared(counts, 600.0) / 0.8 - 1) < 4 * math.sqrt(2 / 39)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_last_rows_can_be_left_out(policy: str) -> None:
    buffer = filled(policy, 200)
    old = {t for t in held(buffer) if t < 200 - 16}
    seen: set[int] = set()
    for _ in range(400):
        t, _ = buffer.sample(6, exclude_last=16)
        assert len(t) == 6
        seen |= set(t.tolist())
    assert seen == old
    everything = buffer.sample(200, exclude_last=16)[0].tolist()
    assert set(everything) <= old
    if policy != "prioritized":
        assert sorted(everything) == sorted(old)
    assert len(buffer.sample(5, exclude_last=10_000)[0]) == 0
    rows, _ = buffer.sample_like(torch.arange(4), ratio=1.0, exclude_last=16)
    assert set(rows.tolist()) <= old


def test_leaving_out_keeps_the_others_equally_likely() -> None:
    buffer = filled("reservoir", 400, capacity=20, batch=20)
    buffer.add(torch.arange(400, 410), torch.zeros(10, dtype=torch.int64))
    old = [t for t in held(buffer) if t < 400 - 10]
    counts = Counter[int]()
    for _ in range(6000):
        counts.update(buffer.sample(3, exclude_last=20)[0].tolist())
    values = np.array([counts[t] for t in old], float)
    assert set(counts) <= set(old)
    expected = values.sum() / len(old)
    chi = chi_squared(values, expected) / (1 - 3 / len(old))
    assert abs(chi - 1) < 4 * math.sqrt(2 / (len(old) - 1)), chi


def test_draws_are_in_proportion_to_the_priorities() -> None:
    buffer = filled("prioritized", 130)
    positions = torch.arange(90, 130)
    priorities = torch.arange(1.0, 41.0)
    assert buffer.update_priorities(positions, priorities) == 40
    counts = np.zeros(40)
    for _ in range(400):
        draw = buffer.draw(50, beta=1.0)
        assert torch.equal(draw.values[0], draw.positions)
        p = priorities[draw.positions - 90].double()
        torch.testing.assert_close(draw.weights, p.min() / p)
        counts += np.bincount(draw.positions.numpy() - 90, minlength=40)
    expected = 20_000 * priorities.numpy() / priorities.sum().item()
    chi = chi_squared(counts, expected)
    assert abs(chi - 1) < 4 * math.sqrt(2 / 39), chi
    assert chi_squared(counts, 500.0) > 50  # uniform draws would be seen
    plain = np.bincount(buffer.sample(20_000)[0].numpy() - 90, minlength=40)
    assert abs(chi_squared(plain, expected) - 1) < 4 * math.sqrt(2 / 39)


def test_a_new_row_gets_the_largest_priority() -> None:
    buffer = filled("prioritized", 40)
    buffer.update_priorities(torch.arange(40), torch.full((40,), 0.001))
    buffer.update_priorities(torch.tensor([3]), torch.tensor([5.0]))
    buffer.update_priorities(torch.tensor([3]), torch.tensor([0.001]))
    buffer.add(torch.tensor([40]), torch.tensor([0]))
    assert buffer.state_dict()["slots"]["priorities"][0] == 5.0


def test_updates_of_rows_that_left_are_dropped() -> None:
    buffer = filled("prioritized", 40)
    draw = buffer.draw(30)
    buffer.add(torch.arange(40, 60), torch.zeros(20, dtype=torch.int64))
    before = buffer.state_dict()["slots"]["priorities"].clone()
    kept = (draw.positions >= 20).sum().item()
    assert buffer.update_priorities(draw.positions, torch.full((30,), 0.5)) == kept
    after = buffer.state_dict()["slots"]["priorities"]
    assert torch.equal(after[:20], before[:20])  # the slots of the new rows
    twice = torch.tensor([30, 30])
    buffer.update_priorities(twice, torch.tensor([0.25, 0.125]))
    assert buffer.state_dict()["slots"]["priorities"][30] == 0.125


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_priorities_are_finite_and_positive(bad: float) -> None:
    buffer = filled("prioritized", 40)
    before = buffer.state_dict()
    with pytest.raises(InputError, match=r"finite priorities > 0; add a small number"):
        buffer.update_priorities(torch.arange(2), torch.tensor([1.0, bad]))
    assert equal(buffer.state_dict(), before)


def test_bad_updates_and_draws_say_what_is_wrong() -> None:
    buffer = filled("prioritized", 40)
    with pytest.raises(InputError, match=r"positions lie in 0 \.\. 39, got 0 \.\. 40"):
        buffer.update_priorities(torch.tensor([0, 40]), torch.ones(2))
    with pytest.raises(InputError, match=r"needs int64 positions \[n\]"):
        buffer.update_priorities(torch.tensor([0.0]), torch.ones(1))
    with pytest.raises(InputError, match="draw needs n >= 1 and beta"):
        buffer.draw(4, beta=2.0)
    with pytest.raises(InputError, match="nothing to draw from"):
        ReplayBuffer(4, "prioritized").draw(1)
    for call in (
        lambda b: b.draw(1),
        lambda b: b.update_priorities(torch.arange(1), torch.ones(1)),
    ):
        with pytest.raises(InputError, match="is for 'prioritized', this one is 'ring'"):
            call(filled("ring", 4))
    with pytest.raises(InputError, match="finds the labels in the field 'y'"):
        ReplayBuffer(4, "class_balanced", fields=("x", "label"))
    with pytest.raises(InputError, match=r"needs whole labels \[n\] in 'y'"):
        ReplayBuffer(4, "class_balanced").add(torch.rand(2, 1), torch.rand(2))
    with pytest.raises(InputError, match="whole exclude_last >= 0, got -1"):
        buffer.sample(1, exclude_last=-1)


def test_block_sums_do_not_drift() -> None:
    sums, true = BlockSums(5000), np.zeros(5000)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        places = rng.choice(5000, 30, replace=False)
        weights = rng.exponential(1e3 ** rng.integers(-2, 3), 30)
        sums.put(places, weights)
        true[places] = weights
    assert sums.total == pytest.approx(true.sum(), rel=1e-13)
    for mass in (0.0, sums.total * (1 - 1e-16), sums.total):
        (found,) = sums.find(np.array([mass]))
        assert true[found] > 0


def test_block_sums_find_the_place_of_a_mass() -> None:
    weights = np.random.default_rng(0).uniform(0.5, 2.0, 5000)
    weights[::3] = 0.0
    sums = BlockSums(5000)
    sums.put(np.arange(5000), weights)
    middle = (np.cumsum(weights) - weights / 2)[weights > 0]
    assert sums.find(middle).tolist() == np.flatnonzero(weights).tolist()


# --- resuming, and threads -------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cut", [0, 16, 48, 160])
def test_a_resumed_buffer_goes_on_bit_for_bit(policy: str, cut: int) -> None:
    def go(buffer: ReplayBuffer, start: int, end: int) -> list[Tensor]:
        drawn = []
        for first in range(start, end, 16):
            t = torch.arange(first, first + 16)
            drawn += buffer.sample_like(t, ratio=0.3)
            buffer.add(t, labels(400)[t])
            if policy == "prioritized":
                draw = buffer.draw(5)
                buffer.update_priorities(draw.positions, draw.values[0] + 1.0)
        return drawn

    whole, first, second = (ReplayBuffer(40, policy, fields=("t", "y")) for _ in range(3))
    expected = go(whole, 0, 320)
    got = go(first, 0, cut)
    second.load_state_dict(first.state_dict())
    got += go(second, cut, 320)
    assert equal(second.state_dict(), whole.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_damaged_states_are_refused() -> None:
    state = filled("prioritized", 50).state_dict()
    state["slots"]["priorities"][3] = -1
    with pytest.raises(CheckpointError, match="a priority is not finite"):
        filled("prioritized", 9).load_state_dict(state)
    state = filled("class_balanced", 50).state_dict()
    state["rule"]["seen"][0] += 1
    with pytest.raises(CheckpointError, match="do not add up"):
        filled("class_balanced", 9).load_state_dict(state)
    state = filled("ring", 50).state_dict()
    state["rule"] = {"seen": 3}
    with pytest.raises(CheckpointError, match="rule holds"):
        filled("ring", 9).load_state_dict(state)


@pytest.mark.parametrize("policy", POLICIES)
def test_readers_never_see_half_an_add(policy: str) -> None:
    buffer = ReplayBuffer(64, policy)
    buffer.add(torch.zeros(1, 32), torch.zeros(1, dtype=torch.int64))
    torn: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            x, y = buffer.sample(16)
            if not bool((x == y[:, None]).all()):
                torn.append(1)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for r in readers:
        r.start()
    for step in range(300):
        y = torch.arange(8 * step, 8 * step + 8) % 1000
        buffer.add(y[:, None].float().expand(8, 32), y)
    done.set()
    for r in readers:
        r.join()
    assert not torn
