"""Blobs in a process that speaks S3 over HTTP: a server on it, and that process going away."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
import torch

from tessera import peft
from tessera.arch import Delta
from tessera.errors import CheckpointError, MissingDataError, StorageError
from tessera.serve.blobs import Blobs
from tessera.serve.client import Client
from tessera.serve.fitting_values import FitSettings
from tessera.serve.records import SYSTEM
from tessera.serve.registry import Registry

ASKED = {"input": torch.linspace(-1.0, 1.0, 12).reshape(2, 6)}
SHOTS = {"input": torch.linspace(-2.0, 2.0, 48).reshape(8, 6)}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


@pytest.fixture
def place(s3, tmp_path: Path) -> str:
    return f"s3://{s3.BUCKET}/{tmp_path.name}"


def key_of(place: str, name: str) -> str:
    return f"{place.rpartition('/')[2]}/sha256/{name[:2]}/{name}"


def test_a_blob_that_is_there_is_not_written_again(s3, place: str) -> None:
    one, other = Blobs(place), Blobs(place)
    name = one.put(b"content")
    before = obstore.head(s3.store, key_of(place, name))
    asked = len(s3.log().splitlines())
    assert other.put(b"content") == name
    assert obstore.head(s3.store, key_of(place, name)) == before
    put = [line for line in s3.log().splitlines()[asked:] if '"PUT' in line or "PUT /" in line]
    assert len(put) == 1
    assert " 412 " in put[0]  # Precondition Failed: If-None-Match was heard


def test_a_damaged_object_is_found_and_mended_and_a_lost_one_is_told(s3, place: str) -> None:
    blobs = Blobs(place)
    name = blobs.put(b"content")
    for damage in (b"Content", b"", b"content and more"):
        obstore.put(s3.store, key_of(place, name), damage)
        with pytest.raises(CheckpointError, match=f"{name} in {place} is damaged"):
            blobs.get(name)
        blobs.put(b"content")
        assert blobs.get(name) == b"content"
    obstore.delete(s3.store, key_of(place, name))
    with pytest.raises(MissingDataError, match=f"no blob {name} in {place}"):
        blobs.get(name)


@pytest.mark.parametrize("wrong", ["no-such-bucket/x", "UPPER_case/x"])
def test_a_bucket_that_is_not_there(s3, wrong: str) -> None:
    with pytest.raises(StorageError, match="could not write the blob"):
        Blobs(f"s3://{wrong}").put(b"content")


def test_a_registry_over_it(url: str, s3, place: str) -> None:
    delta = Delta(kind="prompt", tensors={"prompt": torch.ones(2, 4)})
    registry = Registry(url, Blobs(place), base_hash="")
    registry.create_tenant("one", by=SYSTEM)
    record = registry.put_delta("one", delta, by=SYSTEM)
    assert registry.load(record.hash).hash == delta.hash
    registry.close()

    registry = Registry(url, Blobs(place), base_hash="")
    assert registry.load(record.hash).hash == delta.hash
    [blob] = list(Blobs(place).stored())
    obstore.delete(s3.store, key_of(place, blob.name))
    with pytest.raises(MissingDataError, match="restore it from a backup, or put the same"):
        registry.load(record.hash)
    assert registry.put_delta("one", delta, by=SYSTEM).hash == record.hash
    assert registry.load(record.hash).hash == delta.hash
    s3.stop()
    try:
        with pytest.raises(StorageError, match="could not read the blob"):
            registry.load(record.hash)
        other = Delta(kind="prompt", tensors={"prompt": torch.zeros(2, 4)})
        with pytest.raises(StorageError, match="could not write the blob"):
            registry.put_delta("one", other, by=SYSTEM)
        assert [r.hash for r in registry.deltas("one")] == [record.hash]
    finally:
        s3.start()
    assert registry.load(record.hash).hash == delta.hash
    registry.put_delta("one", other, by=SYSTEM)
    registry.audit.verify()
    registry.close()


# --- a whole server -----------------------------------------------------------------------------


@pytest.fixture
def server(served, s3, place: str, tmp_path: Path) -> Iterator:
    made = served.Served(tmp_path, options=["--slots", "1"], blobs=place)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait()


def answers(served, server, secret: str, alias: str, delta: Delta, request: str) -> None:
    """What the alias says is what that delta says."""
    with contextlib.closing(served.Line(server.port, secret)) as line:
        said = line.infer(alias, ASKED, request)
    assert (said.status, said.delta) == (200, delta.hash)
    with torch.no_grad():
        wanted = peft.apply(served.net(), delta)(ASKED["input"])
    assert torch.allclose(said.outputs["output"], wanted, atol=1e-5)


def recorded(server, wanted: set[str]) -> None:
    """Wait until these requests are in the log, their inputs in the blobs.

    What speaks S3 here holds it in memory, and what is written while it is read to be put back
    would be lost: no such thing happens to a real one.
    """
    registry = server.registry()
    until = time.monotonic() + 60
    while not wanted <= {e.body["request"] for e in registry.audit.read(kinds=["request"])}:
        assert time.monotonic() < until
        time.sleep(0.02)
    registry.close()


def refused(server, secret: str, path: str) -> None:
    """503, in JSON that says what it was."""
    data = ASKED["input"].flatten().tolist()
    tensor = {"name": "input", "shape": [2, 6], "datatype": "FP32", "data": data}
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"inputs": [tensor]})
    line.request("POST", path, body, {"Authorization": f"Bearer {secret}"})
    response = line.getresponse()
    said = json.loads(response.read())
    line.close()
    assert response.status == 503, said
    assert response.headers["content-type"].startswith("application/json")
    assert said["error"].startswith("the server's storage failed; its log has request ")


@pytest.mark.slow
def test_a_server_over_it_restarts_and_outlives_its_absence(served, server, s3) -> None:
    server.start()
    secret = server.tenant("acme")
    deltas = [served.drawn(served.net(), "net", n) for n in range(3)]
    with Client(server.url, secret, timeout_s=300) as client:
        for name, delta in zip("ab", deltas, strict=False):
            client.upload(delta)
            client.set_alias(name, delta.hash, generation=0)
        fitted = client.fit(SHOTS, LABELS, FitSettings(steps=5))
    registry = server.registry()
    after = registry.load(fitted.hash, tenant="acme")
    registry.close()
    answers(served, server, secret, "a", deltas[0], "before")
    assert server.end() == 0

    server.start()
    answers(served, server, secret, "a", deltas[0], "restarted")
    answers(served, server, secret, "b", deltas[1], "restarted-too")
    answers(served, server, secret, "a", deltas[0], "and-back")

    recorded(server, {"before", "restarted", "restarted-too", "and-back"})
    s3.stop()
    try:
        # What is resident answers; what has to be fetched does not, and nothing is half done.
        answers(served, server, secret, "a", deltas[0], "while-away")
        with Client(server.url, secret, timeout_s=300) as client:
            held = [record.hash for record in client.deltas()]
            for _ in range(2):
                with pytest.raises(StorageError, match="the server's storage failed; its log has"):
                    client.upload(deltas[2])
            assert "could not write the blob" in (server.folder / "log").read_text()
            with pytest.raises(StorageError, match="storage failed"):
                client.fit(SHOTS, LABELS, FitSettings(steps=4))
            assert [record.hash for record in client.deltas()] == held
            client.set_alias("c", fitted.hash, generation=0)  # needs no blob
        refused(server, secret, "/v2/models/c/infer")
        answers(served, server, secret, "a", deltas[0], "and-on")
        assert server.process.poll() is None
    finally:
        s3.start()

    answers(served, server, secret, "c", after, "back")
    with Client(server.url, secret, timeout_s=300) as client:
        client.upload(deltas[2])
        client.set_alias("a", deltas[2].hash, generation=1)
    answers(served, server, secret, "a", deltas[2], "swapped")
    assert server.end() == 0
    assert "could not be written to the audit log" not in (server.folder / "log").read_text()
    registry = server.registry()
    registry.audit.verify()
    logged = [event.body["request"] for event in registry.audit.read(kinds=["request"])]
    registry.close()
    for request in ("before", "restarted", "while-away", "and-on", "back", "swapped"):
        assert logged.count(request) == 1
    done = server.replay()
    assert done.returncode == 0, done.stdout + done.stderr
