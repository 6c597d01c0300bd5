import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera import random
from tessera.data import ReplayBuffer
from tessera.errors import CheckpointError, InputError, UnknownNameError


def stream(n: int) -> tuple[Tensor, Tensor]:
    """Row i is recognisable: x[i] = (i, i, i), y[i] = i."""
    return torch.arange(n, dtype=torch.float32)[:, None].repeat(1, 3), torch.arange(n)


def filled(n: int, *, capacity: int = 40, batch: int = 64, seed: int = 0) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, seed=seed)
    x, y = stream(n)
    for start in range(0, n, batch):
        buffer.add(x[start : start + batch], y[start : start + batch])
    return buffer


def layout(buffer: ReplayBuffer) -> list[int]:
    """The stream position in each slot."""
    rows = buffer.state_dict()["rows"]
    assert bool((rows["x"][:, 0].long() == rows["y"]).all()), "a row was torn"
    return [int(i) for i in rows["y"]]


def same(a: ReplayBuffer, b: ReplayBuffer) -> bool:
    one, two = a.state_dict(), b.state_dict()
    slots, other_slots = one.pop("slots"), two.pop("slots")
    tensors = [(slots[name], other_slots[name]) for name in slots]
    rows, other_rows = one.pop("rows"), two.pop("rows")
    tensors += [(rows[name], other_rows[name]) for name in rows]
    return one == two and all(torch.equal(p, q) for p, q in tensors)


# --- which items are kept


def oracle(n: int, capacity: int, seed: int) -> list[int]:
    """The reservoir one item at a time, with no heap and no batch."""
    keys = [int(k) for k in random.bits(random.key(seed, "replay"), 0, n)]
    slots: list[int] = []
    for t in range(n):
        if len(slots) < capacity:
            slots.append(t)
            continue
        worst = max(range(capacity), key=lambda slot: keys[slots[slot]])
        if keys[t] < keys[slots[worst]]:
            slots[worst] = t
    return slots


@pytest.mark.parametrize("batch", [1, 7, 64, 5000])
@pytest.mark.parametrize("capacity", [1, 2, 40, 999, 1000, 2000])
def test_contents_and_layout_are_those_of_one_item_at_a_time(batch, capacity):
    buffer = filled(1000, capacity=capacity, batch=batch, seed=3)
    assert layout(buffer) == oracle(1000, capacity, seed=3)
    assert (len(buffer), buffer.seen) == (min(1000, capacity), 1000)


def test_it_holds_the_items_with_the_smallest_keys():
    keys = random.bits(random.key(5, "replay"), 0, 3000)
    assert sorted(layout(filled(3000, seed=5))) == sorted(np.argsort(keys)[:40].tolist())


def scalar_uniforms(seed: int, n: int) -> list[float]:
    return (random.bits(random.key(seed, "mutant"), 0, n) / 2.0**64).tolist()


def right_reservoir(seed: int, n: int, capacity: int, batch: int) -> list[int]:
    """Vitter's algorithm R in batches: item t takes slot floor(u (t + 1)), the later item wins."""
    slots = list(range(capacity))
    for t, u in enumerate(scalar_uniforms(seed, n)):
        slot = int(u * (t + 1))
        if t >= capacity and slot < capacity:
            slots[slot] = t
    return slots


def first_wins(seed: int, n: int, capacity: int, batch: int) -> list[int]:
    """Known to be wrong: of the items of a batch that hit one slot, the first stays."""
    slots, u = list(range(capacity)), scalar_uniforms(seed, n)
    for start in range(capacity, n, batch):
        hit: set[int] = set()
        for t in range(start, min(n, start + batch)):
            slot = int(u[t] * (t + 1))
            if slot < capacity and slot not in hit:
                hit.add(slot)
                slots[slot] = t
    return slots


def batch_end_for_all(seed: int, n: int, capacity: int, batch: int) -> list[int]:
    """Known to be wrong: every item of a batch draws as if it were the batch's last."""
    slots, u = list(range(capacity)), scalar_uniforms(seed, n)
    for start in range(capacity, n, batch):
        end = min(n, start + batch)
        for t in range(start, end):
            slot = int(u[t] * end)
            if slot < capacity:
                slots[slot] = t
    return slots


