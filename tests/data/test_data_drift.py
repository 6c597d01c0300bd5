"""Drift detectors: equal to River's step by step, exact to resume, one error a bad input."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from river import drift

from tessera.data import ADWIN, PageHinkley
from tessera.errors import CheckpointError, InputError, UnknownNameError

N = 100_000
KINDS = {"ADWIN": ADWIN, "PageHinkley": PageHinkley}


def streams(n: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    half = n // 2
    abrupt = np.concatenate([rng.random(half) < 0.2, rng.random(n - half) < 0.5])
    return {
        "bernoulli": abrupt.astype(float).tolist(),
        "gaussian": (rng.normal(0, 1, n) + (np.arange(n) // 5000 % 3)).tolist(),
        "gradual": (rng.random(n) < np.linspace(0.1, 0.6, n)).astype(float).tolist(),
    }


@pytest.mark.parametrize("stream", ["bernoulli", "gaussian", "gradual"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ADWIN", {}),
        ("ADWIN", {"delta": 0.05, "clock": 7, "max_buckets": 2}),
        ("ADWIN", {"delta": 0.3, "min_window_length": 20, "grace_period": 50}),
        ("PageHinkley", {}),
        ("PageHinkley", {"threshold": 5.0, "mode": "down"}),
        ("PageHinkley", {"threshold": 10.0, "delta": 0.1, "alpha": 0.99, "mode": "up"}),
    ],
)
def test_it_is_rivers_at_every_step(kind: str, settings: dict[str, Any], stream: str) -> None:
    ours, theirs = KINDS[kind](**settings), getattr(drift, kind)(**settings)
    detected = 0
    for t, value in enumerate(streams(N)[stream]):
        alarm = ours.update(value)
        theirs.update(value)
        assert alarm == ours.drift_detected == theirs.drift_detected, t
        detected += alarm
        if isinstance(ours, ADWIN) and t % 1000 == 0:
            assert ours.width == theirs.width
            assert ours.mean == pytest.approx(theirs.estimation, abs=1e-9)
    assert detected > 0 or settings.get("mode")


def test_adwin_is_found_to_differ_when_its_bound_is_wrong() -> None:
    """The comparison above can fail: a delta a tenth off is seen."""
    ours, theirs = ADWIN(delta=0.0022, clock=1), drift.ADWIN(delta=0.002, clock=1)
    differ = 0
    for value in streams(20_000)["gradual"]:
        ours.update(value)
        theirs.update(value)
        differ += ours.drift_detected != theirs.drift_detected
    assert differ > 0


def test_adwin_by_hand() -> None:
    """One bucket of each value: the cut is the closed form of the bound."""
    ours = ADWIN(clock=1, grace_period=0, min_window_length=1, max_buckets=100, delta=0.3)
    values = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    alarms = [ours.update(v) for v in values]

    def cut(n: int) -> bool:
        window = np.array(values[:n])
        log = math.log(2 * math.log(n) / 0.3)
        found = False
        for k in range(1, n):
            m = 1 / k + 1 / (n - k)
            bound = math.sqrt(2 * m * window.var() * log) + 2 / 3 * m * log
            found |= bool(abs(window[:k].mean() - window[k:].mean()) > bound)
        return found

    first = next((n for n in range(2, 7) if cut(n)), None)
    assert (alarms.index(True) + 1 if True in alarms else None) == first


@pytest.mark.parametrize("kind", KINDS)
def test_stationary_streams_raise_no_alarm(kind: str) -> None:
    rng = np.random.default_rng(1)
    detector = KINDS[kind]()
    if kind == "ADWIN":
        assert not any(map(detector.update, (rng.random(150_000) < 0.2).astype(float).tolist()))
    else:
        assert not any(map(detector.update, [0.25] * 10_000))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 1, 777, 5001])
def test_a_resumed_detector_goes_on_bit_for_bit(kind: str, cut: int) -> None:
    values = streams(10_000)["gaussian"]
    whole, first, second = KINDS[kind](), KINDS[kind](), KINDS[kind]()
    for v in values:
        whole.update(v)
    for v in values[:cut]:
        first.update(v)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for v in values[cut:]:
        second.update(v)
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(kind: str, value: float) -> None:
    detector = KINDS[kind]()
    for v in (0.0, 1.0, 0.5):
        detector.update(v)
    before = detector.state_dict()
    with pytest.raises(InputError, match=f"{kind}.update needs a finite value, got"):
        detector.update(value)
    assert detector.state_dict() == before


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ADWIN", {"delta": 0.0}),
        ("ADWIN", {"clock": 0}),
        ("ADWIN", {"max_buckets": 0}),
        ("ADWIN", {"min_window_length": 0}),
        ("ADWIN", {"grace_period": -1}),
        ("PageHinkley", {"threshold": 0.0}),
        ("PageHinkley", {"alpha": 1.5}),
        ("PageHinkley", {"delta": -1.0}),
        ("PageHinkley", {"min_instances": 0}),
    ],
)
def test_settings_out_of_range(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{kind} needs {next(iter(settings))}"):
        KINDS[kind](**settings)


def test_an_unknown_mode_names_the_known() -> None:
    with pytest.raises(UnknownNameError, match="up, down, both"):
        PageHinkley(mode="sideways")


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_others_are_refused(kind: str) -> None:
    detector, other = KINDS[kind](), KINDS[kind](delta=0.01)
    before = detector.state_dict()
    with pytest.raises(CheckpointError, match="build it as the saved one was"):
        detector.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match=f"no state of {kind}"):
        detector.load_state_dict({"kind": "KSWIN"})
    assert detector.state_dict() == before


def test_a_damaged_state_of_adwin_is_refused() -> None:
    detector = ADWIN()
    for v in range(50):
        detector.update(v % 2)
    state = detector.state_dict()
    state["rows"][0].pop()
    with pytest.raises(CheckpointError, match="do not add up"):
        detector.load_state_dict(state)
