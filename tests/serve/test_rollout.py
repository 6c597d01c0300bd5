"""Who gets the candidate: the hash, the split, the experiments in the registry, and over HTTP."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tessera.arch import Delta
from tessera.errors import AccessError, ConflictError, InputError, UnknownNameError
from tessera.serve.blobs import Blobs
from tessera.serve.client import Client
from tessera.serve.gates import Policy
from tessera.serve.past import replay
from tessera.serve.records import Alias
from tessera.serve.registry import Registry
from tessera.serve.rollout import (
    BUCKETS,
    Experiment,
    arm_of,
    bucket,
    checked_share,
    murmur3,
    sticky_key,
)
from tessera.serve.rollout_shadow import compare
from tessera.serve.rollout_values import Shots, Watch
from tessera.serve.service import Service, ServiceSettings

JSON = {"Content-Type": "application/json"}


# Austin Appleby's function, as its ports are checked everywhere.
@pytest.mark.parametrize(
    ("data", "seed", "hash"),
    [
        (b"", 0, 0x00000000),
        (b"", 1, 0x514E28B7),
        (b"", 0xFFFFFFFF, 0x81F16F39),
        (b"\xff\xff\xff\xff", 0, 0x76293B50),
        (b"\x21\x43\x65\x87", 0, 0xF55B516B),
        (b"\x21\x43\x65\x87", 0x5082EDEE, 0x2362F9DE),
        (b"\x21\x43\x65", 0, 0x7E4A8634),
        (b"\x21\x43", 0, 0xA0F7B07A),
        (b"\x21", 0, 0x72661CF4),
        (b"test", 0, 0xBA6BD213),
        (b"The quick brown fox jumps over the lazy dog", 0x9747B28C, 0x2FA826CD),
    ],
)
def test_murmur3(data: bytes, seed: int, hash: int) -> None:
    assert murmur3(data, seed) == hash


@pytest.mark.parametrize(("group", "id", "value"), [("gr1", "123", 73), ("groupX", "999", 25)])
def test_the_buckets_are_unleashs(group: str, id: str, value: int) -> None:
    assert bucket(group, id) % 100 + 1 == value


def experiment(
    share: int, *, salt: str = "s", mode: str = "split", generation: int = 1
) -> Experiment:
    return Experiment(
        id="e1",
        tenant="acme",
        alias="m",
        generation=generation,
        incumbent="a" * 64,
        candidate="b" * 64,
        mode=mode,
        share=share,
        salt=salt,
        started_s=0.0,
    )


def alias(generation: int = 1, delta: str = "a" * 64) -> Alias:
    return Alias(
        tenant="acme", name="m", generation=generation, delta=delta, changed_s=0.0, reason=""
    )


def arm(key: str, made: Experiment, at: Alias | None = None) -> str:
    return arm_of({("acme", "m"): made}, at or alias(), key).name


@given(st.text(), st.text(max_size=8), st.integers(0, BUCKETS), st.integers(0, BUCKETS))
def test_widening_moves_nobody_back(key: str, salt: str, one: int, other: int) -> None:
    narrow, wide = sorted((one, other))
    before, after = (arm(key, experiment(s, salt=salt)) for s in (narrow, wide))
    assert (before, after) != ("candidate", "incumbent")
    assert arm(key, experiment(wide, salt=salt)) == after
    assert arm(key, experiment(0, salt=salt)) == "incumbent"
    assert arm(key, experiment(BUCKETS, salt=salt)) == "candidate"


def test_a_share_is_that_share_and_another_salt_deals_anew() -> None:
    keys = [f"user-{i}" for i in range(20_000)]
    for share in (100, 2500, 5000):
        got = sum(arm(k, experiment(share)) == "candidate" for k in keys)
        # Six standard deviations.
        assert abs(got - 2 * share) < 6 * (20_000 * share / 1e4 * (1 - share / 1e4)) ** 0.5
    one, other = (
        {k for k in keys if arm(k, experiment(5000, salt=s)) == "candidate"} for s in "xy"
    )
    assert 0.45 < len(one & other) / len(one) < 0.55


def test_an_alias_that_moved_has_no_experiment() -> None:
    made = experiment(BUCKETS)
    for at in (alias(2), alias(1, "c" * 64)):
        found = arm_of({("acme", "m"): made}, at, "k")
        assert (found.name, found.delta, found.headers(), found.note()) == ("", at.delta, [], {})


def test_a_shadow_never_answers() -> None:
    found = arm_of({("acme", "m"): experiment(BUCKETS, mode="shadow")}, alias(), "k")
    assert (found.name, found.delta, found.shadow) == ("incumbent", "a" * 64, "b" * 64)
    none = arm_of({("acme", "m"): experiment(0, mode="shadow")}, alias(), "k")
    assert none.shadow is None


def test_sticky_keys() -> None:
    assert sticky_key("u", b"v", "k") == "u"
    assert sticky_key(7, None, "k") == "7"
    assert sticky_key(None, b"v", "k") == "v"
    assert sticky_key(None, None, "k") == "key:k"
    for wrong in ("", "x" * 257, 1.5, True):
        with pytest.raises(InputError):
            sticky_key(wrong, None, "k")
    with pytest.raises(InputError):
        sticky_key(None, b"", "k")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "0.5", 0.00005])
def test_no_share(share: object) -> None:
    with pytest.raises(InputError):
        checked_share(share)
    assert checked_share(0.0001) == 1


def test_how_answers_differ() -> None:
    y = torch.tensor([[1.0, 0.0]])
    assert compare({"y": y}, {"y": torch.tensor([[float("inf"), 0.0]])})["differ"] == {
        "y": "not finite"
    }
    assert compare({"y": y, "n": y.long()}, {"y": y[:, :1]}) == {"rows": 1, "differ": {}}


# --- the registry's part ---------------------------------------------------------------------


@contextlib.contextmanager
def registry(url: str, place: Path) -> Iterator[Registry]:
    made = Registry(url, Blobs(place / "blobs"), base_hash="")
    try:
        yield made
    finally:
        made.close()


def test_an_experiment_from_its_beginning_to_its_end(url: str, tmp_path: Path) -> None:
    with registry(url, tmp_path) as here, registry(url, tmp_path) as there:
        by = here.authenticate(
            here.first_admin_key("an-admin-key-of-the-tests") or "an-admin-key-of-the-tests"
        )
        here.create_tenant("acme", by=by)
        one, two, three = (
            here.put_delta(
                "acme", Delta(kind="prompt", tensors={"prompt": torch.full((1, 4), k)}), by=by
            ).hash
            for k in (1.0, 2.0, 3.0)
        )
        here.set_alias("acme", "m", one, generation=0, by=by)
        ours, theirs = here.rollouts.experiments, there.rollouts.experiments
        made = ours.start("acme", "m", two, share=0.1, by=by)
        assert (made.generation, made.incumbent, made.share, made.salt) == (1, one, 1000, made.id)
        there.refresh()
        assert theirs.running()["acme", "m"].id == made.id
        wider = ours.start("acme", "m", two, share=0.5, mode="shadow", by=by)
        assert (wider.id, wider.salt, wider.share) == (made.id, made.salt, 5000)
        with pytest.raises(ConflictError, match="is running"):
            ours.start("acme", "m", three, share=0.5, by=by)
        with pytest.raises(ConflictError, match="is running"):
            ours.start("acme", "m", two, share=0.5, salt="other", by=by)
        # A swap ends it, and another can begin.
        here.set_alias("acme", "m", three, generation=1, by=by)
        assert not ours.get("acme", "m").holds(here.alias("acme", "m"))
        new = ours.start("acme", "m", "", share=1.0, salt="mine", by=by)
        assert (new.generation, new.candidate, new.salt) == (2, "", "mine")
        assert new.id != made.id
        ours.end("acme", "m", by=by)
        assert ours.running() == {}
        there.refresh()
        assert theirs.running() == {}
        with pytest.raises(UnknownNameError):
            ours.get("acme", "m")
        with pytest.raises(UnknownNameError):
            ours.end("acme", "m", by=by)
        kinds = [e.kind for e in here.audit.read() if e.kind.startswith("experiment")]
        assert kinds == [f"experiment.{k}" for k in ("started", "changed", "started", "ended")]
        here.audit.verify()


def test_no_experiment(url: str, tmp_path: Path) -> None:
    with registry(url, tmp_path) as here:
        by = here.authenticate(here.first_admin_key(None) or "")
        for name in ("acme", "globex"):
            here.create_tenant(name, by=by)
        theirs = here.put_delta(
            "globex", Delta(kind="prompt", tensors={"prompt": torch.ones(1, 4)}), by=by
        ).hash
        here.set_alias("acme", "m", "", generation=0, by=by)
        ours = here.rollouts.experiments
        reader, _ = here.create_key("acme", ["infer"], by=by)
        stranger, _ = here.create_key("globex", ["manage"], by=by)
        with pytest.raises(InputError, match="nothing to compare"):
            ours.start("acme", "m", "", share=0.5, by=by)
        with pytest.raises(UnknownNameError):
            ours.start("acme", "m", theirs, share=0.5, by=by)
        with pytest.raises(UnknownNameError):
            ours.start("acme", "n", theirs, share=0.5, by=by)
        with pytest.raises(UnknownNameError):
            ours.start("acme", "m", theirs, share=0.5, by=stranger)
        with pytest.raises(AccessError):
            ours.start("acme", "m", theirs, share=0.5, by=reader)
        for wrong in ({"mode": "both"}, {"salt": "\0"}, {"salt": "x" * 65}):
            with pytest.raises(InputError):
                ours.start("acme", "m", theirs, share=0.5, by=by, **wrong)
        assert ours.running() == {}
        assert not [e for e in here.audit.read() if e.kind.startswith("experiment")]


# --- over HTTP -------------------------------------------------------------------------------

CLASSES = 3


def mapping(*to: int) -> Delta:
    """A delta over `net` that says class to[i] where the input says i."""
    wanted = torch.zeros(CLASSES, CLASSES)
    for i, j in enumerate(to):
        wanted[j, i] = 1.0
    tensors = {"0.A": torch.eye(CLASSES), "0.B": wanted - torch.eye(CLASSES)}
    return Delta(kind="lora", tensors=tensors, scales={"0": 1.0})


def net() -> nn.Module:
    """Says the class that is hot."""
    layer = nn.Linear(CLASSES, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(CLASSES))
        layer.bias.zero_()
    return nn.Sequential(layer).eval()


def hot(*classes: int) -> torch.Tensor:
    return 5 * torch.eye(CLASSES)[list(classes)]


class Site:
    """A server over `net`, and acme's client: its alias m says class 0 where 2 is right."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url
        with Client(url, service.admin_key or "", tenant="acme") as root:
            root.create_tenant("acme")
            self.key, self.secret = root.create_key(["infer", "manage"])
        self.client = Client(url, self.secret)
        self.old, self.worse = (
            self.client.upload(d).hash for d in (mapping(0, 1, 0), mapping(0, 2, 2))
        )
        self.client.set_alias("m", self.old, generation=0)

    def ask(self, request: str, *classes: int, session: str = "") -> list[int]:
        found = self.client.infer(
            "m", {"input": hot(*classes)}, request_id=request, session=session
        )
        return [int(i) for i in found["output"].argmax(dim=1)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    where = ServiceSettings(db=f"sqlite:///{tmp_path}/registry.db", blobs=str(tmp_path / "blobs"))
    with Service(net(), where) as service:
        server = service.server(port=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        made = Site(service, f"http://127.0.0.1:{server.port}")
        try:
            yield made
        finally:
            made.client.close()
            server.should_exit = True
            thread.join(20)


def test_each_user_stays_with_an_arm_and_the_answer_and_the_log_say_which(site: Site) -> None:
    made = site.client.begin_experiment("m", "", share=0.5)
    headers = {"Authorization": f"Bearer {site.secret}"}
    row = {"name": "input", "shape": [1, 3], "datatype": "FP32", "data": [0, 0, 5]}
    arms = {}
    for user in [f"u{i}" for i in range(30)] * 2:
        body = {"inputs": [row], "parameters": {"session": user}}
        answer = httpx.post(f"{site.url}/v2/models/m/infer", json=body, headers=headers)
        name = answer.headers["x-tessera-arm"]
        assert answer.headers["x-tessera-experiment"] == made.id
        assert answer.headers["x-tessera-delta"] == ("" if name == "candidate" else site.old)
        said = answer.json()["outputs"][0]["data"]
        assert said.index(max(said)) == (2 if name == "candidate" else 0)
        assert arms.setdefault(user, name) == name
        assert (bucket(made.salt, user) < 5000) == (name == "candidate")
    assert set(arms.values()) == {"candidate", "incumbent"}
    # The header says it too; without either, all requests of a key are together.
    for extra, key in (({"X-Tessera-Session": "u1"}, "u1"), ({}, f"key:{site.key.id}")):
        answer = httpx.post(
            f"{site.url}/v2/models/m/infer", json={"inputs": [row]}, headers={**headers, **extra}
        )
        low = bucket(made.salt, key) < 5000
        assert answer.headers["x-tessera-arm"] == ("candidate" if low else "incumbent")
    wider = site.client.begin_experiment("m", "", share=1.0)
    assert wider.salt == made.salt
    assert site.ask("r", 2, session="u1") == [2]
    with pytest.raises(InputError, match="a reason is one line"):
        site.client.end_experiment("m", reason="two\nlines")
    site.client.end_experiment("m", reason="it's no better: 50 % & more")
    (ended,) = site.service.registry.audit.read(kinds=["experiment.ended"])
    assert ended.body["reason"] == "it's no better: 50 % & more"
    assert site.ask("r", 2, session="u1") == [0]
    assert site.service.recorder.flush()
    events = [e.body for e in site.service.registry.audit.read(kinds=["request"])]
    assert sum("arm" in e for e in events) == len(events) - 1
    for event in events[:60]:
        assert event["experiment"] == made.id
        assert (event["delta"] == "") == (event["arm"] == "candidate") == (event["bucket"] < 5000)


def test_a_shadow_computes_and_is_not_seen_and_the_log_can_be_replayed(site: Site) -> None:
    site.client.begin_experiment("m", "", share=1.0, mode="shadow")
    for i in range(20):
        assert site.ask(f"r{i}", 2, 1) == [0, 1]
    report: dict = {}
    for _ in range(200):
        assert site.service.recorder.flush()
        report = site.client.experiment("m")
        if report["shadows"]["requests"] == 20:
            break
        time.sleep(0.02)
    assert report["shadows"] == {"requests": 20, "rows": 40, "agree": 20}
    assert report["holds"]
    registry = site.service.registry
    event = next(iter(registry.audit.read(kinds=["shadow"])))
    assert event.body["differ"]["output"][0] == 5.0
    found = replay(
        net(), registry.audit, Blobs(site.service.registry.rollouts.blobs.place), registry.load
    )
    assert {r.verdict for r in found} == {"identical"}


def test_a_candidate_passes_on_shots_and_is_promoted_and_another_is_refused(site: Site) -> None:
    labels = [0, 1, 2] * 40
    lang = ["en" if label != 1 else "de" for label in labels]
    shots = Shots(
        inputs={"input": hot(*labels)},
        labels=labels,
        slices={"lang": lang},
        ids=[f"shot-{i}" for i in range(120)],
    )
    # Right on as many: 2 won, 1 lost.
    refused = site.client.gate(
        "m", Policy(slices=("lang",)), candidate=site.worse, shots=shots, promote=True
    )
    assert not refused.gate.passed
    assert refused.alias is None
    assert any("lang=de lost: 40/40 to 0/40" in r for r in refused.gate.decision["reasons"])
    assert refused.gate.decision["regressed"][:2] == ["shot-1", "shot-4"]
    assert site.client.aliases()[0].delta == site.old
    passed = site.client.gate(
        "m", Policy(slices=("lang",)), candidate="", shots=shots, promote=True, watch=Watch(min_n=8)
    )
    assert passed.alias is not None
    assert (passed.alias.delta, passed.alias.reason) == ("", f"gate {passed.gate.id}")
    assert [g.passed for g in site.client.gates("m")] == [True, False]
    evidence = site.client.gate_evidence("m", passed.gate.id)
    assert evidence["predicted"]["incumbent"][:3] == [0, 1, 0]
    assert evidence["labels"] == labels
    # What was promoted turns out bad: the users say so, and the alias goes back.
    for i in range(8):
        assert site.client.aliases()[0].generation == 2
        site.ask(f"live-{i}", 0)
        site.client.feedback(f"live-{i}", correct=False)
    now = site.client.aliases()[0]
    assert (now.generation, now.delta) == (3, site.old)
    site.service.registry.audit.verify()


def test_a_candidate_passes_on_the_feedback_of_both_arms(site: Site) -> None:
    made = site.client.begin_experiment("m", "", share=0.5)
    arms = {"incumbent": 0, "candidate": 0}
    for i in range(160):
        right = (0, 2)[i % 2]
        site.ask(f"r{i}", right, session=f"u{i}")
        kept = site.client.feedback(f"r{i}", label=right, slices={"even": i % 2 == 0})
        assert kept.experiment == made.id
        assert kept.outcomes == ("1" if kept.arm == "candidate" or right == 0 else "0")
        arms[kept.arm] += 1
    report = site.client.experiment("m")
    assert {a: n for a, (_, n) in report["feedback"].items()} == arms
    with pytest.raises(ConflictError, match="no feedback on another candidate"):
        site.client.gate("m", candidate=site.worse)
    found = site.client.gate("m", Policy(min_n=40, slices=("even",)), promote=True)
    assert found.gate.passed
    assert found.alias is not None
    assert found.alias.generation == 2
    assert not site.client.experiment("m")["holds"]
    with pytest.raises(ConflictError, match="was moved since"):
        site.client.gate("m")


def test_a_feature_that_tells_examples_apart_makes_no_slices(site: Site) -> None:
    n = 501
    each = {"who": [f"u{i}" for i in range(n)], "lang": ["en"] * n}
    shots = Shots(
        inputs={"input": torch.eye(3)[torch.zeros(n, dtype=int)]}, labels=[0] * n, slices=each
    )
    policy = Policy(slices=("lang", "who"))
    with pytest.raises(InputError, match="502 slices, 501 of them by 'who'"):
        site.client.gate("m", policy, candidate=site.worse, shots=shots)
    assert site.client.gates("m") == []
    made = site.client.gate("m", Policy(slices=("lang",)), candidate=site.worse, shots=shots)
    assert [s["value"] for s in made.gate.decision["slices"]] == ["en"]


def test_gates_over_http_refuse_what_cannot_be_judged(site: Site) -> None:
    at = f"{site.url}/v1/tenants/acme/aliases/m"
    headers = {"Authorization": f"Bearer {site.secret}"}
    row = {"name": "input", "shape": [2, 3], "datatype": "FP32", "data": [0, 0, 5, 0, 5, 0]}
    shots = {"inputs": [row], "labels": [0, 1]}
    for body in (
        {"policy": {"metric": "auc"}},
        {"shots": {**shots, "labels": [0]}},
        {"shots": {**shots, "labels": []}},
        {"shots": {**shots, "ids": ["a", "a"]}},
        {"shots": {**shots, "slices": {"s": ["a"]}}},
        {"shots": {**shots, "inputs": []}},
        {"shots": shots, "output": "nothing"},
        {"shots": shots, "watch": {}},
        {"shots": shots, "promote": True, "watch": {"minimum": 1}},
        {"shots": shots, "candidate": site.old},
        # What a client should not be able to have kept, or said back to it without end.
        {"policy": {"margin": 10**400}},
        {"policy": {"slices": ["\ud800"]}},
        {"shots": {**shots, "ids": ["a", "x" * 201]}},
        {"shots": {**shots, "ids": ["a", "\ud800"]}},
        {"shots": {**shots, "slices": {"s": ["a", "x" * 101]}}},
        {"shots": {**shots, "slices": {"s\n": ["a", "b"]}}},
        {"shots": {**shots, "slices": {f"s{i}": ["a", "b"] for i in range(17)}}},
        {"shots": {**shots, "inputs": [{**row, "name": "\ud800"}]}},
    ):
        said = json.dumps({"candidate": site.worse, **body})
        answer = httpx.post(f"{at}:gate", content=said, headers={**headers, **JSON})
        assert (answer.status_code, answer.json()["type"]) == (400, "InputError"), answer.text
    for method, path, status in (
        ("GET", f"{at}/experiment", 404),
        ("DELETE", f"{at}/experiment", 404),
        ("GET", f"{at}/gates/{'0' * 64}", 404),
        ("GET", f"{site.url}/v1/tenants/globex/aliases/m/gates", 404),
        ("POST", f"{at}:gate", 404),
    ):
        asked = {} if method == "POST" else None
        assert httpx.request(method, path, json=asked, headers=headers).status_code == status
    assert httpx.post(f"{at}:gate", json={}).status_code == 401
