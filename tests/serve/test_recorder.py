"""No answer goes unrecorded while the database is away for a while."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from tessera.arch import base_hash
from tessera.errors import BusyError, InputError, StorageError
from tessera.serve import recorder as recording
from tessera.serve.blobs import Blobs
from tessera.serve.engine import Answer
from tessera.serve.recorder import Recorder
from tessera.serve.registry import Registry


@pytest.fixture
def place(tmp_path):
    model, blobs = nn.Linear(2, 1), Blobs(tmp_path / "blobs")
    registry = Registry(f"sqlite:///{tmp_path}/registry.db", blobs, base_hash=base_hash(model))
    yield registry, blobs
    registry.close()


def ask(recorder, name):
    answer = Answer(outputs={"y": torch.ones(1)}, delta="", batch=1, part=0)
    recorder.request(
        name, tenant="acme", alias="a", generation=1, answer=answer, inputs={"x": torch.ones(1, 2)}
    )


def recorded(registry):
    return [e.body["request"] for e in registry.audit.read(kinds=["request"])]


def test_a_database_that_comes_back_gets_everything_once(place, monkeypatch):
    registry, blobs = place
    recorder = Recorder(registry.audit, blobs, base_hash="0" * 64)
    real, failures = registry.audit.extend, iter(["before", "after"])

    def extend(entries):
        how = next(failures, None)
        if how == "after":  # written, but the answer was lost
            real(entries)
        if how is not None:
            raise StorageError("the database is away")
        return real(entries)

    monkeypatch.setattr(registry.audit, "extend", extend)
    ask(recorder, "first")
    assert recorder.flush()
    ask(recorder, "second")
    recorder.close()
    assert recorded(registry) == ["first", "second"]
    assert recorder.failed == 0
    registry.audit.verify()


def test_blobs_that_come_back_get_everything_once(place, monkeypatch):
    registry, blobs = place
    recorder = Recorder(registry.audit, blobs, base_hash="0" * 64)
    real, failures = Blobs.put, iter([True, True])

    def put(self, data):
        if next(failures, False):
            raise StorageError("the blobs are away")
        return real(self, data)

    monkeypatch.setattr(Blobs, "put", put)
    ask(recorder, "first")
    assert recorder.flush()
    ask(recorder, "second")
    recorder.close()
    assert recorded(registry) == ["first", "second"]
    assert recorder.failed == 0
    for event in registry.audit.read(kinds=["request"]):
        assert blobs.has(event.body["blob"])


def test_meanwhile_requests_are_refused(place, monkeypatch):
    registry, blobs = place
    monkeypatch.setattr(recording, "_WAITING", 3)
    monkeypatch.setattr(recording, "_CLOSE_S", 0.2)
    recorder = Recorder(registry.audit, blobs, base_hash="0" * 64)

    def extend(entries):
        raise StorageError("the database is away")

    monkeypatch.setattr(registry.audit, "extend", extend)

    def ask_on() -> None:
        for i in range(300):
            ask(recorder, str(i))
            time.sleep(0.002)

    with pytest.raises(BusyError, match="the audit log is behind"):
        ask_on()
    recorder.close()
    assert recorder.failed > 0
    assert recorded(registry) == []


def test_what_is_kept(place):
    registry, blobs = place
    with pytest.raises(InputError, match="keeps one of inputs, hashes, nothing"):
        Recorder(registry.audit, blobs, base_hash="0" * 64, keep="everything")
    for keep in ("hashes", "nothing"):
        recorder = Recorder(registry.audit, blobs, base_hash="0" * 64, keep=keep)
        ask(recorder, keep)
        recorder.close()
    (event,) = registry.audit.read(kinds=["request"])
    assert event.body["request"] == "hashes"
    assert event.body["blob"] == ""


def test_the_start_names_the_device_where_it_is_none_of_the_cpus(place, monkeypatch):
    registry, blobs = place
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"NVIDIA {device}")
    for device in ("cpu", "cuda:1", torch.device("xpu")):
        Recorder(registry.audit, blobs, base_hash="0" * 64, device=device).close()
    found = [e.body.get("device") for e in registry.audit.read(kinds=["server.start"])]
    assert found == [None, "NVIDIA cuda:1", "xpu"]