def real_reservoir(seed: int, n: int, capacity: int, batch: int) -> list[int]:
    return layout(filled(n, capacity=capacity, batch=batch, seed=seed))


def inclusion_chi_squared(
    reservoir: Callable[[int, int, int, int], list[int]],
    *, seeds: int = 600, n: int = 400, capacity: int = 40, batch: int = 120,
) -> float:  # fmt: skip
    """chi2/df of how often each item is held, over many seeds.

    Each count is binomial(seeds, capacity/n); the counts of one seed add up to `capacity`, so
    the statistic sum((count - mean)^2) / (seeds p (1-p)) has mean n - 1 after the usual
    correction n/(n-1), hence df = n - 1.
    """
    counts = np.zeros(n)
    for seed in range(seeds):
        held = reservoir(seed, n, capacity, batch)
        assert len(set(held)) == capacity
        counts[held] += 1
    p = capacity / n
    spread = ((counts - seeds * p) ** 2).sum() / (seeds * p * (1 - p)) * (n - 1) / n
    return float(spread / (n - 1))


# chi2/df over 399 degrees of freedom has standard deviation sqrt(2/399) = 0.071: five of them.
BAND = 5 * math.sqrt(2 / 399)


@pytest.mark.parametrize("reservoir", [real_reservoir, right_reservoir])
def test_every_item_is_kept_equally_often(reservoir):
    assert abs(inclusion_chi_squared(reservoir) - 1) < BAND


@pytest.mark.parametrize("mutant", [first_wins, batch_end_for_all])
def test_the_two_classic_mistakes_fail_the_same_check(mutant):
    assert inclusion_chi_squared(mutant) - 1 > BAND


def test_pairs_of_items_are_kept_together_as_often_as_chance_says():
    seeds, n, capacity = 3000, 8, 3
    pairs = np.zeros((n, n))
    for seed in range(seeds):
        held = layout(filled(n, capacity=capacity, batch=3, seed=seed))
        pairs[np.ix_(held, held)] += 1
    p = capacity * (capacity - 1) / (n * (n - 1))
    counts = pairs[np.triu_indices(n, 1)]
    assert np.abs(counts - seeds * p).max() < 4.5 * math.sqrt(seeds * p * (1 - p))


def test_two_seeds_keep_different_items():
    assert set(layout(filled(1000, seed=0))) != set(layout(filled(1000, seed=1)))


# --- sampling


@pytest.mark.parametrize("n", [0, 1, 19, 20, 25, 39, 40])
def test_a_sample_has_no_row_twice(n):
    buffer = filled(1000)
    for _ in range(20):
        x, y = buffer.sample(n)
        assert x.shape == (n, 3)
        assert len(set(y.tolist())) == n
        assert set(y.tolist()) <= set(layout(buffer))


def test_more_than_it_holds_gives_every_row():
    buffer = filled(1000)
    assert sorted(buffer.sample(41)[1].tolist()) == sorted(layout(buffer))


@pytest.mark.parametrize("n", [5, 30])
def test_samples_are_uniform_over_rows_and_over_order(n):
    buffer, draws, size = filled(40), 8000, 40
    counts = np.zeros((n, size))
    for _ in range(draws):
        counts[np.arange(n), buffer.sample(n)[1].numpy()] += 1
    # Place by place: 39 degrees of freedom each, n places.
    chi = ((counts - draws / size) ** 2 / (draws / size)).sum(axis=1) / (size - 1)
    assert np.abs(chi - 1).max() < 5 * math.sqrt(2 / (size - 1))
    totals = counts.sum(axis=0)
    p = n / size
    spread = ((totals - draws * p) ** 2).sum() / (draws * p * (1 - p)) * (size - 1) / size
    assert abs(spread / (size - 1) - 1) < 5 * math.sqrt(2 / (size - 1))


def test_sampling_changes_neither_what_is_stored_nor_what_will_be():
    quiet, sampled = filled(500), filled(500)
    for _ in range(30):
        sampled.sample(7)
    x, y = stream(900)
    quiet.add(x[500:], y[500:])
    sampled.add(x[500:], y[500:])
    assert layout(quiet) == layout(sampled)


