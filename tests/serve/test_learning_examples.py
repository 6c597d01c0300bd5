"""What a round is fitted to: which feedback, in which part, in which form."""

from __future__ import annotations

import random as plain
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve._learning import Place, policy

from tessera.errors import InputError
from tessera.serve.feedback import Said
from tessera.serve.fitting_values import FitSettings
from tessera.serve.gates import Policy
from tessera.serve.learning_drift import Seen, after_change, detector_of, follow
from tessera.serve.learning_examples import is_held_out
from tessera.serve.learning_values import LearningPolicy
from tessera.serve.records import SYSTEM
from tessera.serve.rollout_values import Watch

PADDING = {"input_ids": 0, "attention_mask": 0}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(f"sqlite:///{tmp_path}/registry.db", tmp_path)
    yield made
    made.close()


def seen(place: Place, *, change: int = 0) -> Seen:
    return Seen(at=place.registry.audit.head()[0], change=change)


def tell(place: Place, request: str, rows: int, **inputs: torch.Tensor) -> None:
    """A request whose labels count its rows."""
    given_ = inputs or {"input": torch.full((rows, 2), float(request.split("-")[1]))}
    place.answered(request, given_, 1)
    place.labelled(request, list(range(rows)), [True] * rows, {"of": request})


def spans(place: Place, padding: dict | None = None, *, change: int = 0, **how: object):
    found = seen(place, change=change)
    return place.learning.spans(place.blobs, policy(**how), found, padding or {})


def test_each_request_is_in_one_part(place: Place) -> None:
    for i in range(60):
        tell(place, f"r-{i}", 1)
    found = spans(place, window=16, replay=8)
    assert found.new is not None
    assert found.old is not None
    assert found.held is not None
    apart = [f"r-{i}" for i in range(60) if is_held_out(f"r-{i}", 0.25)]
    rest = [f"r-{i}" for i in range(60) if f"r-{i}" not in apart]
    assert found.new.ids == rest[-16:]
    first = int(found.new.ids[0][2:])
    assert found.held.ids == [r for r in apart if int(r[2:]) > first]
    assert len(found.old.ids) == 8
    assert set(found.old.ids) <= set(rest[:-16])
    assert found.left_out == 0
    # The inputs, labels and slices are those of their ids.
    for part in (found.new, found.old, found.held):
        assert part.inputs["input"][:, 0].tolist() == [float(r[2:]) for r in part.ids]
        assert part.labels.tolist() == [0] * len(part.ids)
        assert [s["of"] for s in part.slices] == part.ids
    again = spans(place, window=16, replay=8)
    assert again.old is not None
    assert again.old.ids == found.old.ids
    other = spans(place, window=16, replay=8, fit=FitSettings(seed=1))
    assert other.old is not None
    assert other.old.ids != found.old.ids


def test_what_came_before_a_change_is_only_rehearsed(place: Place) -> None:
    for i in range(40):
        if i == 30:
            change = place.registry.audit.head()[0] + 1
        tell(place, f"r-{i}", 2)
    found = spans(place, change=change, window=100, replay=100)
    assert found.new is not None
    assert found.old is not None
    assert found.held is not None
    assert {int(r.partition("#")[0][2:]) for r in found.new.ids + found.held.ids} == set(
        range(30, 40)
    )
    assert all(int(r.partition("#")[0][2:]) < 30 for r in found.old.ids)
    assert found.new.ids[:2] == ["r-30#0", "r-30#1"] or is_held_out("r-30", 0.25)
    assert found.new.labels[:2].tolist() == [0, 1]
    assert spans(place, change=change, replay=0).old is None


