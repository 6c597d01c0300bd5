"""Feedback: read strictly, kept once, beside the answer it belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tessera.errors import AccessError, ConflictError, InputError, UnknownNameError
from tessera.serve.blobs import Blobs
from tessera.serve.engine import Answer
from tessera.serve.feedback import Said
from tessera.serve.recorder import Recorder
from tessera.serve.records import Key
from tessera.serve.registry import Registry
from tessera.serve.rollout_desk import Desk


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "names the request"),
        ({"request": ""}, "names the request"),
        ({"request": "r"}, "at least one of"),
        ({"request": "r\0", "correct": True}, "names the request"),
        ({"request": "r", "correct": 1}, "correct"),
        ({"request": "r", "correct": []}, "correct"),
        ({"request": "r", "label": True}, "label"),
        ({"request": "r", "label": -1}, "label"),
        ({"request": "r", "label": [0] * 5000}, "label"),
        ({"request": "r", "label": 1, "correct": True}, "not both"),
        ({"request": "r", "metric": math.nan}, "metric"),
        ({"request": "r", "metric": True}, "metric"),
        ({"request": "r", "correct": True, "slices": {"": "x"}}, "slice"),
        ({"request": "r", "correct": True, "slices": {"a": 1.5}}, "slice"),
        ({"request": "r", "correct": True, "slices": {"a": "x" * 101}}, "slice"),
        ({"request": "r", "correct": True, "slices": {str(i): "x" for i in range(17)}}, "slices"),
    ],
)
def test_no_feedback(said: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Said.parse(said)


def test_feedback_is_read() -> None:
    said = Said.parse({"request": "r", "correct": [True, False], "slices": {"n": 3, "b": True}})
    assert said.outcomes() == "10"
    assert said.slices == {"n": "3", "b": "True"}
    assert Said.parse({"request": "r", "metric": 2}).outcomes() == ""


class Place:
    """A registry in which acme's request r-1 was answered."""

    def __init__(self, url: str, place: Path) -> None:
        self.registry = Registry(url, Blobs(place / "blobs"), base_hash="")
        secret = self.registry.first_admin_key("an-admin-key-of-the-tests")
        self.by: Key = self.registry.authenticate(secret or "an-admin-key-of-the-tests")
        self.journal = self.registry.rollouts.journal

    def answered(self, request: str, *, tenant: str = "acme", **more: object) -> None:
        body = {"request": request, "alias": "m", "generation": 1, "delta": "", "blob": ""}
        self.registry.audit.append("request", tenant, {**body, **more})

    def add(self, tenant: str = "acme", by: Key | None = None, **said: object):
        own = Said.parse(said)
        answer = self.journal.answer(tenant, own.request)
        assert answer is not None
        return self.journal.add(tenant, own, own.outcomes(), answer, by=by or self.by)


@pytest.fixture
def place(url: str, tmp_path: Path) -> Iterator[Place]:
    made = Place(url, tmp_path)
    for name in ("acme", "globex"):
        made.registry.create_tenant(name, by=made.by)
    made.answered("r-1", arm="candidate", experiment="e1", bucket=3)
    yield made
    made.registry.close()


def test_it_is_kept_once_and_survives(place: Place, url: str, tmp_path: Path) -> None:
    kept = place.add(request="r-1", correct=True, slices={"lang": "de"})
    assert (kept.alias, kept.arm, kept.experiment, kept.outcomes) == ("m", "candidate", "e1", "1")
    again = place.add(request="r-1", correct=True, slices={"lang": "de"})
    assert again.seq == kept.seq
    with pytest.raises(ConflictError, match="other feedback"):
        place.add(request="r-1", correct=False, slices={"lang": "de"})
    with pytest.raises(ConflictError, match="other feedback"):
        place.journal.find("acme", Said.parse({"request": "r-1", "correct": False}))
    assert len(list(place.registry.audit.read(kinds=["feedback"]))) == 1
    place.registry.close()
    later = Place(url, tmp_path)
    assert later.journal.examples("acme", "e1") == [["r-1", {"lang": "de"}, None, 1]]
    assert later.journal.counts("acme", "e1") == {"incumbent": [0, 0], "candidate": [1, 1]}
    later.registry.audit.verify()
    later.registry.close()


def test_it_is_its_own_tenants(place: Place) -> None:
    assert place.journal.answer("globex", "r-1") is None
    place.answered("r-1", tenant="globex", alias="theirs")
    assert place.add("globex", request="r-1", correct=False).alias == "theirs"
    assert place.add(request="r-1", correct=True).alias == "m"
    reader, _ = place.registry.create_key("acme", ["infer"], by=place.by)
    manager, _ = place.registry.create_key("acme", ["manage"], by=place.by)
    place.answered("r-2")
    with pytest.raises(UnknownNameError):
        place.add("globex", by=reader, request="r-1", correct=False)
    with pytest.raises(AccessError):
        place.add(by=manager, request="r-2", correct=False)
    assert place.add(by=reader, request="r-2", correct=False).outcomes == "0"
    place.registry.revoke_key(reader.id, by=place.by)
    with pytest.raises(AccessError):
        place.add(by=reader, request="r-2", correct=False)


def test_an_id_that_was_used_again_means_the_last_answer(place: Place) -> None:
    place.answered("r-1", generation=7)
    assert place.add(request="r-1", correct=True).generation == 7


def test_rows_of_a_request_are_examples_of_their_own(place: Place) -> None:
    place.add(request="r-1", correct=[True, False])
    for i, right in enumerate((True, False, True)):
        place.answered(f"i-{i}", arm="incumbent", experiment="e1")
        place.add(request=f"i-{i}", correct=right)
    place.answered("measured", arm="incumbent", experiment="e1")
    place.add(request="measured", metric=0.5)
    assert [e[0::2] + e[3:] for e in place.journal.examples("acme", "e1")] == [
        ["r-1#0", None, 1],
        ["r-1#1", None, 0],
        ["i-0", 1, None],
        ["i-1", 0, None],
        ["i-2", 1, None],
    ]
    assert place.journal.counts("acme", "e1") == {"incumbent": [2, 3], "candidate": [1, 2]}
    assert place.journal.live("acme", "m", 1, "") == "10101"


def test_a_request_that_the_log_will_not_have(place: Place) -> None:
    desk = Desk(place.registry.rollouts, engine=None, recorder=None)
    with pytest.raises(UnknownNameError, match="no answer"):
        desk.feedback("acme", Said.parse({"request": "never", "correct": True}), by=place.by)
    with pytest.raises(InputError, match="keeps no inputs"):
        desk.feedback("acme", Said.parse({"request": "r-1", "label": 1}), by=place.by)
    assert desk.feedback("acme", Said.parse({"request": "r-1", "correct": True}), by=place.by).seq


def test_what_is_not_in_the_log_yet_is_waited_for(place: Place) -> None:
    registry = place.registry
    recorder = Recorder(registry.audit, registry.rollouts.blobs, base_hash="")
    try:
        recorder.request(
            "late",
            tenant="acme",
            alias="m",
            generation=1,
            answer=Answer(outputs={"y": torch.zeros(1)}, delta="", batch=1, part=0),
            inputs={"x": torch.zeros(1)},
            arm={"arm": "incumbent", "experiment": "e9", "bucket": 1},
        )
        desk = Desk(registry.rollouts, engine=None, recorder=recorder)
        kept = desk.feedback("acme", Said.parse({"request": "late", "correct": True}), by=place.by)
        assert (kept.arm, kept.experiment) == ("incumbent", "e9")
    finally:
        recorder.close()
