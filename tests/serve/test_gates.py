"""Gates: statistics against oracles and by simulation, decisions by hand, evidence that holds."""

from __future__ import annotations

import json
import math
import random as randomness
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor

from tessera.arch import Delta
from tessera.errors import CheckpointError, ConflictError, InputError, UnknownNameError
from tessera.serve import gates_statistics as statistics
from tessera.serve.blobs import Blobs
from tessera.serve.feedback import Journal, Said
from tessera.serve.gates import Policy, canonical, decide, is_regression, recompute
from tessera.serve.gates_statistics import Pairs
from tessera.serve.records import Key
from tessera.serve.registry import Registry
from tessera.serve.rollout_desk import Desk, classes_of
from tessera.serve.rollout_values import Feedback, Watch

Z = 1.959964
counts = st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
tables = st.builds(
    Pairs, **dict.fromkeys(["both", "better", "worse", "neither"], st.integers(0, 60))
)


# --- statistics ------------------------------------------------------------------------------


@given(counts)
def test_wilson_is_scipys(share: tuple[int, int]) -> None:
    right, n = share
    low, high = statistics.wilson(right, n, statistics.quantile(0.025))
    theirs = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_sign_test(better: int, worse: int) -> None:
    theirs = (
        1.0
        if better + worse == 0
        else binomtest(better, better + worse, 0.5, alternative="greater").pvalue
    )
    assert statistics.mcnemar(better, worse) == pytest.approx(theirs, rel=1e-9, abs=1e-300)