def test_samples_repeat_with_the_seed_and_move_on_with_every_call():
    a, b = filled(500), filled(500)
    first = a.sample(8)[1]
    assert torch.equal(first, b.sample(8)[1])
    assert not torch.equal(first, a.sample(8)[1])


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = filled(500).sample(8)[1]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, filled(500).sample(8)[1])


# --- sample_like


def test_the_fraction_of_a_row_is_carried_to_the_next_batch():
    buffer, x = filled(500), torch.zeros(1, 3)
    assert [len(buffer.sample_like(x, 0.25)[0]) for _ in range(8)] == [0, 0, 0, 1, 0, 0, 0, 1]
    tenths = ReplayBuffer(40)
    tenths.add(*stream(50))
    assert sum(len(tenths.sample_like(x, 0.1)[0]) for _ in range(1000)) == 100


def test_sample_like_takes_the_dtype_and_the_labels_keep_theirs():
    buffer = filled(500)
    x, y = buffer.sample_like(torch.zeros(6, 3, dtype=torch.bfloat16), ratio=0.5)
    assert (x.dtype, x.shape, y.dtype, y.shape) == (torch.bfloat16, (3, 3), torch.int64, (3,))
    assert buffer.sample_like(torch.zeros(6, 3, dtype=torch.int64))[0].dtype == torch.float32


def test_an_empty_buffer_gives_zero_rows_that_concatenate():
    buffer = ReplayBuffer(10, fields=("x", "y", "task"))
    x, y = torch.ones(4, 1, 2, 2, dtype=torch.float64), torch.arange(4)
    parts = buffer.sample_like(x)
    assert [(p.dtype, tuple(p.shape)) for p in parts] == [
        (torch.float64, (0, 1, 2, 2)), (torch.int64, (0,)), (torch.int64, (0,)),
    ]  # fmt: skip
    assert torch.equal(torch.cat([x, parts[0]]), x)
    assert torch.equal(torch.cat([y, parts[1]]), y)


def test_a_batch_of_no_rows_fixes_the_schema_of_an_empty_buffer():
    buffer = ReplayBuffer(10)
    buffer.add(torch.zeros(0, 5), torch.zeros(0, 2, dtype=torch.float16))
    x, y = buffer.sample_like(torch.zeros(3, 5))
    assert (x.shape, y.shape, y.dtype) == ((0, 5), (0, 2), torch.float16)
    assert (len(buffer), buffer.seen) == (0, 0)


@pytest.mark.parametrize("ratio", [-0.1, math.inf, math.nan])
def test_a_ratio_out_of_range_is_refused_and_carries_nothing(ratio):
    buffer = filled(500)
    before = copy.deepcopy(buffer)
    with pytest.raises(InputError, match="finite ratio >= 0"):
        buffer.sample_like(torch.zeros(2, 3), ratio)
    assert same(buffer, before)


# --- resume


def test_a_resumed_buffer_continues_bit_for_bit():
    x, y = stream(3000)
    straight, stopped = ReplayBuffer(40, seed=9), ReplayBuffer(40, seed=9)
    for buffer in (straight, stopped):
        for start in range(0, 1500, 50):
            buffer.sample_like(x[start : start + 50], 0.33)
            buffer.add(x[start : start + 50], y[start : start + 50])
    resumed = ReplayBuffer(40, seed=9)
    resumed.load_state_dict(stopped.state_dict())
    assert same(resumed, stopped)
    for start in range(1500, 3000, 50):
        ours = resumed.sample_like(x[start : start + 50], 0.33)
        theirs = straight.sample_like(x[start : start + 50], 0.33)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for buffer in (straight, resumed):
            buffer.add(x[start : start + 50], y[start : start + 50])
    assert same(resumed, straight)


@pytest.mark.parametrize("n", [0, 13, 40, 41])
def test_a_state_of_any_fill_round_trips(n):
    buffer = filled(n) if n else ReplayBuffer(40)
    other = filled(77)
    other.load_state_dict(buffer.state_dict())
    assert same(buffer, other)
    buffer.add(*stream(200))
    other.add(*stream(200))
    assert same(buffer, other)


