"""Fits and gates are done again from the log, to the last bit; what is spoilt is seen and named."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from tests.serve._learning import Place, policy
from torch import nn

from tessera import random
from tessera.arch import base_hash
from tessera.cli import main
from tessera.cli.replay import _Line
from tessera.errors import InputError
from tessera.serve import schema
from tessera.serve.blobs import Blobs
from tessera.serve.client import Client
from tessera.serve.consistency import differences
from tessera.serve.database import Database
from tessera.serve.fitting_log import order_of, settings_told, told
from tessera.serve.fitting_run import FitterSettings, Order, run_order
from tessera.serve.fitting_values import FitSettings, Rehearsal
from tessera.serve.gates import Policy
from tessera.serve.learning_steps import note
from tessera.serve.past import Replayed, replay
from tessera.serve.recorder import fingerprint
from tessera.serve.records import SYSTEM
from tessera.serve.registry import Registry
from tessera.serve.rollout_values import Shots, Watch
from tessera.serve.service import Service, ServiceSettings

MODEL = f"{__file__}:net"
MACHINE = fingerprint() | {"threads": "1"}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def shots(n: int = 12, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    draw = random.generator(seed, "tests.replay_fits")
    y = torch.arange(n) % 3
    return {"input": 2 * torch.eye(6)[y] + 0.3 * torch.randn(n, 6, generator=draw)}, y


def order(rehearsal: Rehearsal | None = None, **how: Any) -> Order:
    x, y = shots()
    said = FitSettings(**how)
    return Order(tenant="acme", inputs=x, labels=y, settings=said, rehearsal=rehearsal)


@contextlib.contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[tuple[Service, Client]]:
    """A service, and the client of its tenant acme."""
    where = ServiceSettings(
        db=f"sqlite:///{folder}/registry.db", blobs=f"{folder}/blobs", **settings
    )
    with Service(net(), where) as service:
        server = service.server(port=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.port}"
        try:
            with Client(url, service.admin_key or "", tenant="acme") as root:
                root.create_tenant("acme")
                _, secret = root.create_key(["infer", "manage"])
            with Client(url, secret) as client:
                yield service, client
        finally:
            server.should_exit = True
            thread.join(20)


@contextlib.contextmanager
def left(folder: Path) -> Iterator[tuple[Registry, Blobs]]:
    """What a service left in a folder."""
    blobs = Blobs(folder / "blobs")
    registry = Registry(f"sqlite:///{folder}/registry.db", blobs, base_hash=base_hash(net()))
    yield registry, blobs
    registry.close()


def again(folder: Path, **which: Any) -> list[Replayed]:
    with left(folder) as (registry, blobs):
        return list(replay(net(), registry.audit, blobs, registry.load, **which))


def edit(folder: Path, kind: str, **body: Any) -> int:
    """Change the body of the last event of a kind, whose number it says; the chain is broken."""
    database, t = Database(f"sqlite:///{folder}/registry.db"), schema.audit
    with database.write() as change:
        for (name,) in change.connection.execute(
            sa.text("select name from sqlite_master where type = 'trigger'")
        ).all():
            change.connection.execute(sa.text(f"drop trigger {name}"))
        last = sa.select(t.c.seq, t.c.body).where(t.c.kind == kind).order_by(t.c.seq.desc())
        seq, old = change.connection.execute(last.limit(1)).one()
        new = json.dumps(json.loads(old) | body)
        change.connection.execute(sa.update(t).where(t.c.seq == seq).values(body=new))
    database.close()
    return int(seq)


def place(folder: Path, blob: str) -> Path:
    found = folder / "blobs" / "sha256" / blob[:2] / blob
    found.chmod(0o600)
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# --- what a fit needs to be the same again -------------------------------------------------------


def test_a_fit_that_was_ended_is_the_one_of_as_many_steps() -> None:
    model, wide = net(), FitterSettings(ms=1e9)
    how: dict[str, Any] = {"r": 2, "sites": ["0"], "head": "2", "lr": 0.05}
    ended = run_order(model, None, order(steps=1000, **how), wide)
    assert ended.stopped_by == "loss"
    assert len(ended.losses) == ended.steps + 1 < 1000
    # Also where the loss has it end right before the last step that was allowed.
    for steps, why in ((ended.steps + 1, "loss"), (ended.steps, "steps")):
        found = run_order(model, None, order(steps=steps, **how), wide)
        assert (found.steps, found.stopped_by) == (ended.steps, why)
        assert found.delta.hash == ended.delta.hash
    capped = run_order(model, None, order(steps=50, budget={"steps": 7}, **how), wide)
    assert (capped.steps, capped.stopped_by, len(capped.losses)) == (7, "steps", 7)
    assert capped.delta.hash == run_order(model, None, order(steps=7, **how), wide).delta.hash


def test_time_ends_a_fit_after_some_steps_and_these_are_taken_again(tmp_path: Path) -> None:
    blobs, model = Blobs(tmp_path), net()
    wanted = order(r=2, steps=1000, lr=1e-3, budget={"ms": 30})
    fitted = run_order(model, None, wanted, FitterSettings())
    assert fitted.stopped_by == "ms"
    assert 1 <= fitted.steps == len(fitted.losses) < 1000
    body = told(wanted, fitted, hash=fitted.delta.hash, blobs=blobs, keep="inputs", machine=MACHINE)
    new = order_of(json.loads(json.dumps(body)), "acme", blobs)
    assert (new.settings.steps, new.settings.budget) == (fitted.steps, {})
    assert run_order(net(), None, new, FitterSettings()).delta.hash == fitted.delta.hash


def test_what_the_log_has_of_a_fit_is_what_was_ordered(tmp_path: Path) -> None:
    blobs, both = Blobs(tmp_path), torch.arange(48.0).reshape(4, 12)
    x = {"a.b": both[:2], "y": both[2:].T.contiguous().T, "x.": torch.ones(2, 1, dtype=torch.bool)}
    old = Rehearsal(inputs={"a": both[:1]}, labels=torch.tensor([2]), rho=0.25, lam=3.0)
    how = FitSettings(kind="mask", sites=("p", "q"), lr=0.1, seed=-5, steps=9, budget={"ms": 1.5})
    wanted = Order(tenant="acme", inputs=x, labels=None, settings=how, rehearsal=old)
    fitted = run_order(net(), None, order(r=1, steps=3), FitterSettings())
    body = told(
        wanted, fitted, hash="h", blobs=blobs, keep="inputs", machine=MACHINE | {"threads": "3"}
    )
    found = order_of(json.loads(json.dumps(body)), "acme", blobs)
    assert found.inputs.keys() == x.keys()
    assert all(torch.equal(found.inputs[n], x[n]) for n in x)
    assert found.labels is None
    assert found.rehearsal is not None
    assert torch.equal(found.rehearsal.inputs["a"], both[:1])
    assert (found.rehearsal.rho, found.rehearsal.lam) == (0.25, 3.0)
    assert (found.settings.kind, found.settings.seed, found.settings.lr) == ("mask", -5, 0.1)
    assert list(found.settings.sites or ()) == ["p", "q"]
    assert (body["machine"]["threads"], body["steps"], body["rows"]) == ("3", 3, 2)
    only = told(wanted, fitted, hash="h", blobs=blobs, keep="hashes", machine=MACHINE)
    assert (only["shots_blob"], only["rehearsal"]["shots_blob"]) == ("", "")
    assert (only["shots"], only["rehearsal"]["shots"]) == (
        body["shots"],
        body["rehearsal"]["shots"],
    )


def test_settings_that_the_log_cannot_take_are_refused_before_the_fit() -> None:
    with pytest.raises(InputError, match="name fewer sites"):
        settings_told(FitSettings(sites=["*" * 70_000]))
    with pytest.raises(InputError, match="finite"):
        settings_told(FitSettings(alpha=float("inf")))


@pytest.mark.parametrize("kind", ["prefix", "prompt", "lora"])
def test_fits_of_a_model_of_transformers_are_the_same_again(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="over a model of transformers")

    def bert() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=32, max_position_embeddings=40, num_labels=3,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config).eval()

    draw, blobs = random.generator(0, "tests.replay_fits.bert"), Blobs(tmp_path)
    x = {"input_ids": torch.randint(1, 50, (6, 9), generator=draw), "labels": torch.arange(6) % 3}
    x["attention_mask"] = torch.ones(6, 9, dtype=torch.int64)
    how = FitSettings(kind=kind, tokens=None if kind == "lora" else 3, steps=5, lr=0.01)
    wanted = Order(tenant="acme", inputs=x, labels=None, settings=how)
    fitted = run_order(bert(), None, wanted, FitterSettings())
    body = told(wanted, fitted, hash=fitted.delta.hash, blobs=blobs, keep="inputs", machine=MACHINE)
    new = order_of(json.loads(json.dumps(body)), "acme", blobs)
    assert run_order(bert(), None, new, FitterSettings()).delta.hash == fitted.delta.hash


# --- over a server -------------------------------------------------------------------------------


def fit_much(service: Service, client: Client) -> None:
    x, y = shots()
    client.set_alias("clf", "", generation=0)
    first = client.fit(x, y, FitSettings(r=2, sites=["0"], head="2", steps=40, lr=0.05))
    client.fit(x, y, FitSettings(parent=first.hash, steps=5), alias="clf", generation=1)
    client.fit(x, y, FitSettings(kind="ia3", sites=["0"], steps=4))
    client.fit(x, y, FitSettings(kind="mask", sites=["*.bias"], steps=30, budget={"ms": 20}))
    client.fit(x, y, FitSettings(steps=6, seed=3, budget={"joules": 50.0}))
    session = client.session(ttl_s=60, inputs=x, labels=y, how=FitSettings(r=1, steps=3))
    client.infer(session.name, x)
    old, labels = shots(9, seed=1)
    rehearsal = Rehearsal(inputs=old, labels=labels, rho=0.5, lam=10.0)
    wanted = order(rehearsal, parent=first.hash, steps=6, lr=0.01)
    fitted = service.fitter.submit(wanted).result()
    blobs = service.registry.rollouts.blobs
    body = told(wanted, fitted, hash=fitted.delta.hash, blobs=blobs, keep="inputs", machine=MACHINE)
    ledger = service.registry._ledger
    with ledger.write() as change:  # as a round in the background does it
        note(ledger, change, "acme", "clf", "learn.fit", {**body, "why": "asked"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a server that fitted, gated, promoted and rolled back."""
    folder = tmp_path_factory.mktemp("made")
    with serving(folder) as (service, client):
        fit_much(service, client)
        x, y = shots(60, seed=2)
        held = client.fit(x, y, FitSettings(r=2, sites=["0"], head="2", steps=60, lr=0.05))
        labelled = Shots(inputs=x, labels=y.tolist(), slices={"even": [str(i % 2) for i in y]})
        client.set_alias("m", "", generation=0)
        policy = Policy(min_n=20, slices=("even",), slice_min_n=5)
        gated = client.gate("m", policy, candidate=client.deltas()[2].hash, shots=labelled)
        assert not gated.gate.passed
        gated = client.gate(
            "m", policy, candidate=held.hash, shots=labelled, promote=True, watch=Watch(min_n=8)
        )
        assert gated.gate.passed
        for i in range(8):
            client.infer("m", {"input": torch.ones(1, 6)}, request_id=f"live-{i}")
            client.feedback(f"live-{i}", correct=False)
        assert client.history("m")[-1].reason.startswith("rollback")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def test_fits_of_every_kind_and_gates_are_the_same_again(made: Path) -> None:
    found = again(made)
    assert [(r.name, r.detail) for r in found if r.verdict != "identical"] == []
    kinds = [r.what for r in found]
    assert [kinds.count(k) for k in ("fits", "gates", "requests")] == [8, 3, 9]
    assert {r.what for r in again(made, what=["gates"])} == {"gates"}
    assert again(made, what=["fits"], tenant="globex") == []
    with pytest.raises(InputError, match="not 'swaps'"):
        again(made, what=["swaps"])