# R. G. Newcombe, Statistics in Medicine 17 (1998) 873, table II, method 10.
@pytest.mark.parametrize(
    ("candidate", "incumbent", "limits"),
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((6, 7), (2, 7), (0.0582, 0.8062)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((0, 10), (0, 20), (-0.1611, 0.2775)),
        ((0, 10), (0, 10), (-0.2775, 0.2775)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ],
)
def test_newcombes_table(
    candidate: tuple[int, int], incumbent: tuple[int, int], limits: tuple[float, float]
) -> None:
    assert statistics.difference(incumbent, candidate, Z) == pytest.approx(limits, abs=6e-5)


@given(counts, counts)
def test_a_difference_holds_its_estimate_and_turns_with_the_arms(
    a: tuple[int, int], b: tuple[int, int]
) -> None:
    low, high = statistics.difference(a, b, Z)
    assert -1 - 1e-9 <= low <= b[0] / b[1] - a[0] / a[1] <= high <= 1 + 1e-9
    assert statistics.difference(b, a, Z) == pytest.approx((-high, -low))


@given(tables.filter(lambda t: t.n > 0))
def test_a_paired_difference_holds_its_estimate_and_turns_with_the_arms(t: Pairs) -> None:
    low, high = statistics.paired_difference(t, Z)
    assert -1 - 1e-9 <= low <= (t.better - t.worse) / t.n <= high <= 1 + 1e-9
    turned = statistics.paired_difference(replace(t, better=t.worse, worse=t.better), Z)
    assert turned == pytest.approx((-high, -low))


def test_pairing_narrows_where_the_arms_agree() -> None:
    agree = statistics.paired_difference(Pairs(both=80, better=6, worse=2, neither=12), Z)
    apart = statistics.difference((82, 100), (86, 100), Z)
    assert agree[1] - agree[0] < 0.7 * (apart[1] - apart[0])


def test_all_looks_together_spend_alpha() -> None:
    parts = [statistics.spent(0.05, k) for k in range(1, 100_001)]
    assert 0.0499 < sum(parts) < 0.05
    assert parts == sorted(parts, reverse=True)
    with pytest.raises(InputError):
        statistics.spent(0.05, 0)
    for alpha in (0.0, 0.5, 1.0):
        with pytest.raises(InputError):
            statistics.quantile(alpha)


# --- decisions -------------------------------------------------------------------------------


def evidence(examples: list[list[object]], *, paired: bool = True, look: int = 1, **policy: object):
    return {
        "version": 1,
        "paired": paired,
        "look": look,
        "policy": Policy.parse(policy).json(),
        "examples": examples,
    }


def table(both: int, better: int, worse: int, neither: int, **slices: str) -> list[list[object]]:
    rows = [(1, 1)] * both + [(0, 1)] * better + [(1, 0)] * worse + [(0, 0)] * neither
    name = "-".join(slices.values()) or "e"
    return [[f"{name}{i}", slices, *row] for i, row in enumerate(rows)]


def test_a_better_one_passes_and_a_like_one_does_not() -> None:
    passed = decide(evidence(table(60, 20, 2, 18)))
    assert passed["passed"]
    assert passed["reasons"] == []
    assert passed["overall"]["candidate"] == [80, 100]
    assert passed["overall"]["low"] > 0
    refused = decide(evidence(table(60, 10, 9, 21)))
    assert not refused["passed"]
    assert "the gain is shown to exceed" in refused["reasons"][0]
    assert refused["regressed_n"] == 9
    assert refused["regressed"] == [f"e{i}" for i in range(70, 79)]
    # No worse than 10 % is another question, and the sign test has no say in it.
    assert decide(evidence(table(160, 10, 9, 21), margin=-0.1))["passed"]


def test_a_small_sample_has_to_pass_the_exact_test_too() -> None:
    examples = table(8, 5, 0, 0)
    assert statistics.mcnemar(5, 0) > statistics.spent(0.05, 1)
    refused = decide(evidence(examples, min_n=10))
    assert refused["overall"]["low"] > 0
    assert "is chance with p 0.0312" in refused["reasons"][0]
    assert decide(evidence(table(8, 6, 0, 0), min_n=10))["passed"]


def test_too_few_examples_are_no_test() -> None:
    found = decide(evidence(table(0, 49, 0, 0)))
    assert not found["passed"]
    assert not found["tested"]
    assert found["reasons"] == [
        f"the {arm} has 49 of the 50 examples that are needed" for arm in ("incumbent", "candidate")
    ]
    nothing = decide(evidence([], min_n=1))
    assert nothing["overall"]["low"] is None
    assert not nothing["passed"]


def test_a_slice_that_lost_refuses_and_is_named_with_its_examples() -> None:
    examples = table(100, 60, 0, 0, lang="en") + table(5, 0, 25, 0, lang="de")
    assert decide(evidence(examples))["passed"]  # nobody asked about slices
    found = decide(evidence(examples, slices=["lang"]))
    assert not found["passed"]
    assert found["reasons"] == ["the slice lang=de lost: 30/30 to 5/30"]
    assert [(s["value"], s["regressed"]) for s in found["slices"]] == [("de", True), ("en", False)]
    assert found["regressed"] == [f"de{i}" for i in range(5, 30)]
    # A slice that may lose as much, or is too small to be judged, does not refuse.
    assert decide(evidence(examples, slices=["lang"], slice_margin=0.95))["passed"]
    small = decide(evidence(examples, slices=["lang"], slice_min_n=31))
    assert small["passed"]
    assert [s["judged"] for s in small["slices"]] == [False, True]


def test_many_slices_are_judged_more_strictly_each() -> None:
    lost = table(14, 0, 6, 10, part="bad")
    alone = decide(evidence(table(100, 60, 0, 0) + lost, slices=["part"]))
    assert not alone["passed"]
    others = [e for i in range(50) for e in table(20, 10, 0, 0, part=f"p{i}")]
    found = decide(evidence(others + lost, slices=["part"]))
    bad = next(s for s in found["slices"] if s["value"] == "bad")
    assert bad["high"] > next(s for s in alone["slices"] if s["value"] == "bad")["high"]
    assert found["passed"]


def test_unpaired_arms() -> None:
    old = [[f"i{i}", {}, int(i < 50), None] for i in range(100)]
    new = [[f"c{i}", {}, None, int(i < 75)] for i in range(100)]
    found = decide(evidence(old + new, paired=False))
    assert found["passed"]
    assert found["overall"]["p"] is None
    low, _ = statistics.difference(
        (50, 100), (75, 100), statistics.quantile(statistics.spent(1 - 0.95, 1))
    )
    assert found["overall"]["low"] == low
    worse = [[f"c{i}", {}, None, int(i < 40)] for i in range(100)]
    refused = decide(evidence(old + worse, paired=False))
    assert refused["regressed_n"] == 60
    assert refused["regressed"][0] == "c40"


def test_a_later_look_asks_for_more() -> None:
    examples = table(60, 12, 2, 26)
    assert [decide(evidence(examples, look=k))["passed"] for k in (1, 8)] == [True, False]


def test_peeking_at_a_like_candidate_lets_it_pass_as_rarely_as_was_said() -> None:
    """By simulation: 12 looks at growing evidence of two arms alike, at 95 %."""
    draw = randomness.Random(7)
    passed, unpaid = 0, 0
    for _ in range(200):
        old: list[list[object]] = []
        new: list[list[object]] = []
        won = wrongly = False
        for look in range(1, 13):
            old += [["i", {}, int(draw.random() < 0.7), None] for _ in range(50)]
            new += [["c", {}, None, int(draw.random() < 0.7)] for _ in range(50)]
            won |= decide(evidence(old + new, paired=False, look=look))["passed"]
            wrongly |= decide(evidence(old + new, paired=False, look=1))["passed"]
        passed += won
        unpaid += wrongly
    assert passed <= 200 * 0.05
    assert unpaid > 200 * 0.05


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, 0, 1]), st.sampled_from([None, 0, 1]), st.text(max_size=3)
        ),
        max_size=60,
    ),
    st.integers(1, 5),
)
def test_deciding_again_gives_the_same_to_the_last_bit(
    rows: list[tuple[int | None, int | None, str]], look: int
) -> None:
    examples = [[f"e{i}", {"s": s}, a, b] for i, (a, b, s) in enumerate(rows)]
    made = evidence(examples, paired=False, look=look, min_n=3, slices=["s"], slice_min_n=2)
    kept = json.loads(canonical(decide(made)))
    assert recompute(canonical(made)) == kept
    assert canonical(recompute(canonical(made))) == canonical(kept)