def test_what_is_lost_or_of_another_form_is_left_out(place: Place) -> None:
    tell(place, "r-1", 1, input=torch.zeros(1, 5))
    tell(place, "r-2", 1, other=torch.zeros(1, 2))
    tell(place, "r-3", 1, input=torch.zeros(1, 2, dtype=torch.float64))
    place.registry.audit.append(
        "request",
        "acme",
        {"request": "r-4", "alias": "clf", "generation": 1, "delta": "", "blob": "0" * 64, "at": 0},
    )
    place.labelled("r-4", [1], [True], {})
    place.answered("r-5", {"input": torch.zeros(1, 2)}, 1)  # no feedback
    for i in range(6, 20):
        tell(place, f"r-{i}", 1)
    found = spans(place, replay=0)
    assert found.new is not None
    assert found.held is not None
    assert {*found.new.ids, *found.held.ids} == {f"r-{i}" for i in range(6, 20)}
    assert found.left_out == 4


def test_feedback_without_labels_is_no_example(place: Place) -> None:
    assert spans(place).new is None
    place.answered("r-1", {"input": torch.zeros(1, 2)}, 1)
    journal = place.registry.rollouts.journal
    answer = journal.answer("acme", "r-1")
    assert answer is not None
    said = Said.parse({"request": "r-1", "correct": False})
    journal.add("acme", said, said.outcomes(), answer, by=SYSTEM)
    assert spans(place).new is None


def test_sequences_are_padded_to_one_length(place: Place) -> None:
    for i, length in enumerate((3, 5, 2, 4, 3, 2)):
        tell(place, f"r-{i}", 1, input_ids=torch.full((1, length), 7))
    masked = {"input_ids": torch.full((1, 2), 7), "attention_mask": torch.tensor([[1, 0]])}
    tell(place, "r-6", 1, **masked)
    found = spans(place, PADDING, window=4, replay=2)
    parts = [p for p in (found.new, found.old, found.held) if p is not None]
    assert found.left_out == 0
    assert sum(len(p.ids) for p in parts) >= 6
    longest = {p.inputs["input_ids"].shape[1] for p in parts}
    assert len(longest) == 1
    for part in parts:
        ids, mask = part.inputs["input_ids"], part.inputs["attention_mask"]
        for row, id in enumerate(part.ids):
            length = (3, 5, 2, 4, 3, 2, 2)[int(id[2:])]
            assert ids[row].tolist() == [7] * length + [0] * (ids.shape[1] - length)
            assert int(mask[row].sum()) == (1 if id == "r-6" else length)


# --- drift ---------------------------------------------------------------------------------------


def rows(outcomes: str, *, generation: int = 1, arm: str = "", first: int = 1) -> list:
    return [
        SimpleNamespace(
            seq=first + i, generation=generation, arm=arm, outcomes=o, said='{"label":[0]}'
        )
        for i, o in enumerate(outcomes)
    ]


def since(generation: int, seq: int, width: int) -> tuple[int, int, str]:
    return seq - width + 1, width, "0" * width


@given(st.integers(0, 2**32), st.lists(st.integers(1, 60), max_size=8))
@settings(max_examples=30, deadline=None)
def test_in_pieces_it_sees_what_it_sees_in_one(seed: int, sizes: list[int]) -> None:
    draw = plain.Random(seed)
    stream = "".join("01"[draw.random() < (0.9 if i < 150 else 0.3)] for i in range(300))
    whole, drifts = follow(Seen(), rows(stream), since, least=10)
    state, found, left = Seen(), [], rows(stream)
    while left:
        size = sizes.pop() if sizes else len(left)
        state, more = follow(state, left[:size], since, least=10)
        found, left = found + more, left[size:]
    assert (state.at, state.change, state.changed, state.fresh) == (
        whole.at,
        whole.change,
        whole.changed,
        whole.fresh,
    )
    assert state.detector == whole.detector
    assert found == drifts


@pytest.mark.parametrize("at", [0, 7, 40, 93])
def test_a_change_is_found_where_it_was(at: int) -> None:
    draw = plain.Random(at)
    stream = "".join("01"[draw.random() < (0.97 if i < at else 0.2)] for i in range(120))
    assert abs(120 - at - after_change(stream)) <= 3