def test_a_state_is_a_snapshot():
    buffer = filled(40)
    state = buffer.state_dict()
    buffer.add(*stream(1000))
    assert state["rows"]["y"].tolist() == list(range(40))


def damaged(state: dict) -> Iterator[tuple[str, dict]]:
    slots, rows = state["slots"], state["rows"]
    keys = slots["keys"]
    yield "capacity=40", {**state, "capacity": 41}
    yield "policy='reservoir'", {**state, "policy": "ring"}
    yield "seed=0", {**state, "seed": 1}
    yield "version=2", {**state, "version": 3}
    yield "fields=", {**state, "fields": ["x", "z"]}
    yield "entries", {name: value for name, value in state.items() if name != "slots"}
    yield "entries", {**state, "more": 1}
    yield "seen=-1", {**state, "seen": -1}
    yield "draws=", {**state, "draws": 1 << 80}
    yield "carry=nan", {**state, "carry": math.nan}
    yield r"int64 \[30\]|buffer held 30", {**state, "seen": 30}
    yield r"int64 \[40\]", {**state, "slots": {**slots, "keys": keys[:-1]}}
    yield r"int64 \[40\]", {**state, "slots": {**slots, "keys": keys.double()}}
    yield "same key", {**state, "slots": {**slots, "keys": torch.cat([keys[1:], keys[1:2]])}}
    yield "rows must hold", {**state, "rows": {"x": rows["x"]}}
    yield "rows must hold", {**state, "rows": {}}
    yield "y has 39 rows", {**state, "rows": {**rows, "y": rows["y"][1:]}}
    yield "x has NaN", {**state, "rows": {**rows, "x": rows["x"] / 0 * 0}}
    yield "y must be", {**state, "rows": {**rows, "y": [1] * 40}}


def test_a_damaged_or_foreign_state_is_refused_and_changes_nothing():
    buffer, other = filled(500), filled(90)
    before = copy.deepcopy(other)
    for message, state in damaged(buffer.state_dict()):
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(state)
        assert same(other, before), message
    with pytest.raises(CheckpointError, match="got list"):
        other.load_state_dict([1])


# --- what is stored


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [(), (1,), (3, 2, 2)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype, row):
    values = torch.randint(0, 2, (30, *row), generator=random.generator(0, "rows")).to(dtype)
    buffer = ReplayBuffer(8, fields=("v", "id"))
    for start in range(0, 30, 7):
        buffer.add(values[start : start + 7], torch.arange(30)[start : start + 7])
    got, ids = buffer.sample(8)
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.uint8), values[ids].view(torch.uint8)) if row else True
    assert got.tolist() == values[ids].tolist() if dtype != torch.float8_e4m3fn else True
    other = ReplayBuffer(8, fields=("v", "id"))
    other.load_state_dict(buffer.state_dict())
    assert other.sample(8)[1].tolist() == buffer.sample(8)[1].tolist()


def test_strided_and_odd_tensors_are_copied_as_they_read():
    base = torch.arange(24.0).reshape(4, 6)
    views = [
        base.T, base[:, ::2], base[:, :1], base[::2], base[:1, :1].expand(5, 3),
        torch.view_as_complex(base.reshape(4, 3, 2)).conj().imag,
    ]  # fmt: skip
    for view in views:
        buffer = ReplayBuffer(50, fields=("v",))
        buffer.add(view)
        assert torch.equal(buffer.state_dict()["rows"]["v"], view)


def test_neither_side_can_write_into_the_other():
    x, y = stream(5)
    buffer = ReplayBuffer(10)
    buffer.add(x, y)
    x.zero_(), y.zero_()
    assert layout(buffer) == [0, 1, 2, 3, 4]
    for part in buffer.sample(5) + buffer.sample(2) + buffer.sample_like(x):
        part.fill_(7)
    for part in buffer.state_dict()["rows"].values():
        part.fill_(7)
    assert layout(buffer) == [0, 1, 2, 3, 4]