@pytest.mark.parametrize(
    "blob", [b"", b"[]", b"{}", b'{"version": 1}', b'{"version": 2}', b"\xff", b"1"]
)
def test_no_evidence(blob: bytes) -> None:
    with pytest.raises(CheckpointError):
        recompute(blob)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"metrik": 1}, "no 'metrik'"),
        ({"metric": "auc"}, "accuracy"),
        ({"min_n": 0}, "min_n"),
        ({"min_n": True}, "min_n"),
        ({"margin": 1.0}, "margin"),
        ({"slice_margin": -0.1}, "slice_margin"),
        ({"confidence": 0.5}, "confidence"),
        ({"confidence": math.nan}, "confidence"),
        ({"slices": ["a"] * 17}, "slices"),
        ({"slices": [1]}, "slices"),
        ({"slices": ["\ud800"]}, "slices"),
        ({"margin": 10**400}, "margin"),
        ({"confidence": -(10**400)}, "confidence"),
        ({"slices": 5}, "slices"),
        ({"slices": None}, "slices"),
    ],
)
def test_no_policy(said: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Policy.parse(said)


def test_live_regressions() -> None:
    assert is_regression((90, 100), (60, 100), margin=0.0, confidence=0.99, look=1)
    assert not is_regression((90, 100), (60, 100), margin=0.3, confidence=0.99, look=1)
    assert not is_regression((0, 0), (0, 100), margin=0.0, confidence=0.99, look=1)
    for bad in ({"min_n": 0}, {"margin": -0.1}, {"margin": math.inf}, {"confidence": 0.5}):
        with pytest.raises(InputError):
            Watch(**bad)


def test_classes() -> None:
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert classes_of({"y": scores}) == [1, 0]
    assert classes_of({"logits": scores, "x": scores}) == [1, 0]
    assert classes_of({"a": scores, "b": -scores}, "b") == [0, 1]
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({"a": scores, "b": scores}, ""),
        ({"a": scores}, "b"),
        ({"a": scores[:, :1]}, ""),
        ({"a": scores.long()}, ""),
        ({"a": scores[0]}, ""),
    ]
    for outputs, name in wrong:
        with pytest.raises(InputError):
            classes_of(outputs, name)