def test_without_a_change_all_is_new() -> None:
    draw = plain.Random(0)
    streams = ["".join("01"[draw.random() < 0.3] for _ in range(100)) for _ in range(200)]
    assert sum(after_change(stream) < 100 for stream in streams) < 20
    assert [after_change(s) for s in ("", "0", "1111", "0" * 50 + "1" * 50)] == [0, 1, 4, 100]


def test_getting_better_is_no_drift() -> None:
    state, drifts = follow(Seen(), rows("0" * 200 + "1" * 200), since, least=1)
    assert drifts == []
    assert state.change == 0
    assert detector_of(state).mean == 1.0


def test_only_what_the_alias_answered_counts_and_a_new_generation_begins_anew() -> None:
    state, drifts = follow(Seen(), rows("1" * 200), since, least=1)
    state, drifts = follow(state, rows("0" * 200, arm="candidate", first=201), since, least=1)
    assert drifts == []
    assert state.fresh == 400
    state, drifts = follow(state, rows("0" * 100, first=401), since, least=1)
    assert len(drifts) == 1
    assert state.changed > 0
    state, drifts = follow(state, rows("0" * 40, generation=2, first=501), since, least=1)
    assert drifts == []
    assert (state.change, state.changed, state.generation) == (0, 0, 2)
    before = state.detector
    state, drifts = follow(state, rows("1" * 40, generation=1, first=541), since, least=1)
    assert state.detector == before
    assert state.fresh == 580


# --- policies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"on": "monday"}, "on is one of drift, schedule, both; got 'monday'"),
        ({"often": 1}, "learning has no field 'often', only every_s, fit"),
        ({"tenant": "x"}, "learning has no field 'tenant'"),
        ({"min_new": 0}, "min_new is 1 to 4096 examples, got 0"),
        ({"window": True}, "window is 1 to 4096"),
        ({"replay": -1}, "replay is 0 to 4096"),
        ({"every_s": 0.1}, "every_s is 1 to"),
        ({"every_s": float("nan")}, "every_s is 1 to"),
        ({"rho": 1.5}, "rho is 0 to 1, got 1.5"),
        ({"lam": -1.0}, "lam is 0 to"),
        ({"holdout": 0.9}, "holdout is 0.05 to 0.5"),
        ({"promote": 1}, "promote is true or false"),
        ({"output": 3}, "output is a name"),
        ({"fit": 3}, "fit is an object"),
        ({"fit": {"rank": 3}}, "fit has no field 'rank', only kind, r"),
        ({"fit": {"r": "3"}}, "fit: r must be a whole number"),
        ({"fit": {"budget": {"ms": "long"}}}, "fit.budget.ms is a number > 0, got 'long'"),
        ({"fit": {"budget": {"hours": 1}}}, "budget has no field 'hours', only ms, joules, steps"),
        ({"fit": {"lr": 0}}, "fit.lr is a finite number > 0"),
        ({"fit": {"parent": "0" * 64}}, "fit has no parent here"),
        ({"gate": {"metric": "f1"}}, "a gate knows accuracy"),
        ({"gate": []}, "gate is an object"),
        ({"watch": {"n": 3}}, "watch has no field 'n', only min_n"),
        ({"watch": {}, "promote": False}, "it needs promote: true"),
    ],
)
def test_no_policy(said: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LearningPolicy.parse("acme", "clf", said)


def test_a_policy_survives_its_plain_values() -> None:
    made = policy(
        fit=FitSettings(r=3, sites=("0",), budget={"ms": 20}),
        gate=Policy(slices=("lang",)),
        watch=Watch(min_n=7),
    )
    again = LearningPolicy.parse("acme", "clf", made.json())
    assert again.json() == made.json()
    assert again.fit.r == 3
    assert again.watch is not None
    assert again.watch.min_n == 7