@pytest.mark.parametrize(
    ("what", "kind", "field"),
    [
        ("fits", "delta.fit", "shots_blob"),
        ("fits", "learn.fit", "shots_blob"),
        ("gates", "gate.passed", "evidence"),
    ],
)
def test_a_spoilt_blob_of_shots_or_evidence_is_seen(
    copy: Path, what: str, kind: str, field: str
) -> None:
    with left(copy) as (registry, _):
        body = list(registry.audit.read(kinds=[kind]))[-1].body
    blob = str(body[field] if kind != "learn.fit" else body["rehearsal"][field])
    flip(place(copy, blob))
    odd = [r for r in again(copy, what=[what]) if r.verdict != "identical"]
    assert {r.verdict for r in odd} == {"damaged"}
    assert all(blob in r.detail for r in odd)
    place(copy, blob).unlink()
    odd = [r for r in again(copy, what=[what]) if r.verdict != "identical"]
    assert {r.verdict for r in odd} == {"unknown"}
    assert all("there is no blob" in r.detail for r in odd)


OTHERWISE: dict[str, tuple[str, dict[str, Any], str]] = {
    "another delta": ("delta.fit", {"delta": "f" * 64}, "on the same machine: this should not"),
    "another machine": (
        "delta.fit",
        {"delta": "f" * 64, "machine": {"torch": "1.0", "threads": "1"}},
        "torch 1.0 then, ",
    ),
    "a fit that fails": ("delta.fit", {"settings": {"sites": ["nowhere"]}}, "it fails now: sites"),
    "other reasons": ("gate.refused", {"reasons": ["bad luck"]}, "gives other reasons than"),
    "another decision": ("gate.passed", {"decision": "f" * 64}, "gives other decision than"),
    "another gate's": ("gate.passed", {"look": 9}, "the evidence is of another gate"),
    "another device": (
        "delta.fit",
        {"delta": "0" * 64, "machine": {"threads": "1", "device": "NVIDIA H100"}},
        "device NVIDIA H100 then, the CPU now",
    ),
    "no regression": ("watch.regressed", {"live": [8, 8]}, "no regression"),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_the_log_says_otherwise_is_different(copy: Path, what: str) -> None:
    kind, body, said = OTHERWISE[what]
    seq = edit(copy, kind, **body)
    (found,) = [r for r in again(copy, what=["fits", "gates"]) if r.verdict != "identical"]
    assert (found.seq, found.verdict) == (seq, "different")
    assert said in found.detail


def test_a_gate_that_passed_on_the_evidence_of_a_refusal(copy: Path) -> None:
    with left(copy) as (registry, _):
        refused = next(iter(registry.audit.read(kinds=["gate.refused"]))).body
    edit(copy, "gate.passed", **refused)
    odd = [r for r in again(copy, what=["gates"]) if r.verdict != "identical"]
    assert [r.detail for r in odd] == ["the log says passed, the evidence gives refused"]


def test_an_event_that_is_none_is_damaged(copy: Path) -> None:
    edit(copy, "delta.fit", settings={"steps": 3, "speed": 9})
    edit(copy, "gate.passed", evidence=5)
    odd = [r for r in again(copy, what=["fits", "gates"]) if r.verdict != "identical"]
    assert ["damaged" in r.verdict or r.verdict for r in odd] == [True, "unknown"]
    assert "'speed'" in odd[0].detail


@pytest.mark.parametrize("keep", ["hashes", "nothing"])
def test_of_a_server_that_keeps_less_fits_are_unknown(tmp_path: Path, keep: str) -> None:
    with serving(tmp_path, keep=keep) as (_, client):
        x, y = shots()
        client.fit(x, y, FitSettings(steps=2))
        session = client.session(ttl_s=60, inputs=x, labels=y, how=FitSettings(steps=2))
        client.infer(session.name, x)
    found = again(tmp_path)
    assert [(r.what, r.verdict) for r in found[:2]] == [("fits", "unknown")] * 2
    assert {"its shots were not kept (the server keeps hashes)"} == {r.detail for r in found[:2]}
    assert [(r.what, r.verdict) for r in found[2:]] == [("requests", "unknown")] * (
        keep == "hashes"
    )
    blobs = [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()]
    assert len(blobs) == 1  # the delta, which is both times the same


def test_rounds_in_the_background_are_the_same_again(url: str, tmp_path: Path) -> None:
    at = Place(url, tmp_path)
    at.learning.set(policy(lam=1.0, replay=64, watch=Watch(min_n=50)), by=SYSTEM)
    at.learning.budgets.set("acme", ms=60_000.0, joules=None, window_s=3600.0, by=SYSTEM)
    for drifted in (True, False):
        at.traffic(12, drifted=drifted)
        at.learner.run("acme", "clf")
    assert at.steps() == ["policy", "fit", "gate", "fit", "gate"]
    assert at.learning.steps("acme", "clf")[-2].body["rehearsal"]["rows"] == 64
    load, audit = at.registry.load, at.registry.audit
    found = list(replay(at.model, audit, at.blobs, load, what=["fits", "gates"]))
    assert [(r.what, r.verdict, r.detail) for r in found] == [
        ("fits", "identical", ""),
        ("gates", "identical", ""),
    ] * 2
    at.close()
    database = Database(url)
    assert list(differences(database)) == []
    database.close()


# --- the command ---------------------------------------------------------------------------------


def replayed(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    where = ["--db", f"sqlite:///{folder}/registry.db", "--blobs", f"{folder}/blobs"]
    status = main(["replay", "--model", MODEL, *where, *options])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_the_command_says_what_is_the_same(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    status, said = replayed(made, capsys, "--json", str(file))
    assert status == 0, said
    lines = said.splitlines()
    assert lines[0].startswith("the chain is whole: ")
    assert lines[1:] == [
        "the tables are what it says",
        "7 deltas: whole",
        "9 requests: 9 identical",
        "8 fits: 8 identical",
        "3 gates: 3 identical",
    ]
    found = json.loads(file.read_text())
    assert found["counts"]["fits"] == {"identical": 8}
    assert (found["whole"], found["state"], found["damaged"], found["events"]) == (True, [], [], [])
    status, said = replayed(made, capsys, "--what", "gates", "--all", "--json", str(file))
    assert status == 0
    assert "requests" not in said
    assert said.count(" gate ") == 3
    assert [e["verdict"] for e in json.loads(file.read_text())["events"]] == ["identical"] * 3


def test_the_command_refuses_what_it_cannot_do(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replayed(made, capsys, "--what", "fits,swaps")[0] == 2
    status, said = replayed(made, capsys, "--json", str(made / "nowhere" / "f.json"))
    assert (status, "make it first" in said) == (2, True)


def test_the_command_sees_a_row_that_was_changed(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database, t = Database(f"sqlite:///{copy}/registry.db"), schema.aliases
    with database.write() as change:
        forged = sa.update(t).where(t.c.name == "clf").values(delta="f" * 64)
        change.connection.execute(forged)
    database.close()
    file = tmp_path / "found.json"
    status, said = replayed(copy, capsys, "--what", "gates", "--json", str(file))
    assert status == 1
    assert "the alias clf of acme has delta 'ffff" in said
    assert "1 difference between the tables and the log" in said
    assert len(json.loads(file.read_text())["state"]) == 1


def test_the_command_sees_a_spoilt_delta_and_a_fit_that_needs_it(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with left(copy) as (registry, _):
        put = next(iter(registry.audit.read(kinds=["delta.put"]))).body
    flip(place(copy, put["blob"]))
    status, said = replayed(copy, capsys, "--what", "fits")
    assert status == 1
    assert f"the delta {put['hash']} of acme: the blob {put['blob']}" in said
    assert "7 deltas: 1 damaged" in said
    assert "8 fits: 2 damaged, 6 identical" in said  # those that went on from it


def test_the_command_stops_at_a_broken_chain_and_writes_it_down(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seq, file = edit(copy, "delta.fit", rows=99), tmp_path / "found.json"
    status, said = replayed(copy, capsys, "--json", str(file))
    assert (status, f"broken at event {seq}" in said) == (1, True)
    found = json.loads(file.read_text())
    assert (found["whole"], f"event {seq}" in found["chain"]) == (False, True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_on_a_terminal_and_nothing_in_a_pipe() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        line = _Line(stream)
        line.show("one")
        line.show("two")  # too soon after it
        line.clear()
        line.show("three")
        line.clear()
        line.clear()
    assert terminal.getvalue() == "\r\x1b[Kone\r\x1b[K\r\x1b[Kthree\r\x1b[K"
    assert pipe.getvalue() == ""