# --- the registry's part ---------------------------------------------------------------------


def delta(k: float) -> Delta:
    return Delta(kind="prompt", tensors={"prompt": torch.full((1, 4), k)})


class House:
    """A registry with a tenant acme, its deltas one and two, and an alias m at the first."""

    def __init__(self, url: str, place: Path) -> None:
        self.blobs = Blobs(place / "blobs")
        self.registry = Registry(url, self.blobs, base_hash="", clock=lambda: 1.5)
        admin = self.registry.first_admin_key(None)
        assert admin is not None
        self.by: Key = self.registry.authenticate(admin)
        self.registry.create_tenant("acme", by=self.by)
        self.one, self.two = (
            self.registry.put_delta("acme", delta(k), by=self.by).hash for k in (1.0, 2.0)
        )
        self.registry.set_alias("acme", "m", self.one, generation=0, by=self.by)
        self.gates = self.registry.rollouts.gates

    def evidence(self, examples: list[list[object]], *, look: int = 1, generation: int = 1):
        return evidence(examples, look=look) | {
            "tenant": "acme",
            "alias": "m",
            "generation": generation,
            "incumbent": self.one,
            "candidate": self.two,
        }


@pytest.fixture
def house(url: str, tmp_path: Path) -> Iterator[House]:
    made = House(url, tmp_path)
    yield made
    made.registry.close()


def test_a_gate_is_kept_with_its_evidence_and_promotes_by_its_id(house: House) -> None:
    gates = house.gates
    alias, look = gates.prepare("acme", "m", house.two, by=house.by)
    assert (alias.delta, look) == (house.one, 1)
    made = house.evidence(table(60, 20, 2, 18))
    gate = gates.record(made, watch=None, by=house.by)
    assert gate.passed
    assert recompute(house.blobs.get(gate.id)) == gate.decision
    found = gates.get("acme", "m", gate.id)
    assert found.decision == gate.decision
    assert gates.evidence(found) == json.loads(canonical(made))
    moved = gates.promote(gate, by=house.by)
    assert (moved.generation, moved.delta, moved.reason) == (2, house.two, f"gate {gate.id}")
    event = next(iter(house.registry.audit.read(kinds=["gate.passed"])))
    assert event.body["evidence"] == gate.id
    assert event.body["outcomes"] == gate.decision["outcomes"]
    house.registry.audit.verify()
    with pytest.raises(ConflictError):
        gates.promote(gate, by=house.by)
    with pytest.raises(UnknownNameError):
        gates.get("acme", "other", gate.id)


def test_each_test_of_a_pair_is_a_look_and_too_little_is_none(house: House) -> None:
    gates = house.gates
    short = gates.record(house.evidence(table(1, 1, 1, 1)), watch=None, by=house.by)
    assert not short.decision["tested"]
    again = gates.record(house.evidence(table(1, 1, 1, 1)), watch=None, by=house.by)
    assert again.id == short.id
    gates.record(house.evidence(table(60, 9, 9, 22)), watch=None, by=house.by)
    assert gates.prepare("acme", "m", house.two, by=house.by)[1] == 2
    with pytest.raises(ConflictError):  # two that ran at once: the later one has to look again
        gates.record(house.evidence(table(60, 20, 2, 18), look=1), watch=None, by=house.by)
    gates.record(house.evidence(table(60, 20, 2, 18), look=2), watch=None, by=house.by)
    assert [(g.look, g.passed) for g in gates.all("acme", "m")] == [
        (2, True),
        (1, False),
        (1, False),
    ]
    house.registry.set_alias("acme", "m", "", generation=1, by=house.by)
    with pytest.raises(ConflictError):
        gates.record(house.evidence(table(60, 20, 2, 18), look=3), watch=None, by=house.by)


