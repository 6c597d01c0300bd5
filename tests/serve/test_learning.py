"""Learning from feedback: a drift is seen, a candidate fitted, a gate decides, the alias moves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.serve._learning import ROUND_MS, Clock, Place, policy, together

from tessera.errors import BusyError, InputError, StorageError, UnknownNameError
from tessera.serve import rollout_schema
from tessera.serve.fitting_values import FitSettings
from tessera.serve.gates import Policy
from tessera.serve.learning_schema import budgets, learning
from tessera.serve.records import SYSTEM
from tessera.serve.rollout_values import Watch
from tessera.serve.web import Unavailable


@pytest.fixture
def place(url: str, tmp_path: Path) -> Iterator[Place]:
    made = Place(url, tmp_path)
    yield made
    made.close()


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[Place]:
    made = Place(f"sqlite:///{tmp_path}/registry.db", tmp_path)
    yield made
    made.close()


def test_it_adapts_by_itself(place: Place, url: str, tmp_path: Path) -> None:
    place.learning.set(policy(watch=Watch(min_n=50)), by=SYSTEM)
    place.traffic(12)
    place.learner.look()
    assert place.steps() == ["policy"]
    state = place.learning.state("acme", "clf")
    assert (state.fresh, state.changed, state.mean) == (192, 0, 1.0)

    place.traffic(5, drifted=True)
    place.learner.look()
    assert place.steps() == ["policy", "drift"]
    assert 64 <= place.learning.state("acme", "clf").changed < 128
    place.close()

    later = Place(url, tmp_path)  # a restart in between: what was seen is in the database
    later.asked = place.asked
    later.traffic(8, drifted=True)
    later.learner.look()
    assert later.steps() == ["policy", "drift", "fit", "gate"]
    generation, delta = later.alias()
    assert generation == 2
    assert delta
    drift, fit, gate = later.learning.steps("acme", "clf")[1:]
    assert drift.body["before"] == 1.0
    assert drift.body["now"] < 0.7
    assert (fit.delta, gate.delta) == (delta, delta)
    assert fit.body["why"] == "drift"
    assert fit.body["rehearsal"] is None
    assert gate.body["passed"]
    assert gate.body["generation"] == 2
    right, n = gate.body["overall"]["candidate"]
    assert right > 0.9 * n > gate.body["overall"]["incumbent"][0]
    held = later.registry.rollouts.gates.get("acme", "clf", gate.body["gate"])
    assert later.registry.rollouts.gates.evidence(held)["candidate"] == delta
    assert later.registry.rollouts.gates.watched("acme", "clf") == (2, delta)
    spent = later.learning.spending("acme")
    assert spent.ms == pytest.approx(fit.body["ms"], abs=0.01)
    assert not later.learning.state("acme", "clf").busy

    # Now the answers are right again, and nothing is due.
    later.traffic(12, drifted=True)
    later.learner.look()
    assert later.learning.state("acme", "clf").mean > 0.9
    assert later.steps()[-1] == "gate"
    t = rollout_schema.feedback
    with later.registry._ledger.read() as connection:
        rows = connection.execute(sa.select(t).order_by(t.c.seq)).all()
    for points in (1000, 7, 4):
        charted = later.learning.accuracy("acme", "clf", points)
        assert [p.drift for p in charted].count(True) == 1
        assert len(charted) == min(points, len(rows))
        at = 0
        for point in charted:
            told = rows[at : at + point.n // 16]
            assert len(told) - len(rows) // len(charted) in (0, 1)
            assert point.accuracy == "".join(r.outcomes for r in told).count("1") / point.n
            assert point.time_s == told[-1].received_s
            assert point.drift == (told[0].seq <= drift.body["at"] <= told[-1].seq)
            at += len(told)
        assert at == len(rows) == later.asked
    assert charted[-1].accuracy > 0.9
    later.registry.audit.verify()
    later.close()


def test_the_same_journal_gives_the_same_candidate(tmp_path: Path) -> None:
    found = []
    for name in "ab":
        (tmp_path / name).mkdir()
        made = Place(f"sqlite:///{tmp_path}/{name}/r.db", tmp_path / name)
        made.learning.set(policy(replay=64, rho=0.9), by=SYSTEM)
        made.traffic(10)
        made.traffic(14, drifted=True)
        made.learner.look()
        assert made.steps()[-1] == "gate"
        found.append(made.alias())
        made.close()
    assert found[0] == found[1]
    assert found[0][0] == 2


def test_a_schedule_goes_on_from_the_incumbent_and_rehearses(lite: Place) -> None:
    lite.learning.set(policy(on="schedule", every_s=60.0, rho=0.9, lam=1.0, replay=64), by=SYSTEM)
    lite.traffic(12, drifted=True)
    lite.learner.look()
    assert lite.steps() == ["policy"]  # the minute is not over
    lite.clock.now += 61
    lite.learner.look()
    assert lite.steps() == ["policy", "fit", "gate"]
    _, first = lite.alias()
    lite.clock.now += 61
    lite.learner.look()
    assert lite.steps()[-1] == "gate"  # nothing new
    lite.traffic(12, drifted=False)
    lite.learner.look()
    fit, gate = lite.learning.steps("acme", "clf")[-2:]
    assert fit.body["parent"] == first
    assert fit.body["why"] == "schedule"
    assert fit.body["rehearsal"]["rows"] == 64
    assert fit.body["rehearsal"]["rho"] == 0.9
    assert fit.body["settings"].get("r") is None
    assert gate.body["passed"], gate.text
    assert lite.alias()[0] == 3
    # A clock that is put back makes no schedule wait.
    lite.traffic(10)
    lite.clock.now -= 10_000
    lite.learner.look()
    assert lite.learning.steps("acme", "clf")[-1].seq > gate.seq


def test_what_is_refused_is_tried_again_more_and_more_seldom(lite: Place) -> None:
    strict = policy(gate=Policy(min_n=16, margin=0.99))
    lite.learning.set(strict, by=SYSTEM)
    lite.traffic(12)
    lite.traffic(12, drifted=True)
    lite.learner.look()
    assert lite.steps() == ["policy", "drift", "fit", "gate"]
    assert "refused" in lite.told()
    assert "0.99 is asked" in lite.told()
    assert lite.alias() == (1, "")
    state = lite.learning.state("acme", "clf")
    assert state.due == 2 * state.changed
    lite.learner.look()
    assert len(lite.steps()) == 4
    lite.traffic(16, drifted=True)
    lite.learner.look()
    assert lite.steps()[4:] == ["fit", "gate"]
    # Whoever moves the alias has dealt with it.
    record = lite.registry.deltas("acme")[0]
    lite.registry.set_alias("acme", "clf", record.hash, generation=1, by=SYSTEM)
    lite.traffic(1, drifted=True)
    lite.learner.look()
    assert lite.learning.state("acme", "clf").changed == 0


def test_a_person_may_promote(lite: Place) -> None:
    lite.learning.set(policy(promote=False), by=SYSTEM)
    lite.traffic(12)
    lite.traffic(12, drifted=True)
    lite.learner.look()
    assert "left for a person" in lite.told()
    assert lite.alias() == (1, "")
    gate = lite.learning.steps("acme", "clf")[-1]
    assert lite.registry.delta("acme", gate.delta).kind == "lora"


def test_too_few_held_out_examples_are_waited_for(lite: Place) -> None:
    lite.learning.set(policy(gate=Policy(min_n=100)), by=SYSTEM)
    lite.traffic(12)
    lite.traffic(12, drifted=True)
    lite.learner.look()
    assert lite.steps() == ["policy", "drift", "skip"]
    assert "held out since then, and the gate needs 100" in lite.told()
    state = lite.learning.state("acme", "clf")
    held = int(lite.told().split()[0])
    assert state.due == state.changed + 4 * (100 - held)
    assert lite.learning.spending("acme").ms == 0


def test_slices_of_feedback_are_the_gates(lite: Place) -> None:
    lite.learning.set(policy(gate=Policy(min_n=16, slices=("lang",), slice_min_n=5)), by=SYSTEM)
    lite.traffic(12)
    lite.traffic(6, drifted=True, slices={"lang": "de"})
    lite.traffic(6, drifted=True)
    lite.learner.look()
    gate = lite.learning.steps("acme", "clf")[-1]
    found = lite.registry.rollouts.gates.get("acme", "clf", gate.body["gate"])
    assert {s["value"] for s in found.decision["slices"]} <= {"de", ""}
    assert found.decision["slices"]


# --- asked for -----------------------------------------------------------------------------------


def test_a_round_can_be_asked_for(lite: Place) -> None:
    with pytest.raises(UnknownNameError, match="'clf' of acme does not learn"):
        lite.learner.run("acme", "clf")
    lite.learning.set(policy(), by=SYSTEM)
    nothing = lite.learner.run("acme", "clf")
    assert nothing.step.text == "there is no labelled example to fit to"
    assert lite.learner.run("acme", "clf").step.seq > nothing.step.seq  # said whenever one asks
    lite.traffic(10, drifted=True)
    found = lite.learner.run("acme", "clf")
    assert found.alias is not None
    assert found.alias.generation == 2
    assert found.step.body["why"] == "asked"
    lite.learning.end("acme", "clf", by=SYSTEM)
    assert lite.learning.policies() == []
    assert lite.told() == "learning ended"
    with pytest.raises(UnknownNameError, match="does not learn"):
        lite.learning.end("acme", "clf", by=SYSTEM)


def test_what_fails_is_said_once_charged_and_not_tried_at_once(lite: Place) -> None:
    lite.learning.set(policy(fit=FitSettings(sites="nowhere")), by=SYSTEM)
    lite.traffic(12)
    lite.traffic(12, drifted=True)
    lite.learner.look()
    assert lite.steps() == ["policy", "drift", "skip"]
    assert "the round failed" in lite.told()
    assert "nowhere" in lite.told()
    assert 0 < lite.learning.spending("acme").ms < ROUND_MS
    lite.learner.look()
    lite.traffic(12, drifted=True)
    lite.learner.look()
    assert lite.steps() == ["policy", "drift", "skip"]  # tried again or not, it is the same
    lite.learning.set(policy(), by=SYSTEM)
    assert lite.learner.run("acme", "clf").alias is not None


def test_a_tenant_that_may_hold_no_more_deltas(url: str, tmp_path: Path) -> None:
    made = Place(url, tmp_path)
    made.registry.create_tenant("small", by=SYSTEM, max_deltas=0)
    made.learning.set(policy(), by=SYSTEM)
    made.traffic(10, drifted=True)
    with made.registry._ledger.write() as change:
        change.connection.execute(sa.text("UPDATE tenants SET max_deltas = 0"))
    found = made.learner.run("acme", "clf")
    assert "the candidate cannot be kept: acme holds 0 deltas" in found.step.text
    assert made.learning.spending("acme").ms > 0
    made.close()


def test_a_fit_whose_process_died_is_charged_and_not_tried_at_once(
    lite: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(order: object) -> Future:
        future: Future = Future()
        future.set_exception(Unavailable("the process for fits ended"))
        return future

    lite.learning.set(policy(), by=SYSTEM)
    lite.traffic(10, drifted=True)
    monkeypatch.setattr(lite.fitter, "submit", dies)
    found = lite.learner.run("acme", "clf")
    assert "the fit was lost: the process for fits ended" in found.step.text
    assert lite.learning.spending("acme").ms > 0
    assert not lite.learning.state("acme", "clf").busy


def test_where_there_is_no_place_for_a_fit_nothing_is_begun(lite: Place) -> None:
    lite.learning.set(policy(), by=SYSTEM)
    lite.traffic(12)
    lite.traffic(12, drifted=True)
    with lite.fitter.place("acme"):  # a fit that came with a request goes first
        lite.learner.look()
        assert lite.steps() == ["policy", "drift"]
        with pytest.raises(BusyError, match="1 fits are under way"):
            lite.learner.run("acme", "clf")
    assert lite.learning.spending("acme").ms == 0
    # And it is neither refused nor counted out for one of these.
    with lite.fitter.place("acme", behind=True), lite.fitter.place("acme"):
        pass
    lite.learner.look()
    assert lite.steps()[-1] == "gate"


def test_a_server_that_shuts_down_leaves_its_round_to_another(
    lite: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    lite.learning.set(policy(), by=SYSTEM)
    lite.traffic(12)
    lite.traffic(12, drifted=True)
    begun, never = threading.Event(), Future()

    def submit(order: object) -> Future:
        begun.set()
        return never

    monkeypatch.setattr(lite.fitter, "submit", submit)
    lite.learner._every_s = 0.01
    lite.learner.start()
    assert begun.wait(20)
    assert lite.learning.state("acme", "clf").busy
    lite.learner.close()
    assert never.cancelled()
    assert not lite.learning.state("acme", "clf").busy
    assert 0 < lite.learning.spending("acme").ms < ROUND_MS
    assert lite.steps() == ["policy", "drift"]
    assert [why for _, _, why in lite.learning.rounds.ready()] == ["drift"]


# --- budgets -------------------------------------------------------------------------------------


def test_a_spent_budget_is_said_once_and_the_next_window_goes_on(lite: Place) -> None:
    lite.learning.set(policy(gate=Policy(min_n=16, margin=0.99)), by=SYSTEM)
    lite.learning.budgets.set("acme", ms=3.0, joules=None, window_s=100.0, by=SYSTEM)
    lite.traffic(12)
    lite.traffic(12, drifted=True)
    for _ in range(3):
        lite.learner.look()
        lite.traffic(24, drifted=True)
    assert lite.steps().count("skip") >= 1
    assert lite.told() == "the budget of 3 ms in 100 s is spent"
    told = lite.steps()
    lite.learner.look()
    assert lite.steps() == told
    with pytest.raises(BusyError, match="the budget of 3 ms in 100 s is spent"):
        lite.learner.run("acme", "clf")
    assert lite.learning.spending("acme").left_ms < 1
    lite.clock.now += 101
    assert lite.learning.spending("acme").ms == 0
    lite.learning.budgets.set("acme", ms=60_000.0, joules=None, window_s=100.0, by=SYSTEM)
    lite.learner.look()
    assert lite.steps()[-2:] == ["fit", "gate"]


def test_joules_are_a_budget_too(lite: Place) -> None:
    lite.learning.set(policy(), by=SYSTEM)
    lite.learning.budgets.set("acme", ms=60_000.0, joules=1e-6, window_s=100.0, by=SYSTEM)
    lite.traffic(10, drifted=True)
    found = lite.learner.run("acme", "clf")
    assert "budget" in found.step.text or found.alias is not None
    spent = lite.learning.spending("acme")
    assert spent.joules > 0
    assert spent.left_joules == 0
    with pytest.raises(BusyError, match="joules in 100 s is spent"):
        lite.learner.run("acme", "clf")


def test_what_a_dead_process_set_aside_is_spent_and_its_turn_ends(lite: Place) -> None:
    lite.learning.set(policy(), by=SYSTEM)
    lite.traffic(10, drifted=True)
    while lite.learning.rounds.look("acme", "clf"):
        pass
    assert lite.learning.rounds.begin("acme", "clf", "asked") is not None  # and then it dies
    assert lite.learning.spending("acme").ms == ROUND_MS
    assert lite.learning.state("acme", "clf").busy
    with pytest.raises(BusyError, match="a round of acme's is under way"):
        lite.learner.run("acme", "clf")
    lite.clock.now += 121
    assert not lite.learning.state("acme", "clf").busy
    assert lite.learner.run("acme", "clf").alias is not None
    assert lite.learning.spending("acme").ms > ROUND_MS


def test_a_clock_that_is_put_back_holds_up_nobody(lite: Place) -> None:
    lite.learning.set(policy(), by=SYSTEM)
    lite.traffic(10, drifted=True)
    assert lite.learning.rounds.begin("acme", "clf", "asked") is not None
    lite.clock.now -= 5000
    assert not lite.learning.state("acme", "clf").busy
    spent = lite.learning.spending("acme")
    assert spent.since_s == lite.clock.now
    assert spent.ms == ROUND_MS


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        ({"ms": 0}, "ms is a number > 0"),
        ({"ms": float("nan")}, "ms is a number > 0"),
        ({"ms": True}, "ms is a number > 0"),
        ({"joules": -1}, "joules is a number > 0, or null"),
        ({"window_s": 0.5}, "window_s is 1 to"),
    ],
)
def test_no_budget(lite: Place, caps: dict, message: str) -> None:
    wanted = {"ms": 1.0, "joules": None, "window_s": 60.0, **caps}
    with pytest.raises(InputError, match=message):
        lite.learning.budgets.set("acme", **wanted, by=SYSTEM)


# --- several processes, and a database that goes away ---------------------------------------------


def test_of_two_processes_one_runs_the_round(url: str, tmp_path: Path) -> None:
    clock = Clock()
    one, other = (Place(url, tmp_path, clock=clock) for _ in "ab")
    one.learning.set(policy(), by=SYSTEM)
    one.traffic(12)
    one.traffic(12, drifted=True)
    assert together(*[place.learner.look for place in (one, other)] * 2) == []
    assert one.steps() == ["policy", "drift", "fit", "gate"]
    assert other.alias()[0] == 2
    one.registry.audit.verify()
    for place in (one, other):
        place.close()


def test_a_turn_ends_by_the_databases_clock(url: str, tmp_path: Path) -> None:
    place = Place(url, tmp_path)
    place.learning.set(policy(), by=SYSTEM)
    assert place.learning.rounds.begin("acme", "clf", "asked") is not None
    with place.registry._ledger.write() as change:
        now = place.learning.budgets.now_s(change.connection)
        own = place.clock.now if url.startswith("sqlite") else time.time()
        assert abs(now - own) < 60
        change.connection.execute(sa.update(budgets).values(until_s=now - 1))
    assert place.learning.rounds.begin("acme", "clf", "asked") is not None
    place.close()


def test_who_lost_the_turn_changes_nothing_but_the_bill(lite: Place) -> None:
    lite.learning.set(policy(), by=SYSTEM)
    lite.traffic(2)
    lost = lite.learning.rounds.begin("acme", "clf", "asked")
    lite.clock.now += 500
    holder = lite.learning.rounds.begin("acme", "clf", "asked")
    assert lost is not None
    assert holder is not None
    assert not lite.learning.rounds.keep(lost)
    assert lite.learning.rounds.keep(holder)
    lite.learning.rounds.finish(lost, "learn.skip", {"reason": "late"}, (5.0, 0.0))
    assert lite.learning.state("acme", "clf").busy
    assert lite.learning.spending("acme").ms == ROUND_MS + 5
    lite.learning.rounds.drop(holder, (0.0, 0.0))
    assert not lite.learning.state("acme", "clf").busy
    assert lite.learning.spending("acme").ms == 5


def test_an_alias_that_learns_no_more_is_not_moved(lite: Place) -> None:
    lite.learning.set(policy(), by=SYSTEM)
    task = lite.learning.rounds.begin("acme", "clf", "asked")
    lite.learning.end("acme", "clf", by=SYSTEM)
    assert task is not None
    assert not lite.learning.rounds.keep(task)
    step = lite.learning.rounds.finish(task, "learn.skip", {"reason": "x"}, (0.0, 0.0))
    assert step.text == "x"


def test_while_the_database_is_away_it_waits_and_says_so_once(
    lite: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lite.learning.set(policy(), by=SYSTEM)
    lite.traffic(12)
    lite.traffic(12, drifted=True)
    calls, behind = [], lite.learning.rounds.behind

    def away() -> object:
        calls.append(1)
        if len(calls) < 4:
            raise StorageError("the disk is gone")
        if len(calls) == 4:
            raise ValueError("a mistake of ours")
        return behind()

    monkeypatch.setattr(type(lite.learning.rounds), "behind", lambda self: away())
    lite.learner._every_s = 0.01
    with caplog.at_level(logging.ERROR, "tessera.serve"):
        lite.learner.start()
        until = time.monotonic() + 20
        while lite.alias()[0] == 1 and time.monotonic() < until:
            time.sleep(0.02)
    assert lite.alias()[0] == 2
    lite.learner.close()
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "the registry is away, and learning waits for it",
        "learning failed, and goes on",
    ]


def test_what_a_newer_tessera_wrote_stops_nobody_else(lite: Place) -> None:
    lite.registry.set_alias("acme", "other", "", generation=0, by=SYSTEM)
    lite.learning.set(policy(), by=SYSTEM)
    lite.learning.set(replace(policy(), alias="other"), by=SYSTEM)
    with lite.registry._ledger.write() as change:
        change.connection.execute(
            sa.update(learning).where(learning.c.alias == "other").values(policy='{"new":1}')
        )
    lite.traffic(12)
    lite.traffic(12, drifted=True)
    lite.learner.look()
    assert lite.alias()[0] == 2


def test_a_server_that_keeps_no_inputs_does_not_learn(tmp_path: Path) -> None:
    made = Place(f"sqlite:///{tmp_path}/r.db", tmp_path, keep="hashes")
    with pytest.raises(InputError, match="this server keeps hashes; start it with --keep inputs"):
        made.learner.set(policy(), by=SYSTEM)
    made.close()


def test_a_server_refuses_what_its_fits_do_not_take(lite: Place) -> None:
    with pytest.raises(InputError, match="356 examples together, and a fit here takes 256"):
        lite.learner.set(policy(replay=228), by=SYSTEM)
    with pytest.raises(InputError, match=r"fit\.steps is 1 to 1000, got 1001"):
        lite.learner.set(policy(fit=FitSettings(steps=1001)), by=SYSTEM)
    with pytest.raises(UnknownNameError, match="no alias 'clf2'"):
        lite.learner.set(type(policy())(tenant="acme", alias="clf2"), by=SYSTEM)
    with lite.registry._ledger.read() as connection:
        assert connection.execute(sa.select(learning)).all() == []
