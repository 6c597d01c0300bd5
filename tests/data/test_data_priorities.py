"""The sums that a prioritized buffer draws from: with the C kernel as without, to the same bits."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import pytest
import torch

from tessera.data.priorities import BlockSums, Doubles, find_in_numpy, put_in_numpy
from tessera.data.replay import ReplayBuffer
from tessera.errors import InputError
from tessera.ops import kernels

FORMS = ("numpy", "C")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms, whichever this machine would take by itself."""
    if request.param == "C":
        if shutil.which("cc") is None:
            pytest.skip("no C compiler here")
        assert kernels.available(wait_s=120)
        assert BlockSums(100)._kernel() is not None
    else:
        monkeypatch.setattr(BlockSums, "_kernel", lambda self: None)
    return str(request.param)


def empty_levels(size: int) -> list[Doubles]:
    return [np.zeros_like(level) for level in BlockSums(size)._levels]


def weights_of(n: int, seed: int) -> Doubles:
    """Over many magnitudes, and every third nothing."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(-20, 20, n)) * (rng.integers(0, 3, n) > 0)


@needs_compiler
@pytest.mark.parametrize("size", [65, 4096, 4097, 5000, 300_000])
def test_the_kernel_has_numpys_bits(size: int) -> None:
    assert kernels.available(wait_s=120)
    sums, levels = BlockSums(size), empty_levels(size)
    assert sums._kernel() is not None
    rng = np.random.default_rng(size)
    for n in (size, 1, 0, 64, 63, 700):
        places = np.arange(size) if n == size else rng.integers(0, size, n)
        weights = weights_of(n, seed=n)
        sums.put(places, weights)
        put_in_numpy(levels, places, weights)
        assert all(map(np.array_equal, sums._levels, levels))
    masses = np.append(rng.random(3000) * sums.total, [0.0, sums.total, 2 * sums.total])
    before = masses.copy()
    assert np.array_equal(sums.find(masses), find_in_numpy(levels, masses))
    assert np.array_equal(masses, before)
    sums.put(places[:70], 2.5)
    put_in_numpy(levels, places[:70], 2.5)
    assert all(map(np.array_equal, sums._levels, levels))


@pytest.mark.parametrize("size", [64, 65, 5000])
def test_every_sum_is_that_of_its_weights(size: int, form: str) -> None:
    sums, true = BlockSums(size), np.zeros(size)
    rng = np.random.default_rng(0)
    for _ in range(20):
        places = rng.integers(0, size, 100)
        weights = rng.exponential(1.0, 100)
        sums.put(places, weights)
        for place, weight in zip(places, weights, strict=True):
            true[place] = weight  # of a place named twice, the last counts
    assert np.array_equal(sums.get(np.arange(size)), true)
    assert sums.total == pytest.approx(math.fsum(true), rel=1e-14)


def test_a_mass_belongs_to_the_place_a_running_sum_reaches_it(form: str) -> None:
    weights = np.random.default_rng(1).integers(0, 4, 5000).astype(np.float64)
    sums = BlockSums(5000)
    sums.put(np.arange(5000), weights)
    total = int(weights.sum())  # whole numbers: no sum is rounded
    masses = np.arange(2 * total) / 2
    expected = np.searchsorted(np.cumsum(weights), masses, side="right")
    assert np.array_equal(sums.find(masses), expected)


def test_a_place_with_no_weight_is_never_found(form: str) -> None:
    # Each mass lies just where a block, or a weight, ends: rounding puts the rest on either side.
    weights = weights_of(5000, seed=2)
    sums = BlockSums(5000)
    sums.put(np.arange(5000), weights)
    ends = np.cumsum(weights)
    masses = np.concatenate([ends, np.nextafter(ends, 0), np.nextafter(ends, np.inf), [0.0]])
    assert (weights[sums.find(np.minimum(masses, sums.total))] > 0).all()


def test_rows_of_a_ring_take_weights_by_their_position(form: str) -> None:
    sums = BlockSums(100)
    positions = np.array([150, 151, 249, 150, 149])  # the last has left a ring of 100
    weights = np.array([1.0, 2.0, 3.0, 4.0, 9.0])
    assert sums.put_ring(positions, weights, seen=250, capacity=100) == (4, 9.0)
    assert sums.get(np.array([50, 51, 49])).tolist() == [4.0, 2.0, 3.0]
    assert sums.total == 9.0
    many = np.arange(150, 250).repeat(7)
    assert sums.put_ring(many, many * 1.0, seen=250, capacity=100) == (700, 249.0)
    assert sums.get(np.arange(100)).tolist() == [*range(200, 250), *range(150, 200)]
    growing = BlockSums(100)
    assert growing.put_ring(np.array([0, 4]), np.ones(2), seen=5, capacity=100) == (2, 1.0)
    assert growing.get(np.arange(5)).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("position", "weight"),
    [(-1, 1.0), (250, 1.0), (200, 0.0), (200, -1.0), (200, math.nan), (200, math.inf)],
)
def test_a_ring_refuses_all_if_it_refuses_one(position: int, weight: float, form: str) -> None:
    sums = BlockSums(100)
    positions, weights = np.array([201, position, 202]), np.array([5.0, weight, 6.0])
    count, largest = sums.put_ring(positions, weights, seen=250, capacity=100)
    assert count == -1
    assert math.isnan(largest)
    assert sums.total == 0.0


def test_a_copy_is_another(form: str) -> None:
    sums = BlockSums(100)
    sums.put(np.arange(100), np.ones(100))
    twin, shallow = copy.deepcopy(sums), copy.copy(sums)
    twin.put(np.array([3]), np.array([11.0]))
    assert (sums.total, twin.total, shallow.total) == (100.0, 110.0, 100.0)
    assert sums.find(np.array([3.5])).tolist() == twin.find(np.array([13.5])).tolist() == [3]


@pytest.mark.parametrize("place", [5056, 1 << 40])
def test_a_place_out_of_range_changes_nothing(place: int, form: str) -> None:
    sums = BlockSums(5000)
    with pytest.raises(IndexError):
        sums.put(np.array([3, place]), np.ones(2))
    assert sums.total == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_priorities_of_every_dtype_are_taken_as_they_are(dtype: torch.dtype, form: str) -> None:
    buffer = ReplayBuffer(100, "prioritized", fields=("x",))
    buffer.add(torch.arange(100))
    given = (torch.arange(100, 300, 2) % 128 + 1).to(dtype)
    assert buffer.update_priorities(torch.arange(100), given) == 100
    assert torch.equal(buffer.state_dict()["slots"]["priorities"], given.double())
    strided = torch.arange(0, 200, 2)[:50]
    assert buffer.update_priorities(strided[:50:2], given[:50:2]) == 25
    needs_grad = torch.ones(2, requires_grad=True)
    assert buffer.update_priorities(torch.tensor([1, 2]), needs_grad) == 2


def test_a_refused_update_says_what_was_wrong(form: str) -> None:
    buffer = ReplayBuffer(100, "prioritized", fields=("x",))
    buffer.add(torch.arange(150))
    before = buffer.state_dict()
    for positions, priorities, message in (
        ([60, 70], [1.0, 0.0], r"finite priorities > 0.*smallest is 0\.0, the largest 1\.0"),
        ([60, 70], [1.0, math.inf], "finite priorities > 0.*the largest inf"),
        ([60, 70], [1.0, math.nan], "finite priorities > 0.*smallest is nan"),
        ([60, 150], [1.0, 1.0], r"positions lie in 0 \.\. 149, got 60 \.\. 150"),
        ([-1, 70], [1.0, 1.0], r"positions lie in 0 \.\. 149, got -1 \.\. 70"),
    ):
        with pytest.raises(InputError, match=message):
            buffer.update_priorities(torch.tensor(positions), torch.tensor(priorities))
    after = buffer.state_dict()
    assert torch.equal(before["slots"]["priorities"], after["slots"]["priorities"])
    assert after["rule"] == {"largest": 1.0}
    assert buffer.update_priorities(torch.tensor([0, 149]), torch.tensor([50.0, 7.0])) == 1
    assert buffer.state_dict()["rule"] == {"largest": 50.0}
