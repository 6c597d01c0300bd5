"""The whole of it over HTTP: tenants, deltas, swaps, rollback, the log, and everything again."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time

import pytest
import torch
from torch import nn

from tessera import peft, random
from tessera.arch import base_hash
from tessera.errors import (
    AccessError,
    CheckpointError,
    ConflictError,
    DeltaError,
    InputError,
    UnknownNameError,
)
from tessera.serve.blobs import Blobs
from tessera.serve.client import Client
from tessera.serve.past import replay
from tessera.serve.registry import Registry
from tessera.serve.service import Service, ServiceSettings


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def fitted(model, seed):
    delta = peft.lora(model, 2)
    for tensor in delta.parameters():
        draw = random.generator(seed, "tests.service")
        tensor.data.copy_(torch.randn(tensor.shape, generator=draw))
    return delta.snapshot()


@contextlib.contextmanager
def serving(model, folder, **settings):
    where = ServiceSettings(
        db=f"sqlite:///{folder}/registry.db", blobs=str(folder / "blobs"), **settings
    )
    with Service(model, where) as service:
        server = service.server(port=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield service, f"http://127.0.0.1:{server.port}"
        finally:
            server.should_exit = True
            thread.join(20)


def tenant_of(url, admin, name):
    with Client(url, admin, tenant=name) as root:
        root.create_tenant(name)
        _, secret = root.create_key(["infer", "manage"])
    return Client(url, secret)


def input_name(client, alias):
    return (
        client.metadata(alias)["inputs"][0]["name"] if client.metadata(alias)["inputs"] else "input"
    )


def right(model, delta, x):
    with torch.no_grad():
        return (model if delta is None else peft.apply(model, delta))(x)


def test_from_the_first_key_to_the_last_bit(tmp_path):
    model, asked = net(), []
    one, two = fitted(model, 1), fitted(model, 2)
    with serving(model, tmp_path) as (service, url):
        admin = service.admin_key
        assert admin is not None
        acme, globex = (tenant_of(url, admin, n) for n in ("acme", "globex"))
        assert acme.upload(one).hash == one.hash
        globex.upload(two)
        acme.set_alias("clf", one.hash, generation=0)
        globex.set_alias("clf", two.hash, generation=0)
        draw = random.generator(0, "tests.asked")
        for call in range(30):
            x = torch.randn(1 + call % 3, 6, generator=draw)
            for client, delta in ((acme, one), (globex, two)):
                y = client.infer("clf", {"input": x})["output"]
                assert torch.allclose(y, right(model, delta, x), atol=1e-5)
                asked.append(y)
        # A swap, and back.
        acme.upload(two)
        with pytest.raises(ConflictError):
            acme.set_alias("clf", two.hash, generation=0)
        acme.set_alias("clf", two.hash, generation=1, reason="better")
        x = torch.ones(2, 6)
        assert torch.allclose(
            acme.infer("clf", {"input": x})["output"], right(model, two, x), atol=1e-5
        )
        with pytest.raises(InputError, match="a reason is one line"):
            acme.rollback("clf", reason="two\nlines")
        back = acme.rollback("clf", reason="worse in the evening")
        assert (back.generation, back.reason) == (
            3,
            "rollback to generation 1: worse in the evening",
        )
        assert torch.allclose(
            acme.infer("clf", {"input": x})["output"], right(model, one, x), atol=1e-5
        )
        assert [a.delta for a in acme.history("clf")] == [one.hash, two.hash, one.hash]
        acme.set_alias("plain", "", generation=0)
        assert torch.allclose(
            acme.infer("plain", {"input": x})["output"], right(model, None, x), atol=1e-6
        )
        acme.close()
        globex.close()
    blobs = Blobs(str(tmp_path / "blobs"))
    registry = Registry(f"sqlite:///{tmp_path}/registry.db", blobs, base_hash=base_hash(model))
    assert registry.audit.verify() > 60
    again = list(replay(net(), registry.audit, blobs, registry.load))
    assert len(again) == 63
    assert {r.verdict for r in again} == {"identical"}
    assert {r.tenant for r in again} == {"acme", "globex"}
    own = list(replay(net(), registry.audit, blobs, registry.load, tenant="globex"))
    assert len(own) == 30
    registry.close()


def test_a_tenant_sees_its_own_things_only(tmp_path):
    model = net()
    one = fitted(model, 1)
    with serving(model, tmp_path) as (service, url):
        acme, globex = (tenant_of(url, service.admin_key, n) for n in ("acme", "globex"))
        acme.upload(one)
        acme.set_alias("clf", one.hash, generation=0)
        with pytest.raises(UnknownNameError):
            globex.infer("clf", {"input": torch.ones(1, 6)})
        with pytest.raises(UnknownNameError):
            globex.set_alias("mine", one.hash, generation=0)
        assert globex.deltas() == []
        with pytest.raises(AccessError), Client(url, "tsr_wrong") as nobody:
            nobody.infer("clf", {"input": torch.ones(1, 6)})
        torch.manual_seed(1)
        other = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        with pytest.raises(DeltaError):
            globex.upload(peft.lora(other, 2))
        with pytest.raises(InputError):
            acme.infer("clf", {"input": torch.ones(1, 5)})
        acme.close()
        globex.close()


def test_what_was_acknowledged_is_there_after_a_restart(tmp_path):
    model = net()
    one = fitted(model, 1)
    with serving(model, tmp_path) as (service, url):
        admin = service.admin_key
        acme = tenant_of(url, admin, "acme")
        acme.upload(one)
        acme.set_alias("clf", one.hash, generation=0)
    with serving(model, tmp_path) as (service, url):
        assert service.admin_key is None
        with Client(url, admin, tenant="acme") as root:
            assert [a.delta for a in root.aliases()] == [one.hash]
            y = root.infer("clf", {"input": torch.ones(2, 6)})["output"]
        assert torch.allclose(y, right(model, one, torch.ones(2, 6)), atol=1e-5)
    acme.close()


def test_swaps_under_load_give_one_version_or_the_other(tmp_path):
    model, x = net(), torch.randn(2, 6)
    versions = [fitted(model, s) for s in range(4)]
    allowed = [right(model, d, x) for d in versions]
    wrong, counted, done = [], [], threading.Event()
    with serving(model, tmp_path, slots=2) as (service, url):
        acme = tenant_of(url, service.admin_key, "acme")
        for delta in versions:
            acme.upload(delta)
        acme.set_alias("clf", versions[0].hash, generation=0)

        def ask() -> None:
            n = 0
            while not done.is_set():
                y = acme.infer("clf", {"input": x})["output"]
                n += 1
                if not any(torch.allclose(y, a, atol=1e-5) for a in allowed):
                    wrong.append(y)
            counted.append(n)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for t in threads:
            t.start()
        for generation in range(1, 40):
            acme.set_alias("clf", versions[generation % 4].hash, generation=generation)
        done.set()
        for t in threads:
            t.join()
        acme.close()
    assert not wrong
    assert sum(counted) > 40


def test_tampering_shows(tmp_path):
    model = net()
    with serving(model, tmp_path) as (service, url):
        acme = tenant_of(url, service.admin_key, "acme")
        acme.set_alias("plain", "", generation=0)
        for _ in range(3):
            acme.infer("plain", {"input": torch.ones(2, 6)})
        acme.close()
    blobs, db = Blobs(str(tmp_path / "blobs")), f"sqlite:///{tmp_path}/registry.db"
    # A byte of the inputs that were kept.
    stored = max((tmp_path / "blobs").rglob("*"), key=lambda p: p.is_file() and p.stat().st_mtime)
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.chmod(0o600)
    stored.write_bytes(content)
    registry = Registry(db, blobs, base_hash=base_hash(model))
    verdicts = {r.verdict for r in replay(model, registry.audit, blobs, registry.load)}
    assert "damaged" in verdicts
    registry.audit.verify()
    registry.close()
    # A word of the log.
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        for (name,) in connection.execute(
            "select name from sqlite_master where type = 'trigger'"
        ).fetchall():
            connection.execute(f"drop trigger {name}")
        connection.execute(
            "update audit set tenant = 'globex' "
            "where seq = (select max(seq) from audit where kind = 'request')"
        )
    registry = Registry(db, blobs, base_hash=base_hash(model))
    with pytest.raises(CheckpointError):
        registry.audit.verify()
    registry.close()
