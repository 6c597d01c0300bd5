"""The schedule that drift drives: its pulse by hand, its state, any detector, its errors."""

from __future__ import annotations

import json

import pytest
import torch
from river import drift

from tessera import data, opt
from tessera.errors import CheckpointError, InputError


class At:
    """A detector that fires at given updates."""

    def __init__(self, *when: int) -> None:
        self.when, self.count, self.drift_detected = when, 0, False

    def update(self, value: float) -> None:
        self.count += 1
        self.drift_detected = self.count in self.when


def test_the_pulse_halves_every_half_life_and_is_one_at_a_drift() -> None:
    schedule = opt.DriftSchedule(At(3), half_life=20)
    assert schedule.pulse == 1.0
    pulses = []
    for _ in range(5):
        schedule.update(0.5, rows=10)
        pulses.append(schedule.pulse)
    assert pulses == pytest.approx([2**-0.5, 0.5, 1.0, 2**-0.5, 0.5])
    assert schedule.drifts == [30]


def test_between_runs_from_calm_to_drifted_and_sets_every_group() -> None:
    schedule = opt.DriftSchedule(At(), half_life=10)
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    schedule.set_rate(optimizer, calm=0.1, drifted=0.3)
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.3]
    schedule.update(0.0, rows=10)
    assert schedule.between(0.1, 0.3) == pytest.approx(0.2)
    schedule.update(0.0, rows=10_000)
    schedule.set_rate(optimizer, calm=0.1, drifted=0.3)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.1])


def test_rivers_detectors_work_by_shape_and_say_that_they_cannot_be_saved() -> None:
    ours, theirs = (opt.DriftSchedule(d) for d in (data.ADWIN(), drift.ADWIN()))
    values = data.bernoulli(4000, p=(0.1, 0.6), drifts=[2000], seed=3).tolist()
    assert [ours.update(v) for v in values] == [theirs.update(v) for v in values]
    assert ours.drifts == theirs.drifts
    assert len(ours.drifts) == 1
    with pytest.raises(CheckpointError, match=r"ADWIN has no state_dict.*data.PageHinkley"):
        theirs.state_dict()


def test_a_saved_schedule_goes_on() -> None:
    def new() -> opt.DriftSchedule:
        return opt.DriftSchedule(data.PageHinkley(threshold=1.0), half_life=100, every=10)

    values = data.bernoulli(3000, p=(0.1, 0.6), drifts=[1000, 2000], seed=1).tolist()
    whole, first, second = new(), new(), new()
    found = [whole.update(v, rows=3) for v in values]
    for v in values[:1200]:
        first.update(v, rows=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.update(v, rows=3) for v in values[1200:]] == found[1200:]
    assert second.state_dict() == whole.state_dict()
    assert second.pulse == whole.pulse


def test_batches_of_any_size_become_values_of_as_many_rows() -> None:
    class Told(At):
        def update(self, value: float) -> None:
            super().update(value)
            values.append(value)

    values: list[float] = []
    schedule = opt.DriftSchedule(Told(2), every=4)
    found = [schedule.update(v, rows=n) for v, n in ((1.0, 1), (0.0, 2), (0.5, 2), (1.0, 8))]
    assert values == [0.4, 1.0]
    assert found == [False, False, False, True]
    assert schedule.drifts == [13]


def test_what_it_refuses() -> None:
    with pytest.raises(InputError, match="half_life > 0 in rows, got 0"):
        opt.DriftSchedule(At(), half_life=0)
    with pytest.raises(InputError, match=r"a drift detector with update\(value\).*got object"):
        opt.DriftSchedule(object())
    with pytest.raises(InputError, match="every >= 1 rows, got 0"):
        opt.DriftSchedule(At(), every=0)
    detector = At()
    schedule = opt.DriftSchedule(detector)
    for value, rows in ((float("nan"), 1), (float("inf"), 1), (0.5, 0)):
        with pytest.raises(InputError, match="a finite value of >= 1 rows"):
            schedule.update(value, rows=rows)
    assert detector.count == 0
    other = opt.DriftSchedule(data.ADWIN(), half_life=5.0)
    with pytest.raises(CheckpointError, match=r"half_life=5.0, the one that loads it 800.0"):
        opt.DriftSchedule(data.ADWIN()).load_state_dict(other.state_dict())


@pytest.mark.parametrize("lost", ["rows", "since", "part", "drifts", "detector"])
def test_a_damaged_state_changes_nothing(lost: str) -> None:
    told, fresh = (opt.DriftSchedule(data.ADWIN()) for _ in range(2))
    for i in range(100):
        told.update(i % 2)
    state = {name: value for name, value in told.state_dict().items() if name != lost}
    before = fresh.state_dict()
    with pytest.raises(CheckpointError, match="damaged state of DriftSchedule"):
        fresh.load_state_dict(state)
    assert fresh.state_dict() == before


def test_a_state_with_a_detector_wants_one_that_loads() -> None:
    with pytest.raises(CheckpointError, match="cannot load it"):
        opt.DriftSchedule(At()).load_state_dict(opt.DriftSchedule(data.ADWIN()).state_dict())