def test_evidence_that_was_altered_shows(house: House, tmp_path: Path) -> None:
    gate = house.gates.record(house.evidence(table(60, 20, 2, 18)), watch=None, by=house.by)
    with pytest.raises(CheckpointError):
        house.gates.evidence(replace(gate, decision={**gate.decision, "passed": False}))
    path = next((tmp_path / "blobs").rglob(gate.id))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        house.gates.evidence(gate)


def test_a_watch_rolls_back_what_regressed(house: House) -> None:
    gates, by = house.gates, house.by
    gate = gates.record(house.evidence(table(70, 20, 2, 8)), watch=Watch(min_n=20), by=by)
    assert gates.look("acme", "m", "0" * 19) is None
    gates.promote(gate, by=by)
    assert gates.watched("acme", "m") == (2, house.two)
    # 72 % before. Neither as good nor a little worse is a regression.
    assert gates.look("acme", "m", "1" * 20) is None
    assert gates.look("acme", "m", "1" * 20 + "0" * 19) is None  # between two looks nobody looks
    back = gates.look("acme", "m", "1" * 20 + "0" * 60)
    assert back is not None
    assert (back.generation, back.delta) == (3, house.one)
    event = next(iter(house.registry.audit.read(kinds=["watch.regressed"])))
    assert event.body["live"] == [20, 80]
    assert event.body["before"] == [72, 100]
    assert gates.look("acme", "m", "0" * 640) is None  # it has moved on
    house.registry.audit.verify()


def test_a_watch_is_on_time_and_seldom_reads_all(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = house.gates.record(
        house.evidence(table(70, 20, 2, 8)), watch=Watch(min_n=20), by=house.by
    )
    house.gates.promote(gate, by=house.by)
    rollouts, outcomes, reads = house.registry.rollouts, "", 0

    def live(self: Journal, *at: object) -> str:
        nonlocal reads
        assert at == ("acme", "m", 2, house.two)
        reads += 1
        return outcomes

    kept = {"tenant": "acme", "alias": "m", "experiment": "", "arm": "", "slices": {}, "seq": 1}
    kept |= {"request": "r", "generation": 2, "delta": house.two}
    monkeypatch.setattr(Journal, "live", live)
    monkeypatch.setattr(Journal, "find", lambda self, *of: Feedback(outcomes=outcomes[-1:], **kept))
    desk, said = Desk(rollouts, None, None), Said.parse({"request": "r", "correct": True})
    while house.registry.alias("acme", "m").generation == 2:
        outcomes += "01"[len(outcomes) < 250]  # 20 * 2^4 are looked at, and the next are bad
        desk.feedback("acme", said, by=house.by)
    assert len(outcomes) == 640
    (event,) = house.registry.audit.read(kinds=["watch.regressed"])
    assert event.body["live"] == [250, 640]
    assert reads < 120


def test_gates_of_nothing(house: House) -> None:
    gates, by = house.gates, house.by
    with pytest.raises(InputError, match="already"):
        gates.prepare("acme", "m", house.one, by=by)
    for alias, candidate in (("other", house.two), ("m", "0" * 64)):
        with pytest.raises(UnknownNameError):
            gates.prepare("acme", alias, candidate, by=by)
    with pytest.raises(InputError):
        gates.prepare("acme", "m", "no hash", by=by)
    with pytest.raises(UnknownNameError):
        gates.all("globex", "m")
