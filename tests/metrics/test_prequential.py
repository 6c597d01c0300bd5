"""Prequential accuracy: by hand, against a loop over rows, and by law."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import CheckpointError, InputError, MetricError
from tessera.metrics import Prequential


def by_rows(guess: list[int], truth: list[int], classes: int) -> tuple[float, float, float]:
    """Accuracy, no-change and majority, one row after the other."""
    counts = [0] * classes
    last, hits = 0, [0, 0, 0]
    for g, y in zip(guess, truth, strict=True):
        hits[0] += g == y
        hits[1] += last == y
        hits[2] += counts.index(max(counts)) == y
        counts[y] += 1
        last = y
    a, b, c = (h / len(truth) for h in hits)
    return a, b, c


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60),
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.integers(1, 7),
)
def test_batches_count_as_rows_do(rows: list[tuple[int, int]], cuts: list[int], every: int) -> None:
    score, at = Prequential(4, every=every), 0
    guess, truth = (torch.tensor(column) for column in zip(*rows, strict=True))
    for cut in [*cuts, len(rows)]:
        if at < len(rows):
            score.update(guess[at : at + cut], truth[at : at + cut])
            at += cut
    got = (score.accuracy(), score.no_change(), score.majority())
    assert got == pytest.approx(by_rows(guess.tolist(), truth.tolist(), 4))
    assert [point[0] for point in score.curve] == list(range(every, len(rows) + 1, every))


def test_the_curve_is_of_the_rows_since_the_point_before() -> None:
    score = Prequential(2, every=2)
    score.update(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 1, 1, 1]))
    # no-change: 0 0 0 1 1; majority: 0 0 0 0 0 (of several the smallest)
    assert score.curve == [[2, 1.0, 1.0, 1.0], [4, 0.0, 0.5, 0.0]]


def test_kappa_temporal_is_zero_for_no_change_and_one_for_the_truth() -> None:
    truth = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    before = torch.cat([torch.tensor([0]), truth[:-1]])
    lazy, perfect = Prequential(2), Prequential(2)
    lazy.update(before, truth)
    perfect.update(truth, truth)
    assert lazy.kappa_temporal() == 0.0
    assert perfect.kappa_temporal() == 1.0


def test_a_saved_score_goes_on() -> None:
    torch.manual_seed(1)
    guess, truth = torch.randint(0, 3, (2, 500))
    whole, first, second = (Prequential(3, every=64) for _ in range(3))
    whole.update(guess, truth)
    first.update(guess[:123], truth[:123])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.update(guess[123:], truth[123:])
    assert second.state_dict() == whole.state_dict()


def test_what_it_refuses() -> None:
    with pytest.raises(MetricError, match="num_classes >= 2 and every >= 1, got 1, 200"):
        Prequential(1)
    score = Prequential(3)
    with pytest.raises(MetricError, match="tested no row yet; call update first"):
        score.accuracy()
    with pytest.raises(InputError, match=r"classes \[n\] and labels \[n\], n >= 1"):
        score.update(torch.tensor([0, 1]), torch.tensor([0]))
    with pytest.raises(InputError, match=r"labels 0 .. 2, got int64 0 .. 3; build Prequential"):
        score.update(torch.tensor([0, 1]), torch.tensor([0, 3]))
    assert score.rows == 0
    with pytest.raises(CheckpointError, match=r"num_classes=4, the one that loads it 3"):
        score.load_state_dict(Prequential(4).state_dict())


@pytest.mark.parametrize("lost", ["counts", "hits", "last", "part", "curve"])
def test_a_damaged_state_changes_nothing(lost: str) -> None:
    told, fresh = Prequential(3), Prequential(3)
    told.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
    state = {name: value for name, value in told.state_dict().items() if name != lost}
    before = fresh.state_dict()
    with pytest.raises(CheckpointError, match="damaged state of Prequential"):
        fresh.load_state_dict(state)
    assert fresh.state_dict() == before
