"""Episodes by law: what is drawn, how it is labelled, and that number i is a function of i."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.data import Batch
from tessera.data.few_shot import episodes
from tessera.errors import InputError


def numbered(sizes: list[int], labels: list[int] | None = None) -> Batch:
    """Each example is its own number; classes of these sizes, their rows mixed up."""
    y = torch.tensor(labels or list(range(len(sizes)))).repeat_interleave(torch.tensor(sizes))
    return Batch(torch.arange(len(y)).view(-1, 1), y[torch.randperm(len(y))])


@given(
    sizes=st.lists(st.integers(4, 9), min_size=3, max_size=8),
    shots=st.integers(1, 2),
    queries=st.integers(1, 2),
    index=st.integers(0, 10**9),
)
def test_support_and_query_share_classes_and_no_example(sizes, shots, queries, index):
    examples = numbered(sizes)
    drawn = episodes(examples, ways=3, shots=shots, queries=queries, tasks=4, seed=5)
    support, query = drawn[index]
    assert support.x.shape == (4, 3 * shots, 1)
    assert query.x.shape == (4, 3 * queries, 1)
    for task in range(4):
        rows = torch.cat([support.x[task], query.x[task]]).flatten()
        assert len(rows.unique()) == len(rows)  # none twice, so none in both
        true = [examples.y[part.x[task].flatten()].view(3, -1) for part in (support, query)]
        assert all((of == of[:, :1]).all() for of in true)  # a label is one class
        assert true[0][:, 0].tolist() == true[1][:, 0].tolist()  # the same in both sets
        assert len(true[0][:, 0].unique()) == 3
    for part, each in ((support, shots), (query, queries)):
        assert part.y.tolist() == [[label for label in range(3) for _ in range(each)]] * 4


def test_number_i_is_a_function_of_seed_and_i():
    examples = numbered([6] * 7)
    options = {"ways": 4, "shots": 2, "queries": 3, "tasks": 3}
    one, other = (episodes(examples, seed=1, **options) for _ in range(2))
    passed = list(itertools.islice(one, 5))
    for index in (4, 0, 2):  # resumed anywhere, in any order
        for a, b in zip(passed[index], other[index], strict=True):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)
    assert not torch.equal(passed[0][0].x, passed[1][0].x)
    assert not torch.equal(passed[0][0].x, episodes(examples, seed=2, **options)[0][0].x)
    # Nor does it depend on, or move, the process-wide generator.
    before = torch.get_rng_state()
    torch.manual_seed(123)
    again = one[3][0].x
    assert torch.equal(again, passed[3][0].x)
    torch.set_rng_state(before)
    _ = one[3]
    assert torch.equal(torch.get_rng_state(), before)


def test_every_class_gets_every_label_and_every_example_is_drawn_equally_often():
    examples = numbered([4, 8, 4])
    drawn = episodes(examples, ways=2, shots=1, queries=1, tasks=6000)
    support, query = drawn[0]
    labels = torch.zeros(3, 2)
    true = examples.y[support.x[..., 0]]
    labels.index_put_((true.flatten(), support.y.flatten()), torch.ones(()), accumulate=True)
    # 2000 expected in each cell; five standard deviations are 183.
    assert ((labels - 2000).abs() < 183).all(), labels
    for part in (support, query):
        counts = part.x.flatten().bincount(minlength=16).double()
        expected = 4000 / torch.tensor([4, 8, 4], dtype=torch.float64)[examples.y]
        assert ((counts - expected).abs() < 5 * expected.sqrt()).all(), counts


def test_labels_may_be_any_numbers_and_inputs_of_any_shape_and_dtype():
    y = torch.tensor([70, -3, 70, -3])
    x = torch.arange(24, dtype=torch.uint8).view(4, 2, 3)
    support, query = episodes(Batch(x, y), ways=2, shots=1, queries=1, tasks=1)[0]
    assert (support.x.shape, support.x.dtype) == ((1, 2, 2, 3), torch.uint8)
    rows = sorted(torch.cat([support.x[0], query.x[0]])[:, 0, 0].tolist())
    assert rows == [0, 6, 12, 18]  # two classes of two: every example is used


def test_examples_may_be_a_pair_of_tensors_or_arrays_or_have_x_and_y():
    x, y = numbered([4, 5])
    given = ((x, y), (x.numpy(), y.numpy()), Batch(x, y), SimpleNamespace(x=x, y=y))
    drawn = [episodes(g, ways=2, shots=1, queries=2)[0][1].x for g in given]
    assert all(torch.equal(d, drawn[0]) for d in drawn)
    for wrong in (x, (x,), [x, y], SimpleNamespace(x=x)):
        with pytest.raises(InputError, match=r"takes examples with x and y, or \(x, y\), got"):
            episodes(wrong)


def test_an_episode_keeps_nothing_of_the_examples():
    examples = numbered([4, 4])
    kept = examples.x.clone()
    support, _ = episodes(examples, ways=2, shots=1, queries=1)[0]
    support.x.zero_()
    assert torch.equal(examples.x, kept)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([4, 4], {"ways": 3}, "episodes of 3 ways need as many classes, there are 2"),
        ([4, 3, 4], {"ways": 2, "queries": 3}, r"need 1 \+ 3 examples .* class 1 has 3; leave it"),
        ([4, 4], {"ways": 0}, "needs ways >= 1, got 0"),
        ([4, 4], {"ways": 2, "shots": 1.0}, "needs shots >= 1, got 1.0"),
        ([4, 4], {"ways": 2, "tasks": True}, "needs tasks >= 1, got True"),
        ([4, 4], {"ways": 2, "queries": -1}, "needs queries >= 1, got -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(sizes, options, message):
    with pytest.raises(InputError, match=message):
        episodes(numbered(sizes), **{"queries": 1} | options)


def test_what_are_no_examples_is_refused():
    for x, y in (
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(3, 2), torch.zeros(3)),
        (torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int64)),
        (torch.zeros(()), torch.zeros(1, dtype=torch.int64)),
    ):
        with pytest.raises(InputError, match=r"needs x \[n, ...\] and y int64 \[n\], got"):
            episodes(Batch(x, y))
    with pytest.raises(InputError, match="need as many classes, there are 0"):
        episodes(Batch(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(IndexError, match="count from 0"):
        episodes(numbered([4, 4]), ways=2, queries=1)[-1]