def test_no_graph_is_kept():
    x = torch.ones(3, 2, requires_grad=True)
    buffer = ReplayBuffer(10)
    buffer.add(x * 2, torch.arange(3))
    buffer.add(x, torch.arange(3))
    assert not buffer.sample(6)[0].requires_grad


def test_a_buffer_first_filled_in_inference_mode_works_outside_it():
    buffer = ReplayBuffer(4)
    with torch.inference_mode():
        buffer.add(*stream(3))
    buffer.add(*stream(3))
    x = buffer.sample(4)[0].requires_grad_()
    x.sum().backward()


def test_memory_is_set_aside_once():
    buffer = ReplayBuffer(100)
    assert buffer.nbytes == 0
    buffer.add(*stream(1))
    assert buffer.nbytes == 100 * (3 * 4 + 8 + 8 + 8)
    buffer.add(*stream(1000))
    assert buffer.nbytes == 100 * (3 * 4 + 8 + 8 + 8)


def test_large_finite_values_whose_sum_overflows_are_accepted():
    buffer = ReplayBuffer(4)
    buffer.add(torch.full((2, 2), 3e38), torch.arange(2))
    assert len(buffer) == 2


# --- bad input


def nan_at(x: Tensor, value: float) -> Tensor:
    return x.index_fill(1, torch.tensor([1]), value)


X, Y = stream(4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((X,), r"add\(x, y\) needs 2 tensors, got 1"),
        ((X, Y, Y), r"needs 2 tensors, got 3"),
        ((X, Y[:3]), "as many rows in each, got 4, 3"),
        ((X.double(), Y), r"got x torch.float64 \[4, 3\].*torch.float32 \[3\]"),
        ((X, Y.int()), "got y torch.int32"),
        ((X[:, :2], Y), r"got x torch.float32 \[4, 2\]"),
        ((nan_at(X, math.nan), Y), "x: it has NaN or infinite"),
        ((nan_at(X, math.inf), Y), "x: it has NaN or infinite"),
        ((nan_at(X, -math.inf), Y), "x: it has NaN or infinite"),
        ((X.numpy(), Y), "x: it must be a real tensor .* got ndarray"),
        ((X, torch.tensor(3)), r"y: it must be a real tensor"),
        ((X.to(torch.complex64), Y), "x: it must be a real tensor"),
        ((X.to_sparse(), Y), "x: it must be dense rows"),
        ((X[:, :0], Y), "at least one element"),
    ],
)
@pytest.mark.parametrize("seen", [0, 10, 500])
def test_a_bad_batch_is_refused_by_name_and_changes_nothing(values, message, seen):
    buffer = filled(seen)
    if not seen:
        buffer.add(X[:0], Y[:0])
    before = copy.deepcopy(buffer)
    with pytest.raises(InputError, match=message):
        buffer.add(*values)
    assert same(buffer, before)


def test_a_refused_first_batch_fixes_no_schema():
    buffer = ReplayBuffer(4)
    with pytest.raises(InputError):
        buffer.add(X, nan_at(X, math.nan))
    assert buffer.nbytes == 0
    buffer.add(Y, X)


def test_an_empty_buffer_says_what_to_do():
    with pytest.raises(InputError, match=r"add\(\) a batch first.*sample_like"):
        ReplayBuffer(4).sample(1)


@pytest.mark.parametrize("n", [-1, 1.5, True, "3"])
def test_a_sample_size_that_is_no_count_is_refused(n):
    with pytest.raises(InputError, match="whole n >= 0"):
        filled(50).sample(n)


def test_a_wrong_buffer_is_refused():
    with pytest.raises(UnknownNameError, match="no replay policy 'fifo'; choose one of: reservoir"):
        ReplayBuffer(4, "fifo")
    for capacity in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="whole capacity >= 1"):
            ReplayBuffer(capacity)
    for fields in ((), ("x", "x"), "xy"):
        with pytest.raises(InputError, match="different names"):
            ReplayBuffer(4, fields=fields)
    with pytest.raises(InputError, match=r"needs a batch x \[n, ...\]"):
        filled(5).sample_like(torch.tensor(1.0))
