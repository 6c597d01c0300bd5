"""Learning over HTTP, in a whole server: who may, what is wrong with a request, and the story."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from tests.serve._learning import net, policy

from tessera import random
from tessera.errors import AccessError, InputError, UnknownNameError
from tessera.serve.async_client import AsyncClient
from tessera.serve.client import Client
from tessera.serve.service import Service, ServiceSettings

ADMIN = "an-admin-key-of-the-tests"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Service, str]]:
    monkeypatch.setenv("TESSERA_ADMIN_KEY", ADMIN)
    where = ServiceSettings(db=f"sqlite:///{tmp_path}/registry.db", blobs=f"{tmp_path}/blobs")
    with Service(net(), where) as service:
        server = service.server(port=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield service, f"http://127.0.0.1:{server.port}"
        server.should_exit = True
        thread.join(20)


def keys(url: str, *scopes: str) -> str:
    with Client(url, ADMIN, tenant="acme") as root:
        if not root.tenants():
            root.create_tenant("acme")
        return root.create_key(scopes)[1]


def test_a_server_adapts_by_itself(served: tuple[Service, str]) -> None:
    service, url = served
    model = service.model
    with Client(url, keys(url, "infer", "manage")) as client:
        client.set_alias("clf", "", generation=0)
        assert client.learn(policy(min_new=96)).tenant == "acme"
        for i in range(24):
            x = torch.randn(16, 6, generator=random.generator(0, "tests.web", i))
            client.infer("clf", {"input": x}, request_id=f"r-{i}")
            with torch.no_grad():
                y = (model(x).argmax(1) + (i >= 12)) % 3
            client.feedback(f"r-{i}", label=y.tolist())
        until = time.monotonic() + 30
        while client.aliases()[0].generation == 1 and time.monotonic() < until:
            time.sleep(0.1)
        alias = client.aliases()[0]
        assert alias.generation == 2
        assert alias.reason.startswith("gate ")
        while client.learning("clf").busy:
            time.sleep(0.05)
        state = client.learning("clf")
        kinds = [step.kind for step in state.steps]
        assert kinds == ["learn.policy", "learn.drift", "learn.fit", "learn.gate"]
        assert state.steps[-1].delta == alias.delta
        assert state.spending.ms > 0
        assert state.policy.fit.r == 2
        client.end_learning("clf")
        with pytest.raises(UnknownNameError, match="does not learn"):
            client.learning("clf")
    service.recorder.flush()
    service.registry.audit.verify()


def test_who_may(served: tuple[Service, str]) -> None:
    service, url = served
    reader, manager = keys(url, "infer"), keys(url, "manage")
    service.registry.set_alias(
        "acme", "clf", "", generation=0, by=service.registry.authenticate(ADMIN)
    )
    with Client(url, reader) as client, pytest.raises(AccessError, match="'manage'"):
        client.learn(policy())
    with Client(url, manager, tenant="globex") as client, pytest.raises(UnknownNameError):
        client.learn(policy())
    budget, body = f"{url}/v1/tenants/acme/budget", {"ms": 5000.0, "window_s": 3600.0}
    as_manager = {"Authorization": f"Bearer {manager}"}
    with httpx.Client() as http:
        assert http.put(budget, headers=as_manager, json=body).status_code == 403
        made = http.put(budget, headers={"Authorization": f"Bearer {ADMIN}"}, json=body)
        assert made.status_code == 200
        assert made.json()["cap_ms"] == 5000
        assert http.get(budget, headers=as_manager).json() == made.json()
        wrong = {"Authorization": f"Bearer {ADMIN}"}
        nobody = http.put(f"{url}/v1/tenants/nobody/budget", headers=wrong, json=body)
        assert nobody.status_code == 404
    kinds = [e.kind for e in service.registry.audit.read(tenant="acme")]
    assert kinds.count("learn.budget") == 1


def test_what_is_wrong_is_said(served: tuple[Service, str]) -> None:
    service, url = served
    secret = keys(url, "infer", "manage")
    place = f"{url}/v1/tenants/acme/aliases/clf/learning"
    headers = {"Authorization": f"Bearer {secret}"}
    with httpx.Client(headers=headers) as http:
        assert http.put(place, json={}).status_code == 404  # there is no such alias
        service.registry.set_alias(
            "acme", "clf", "", generation=0, by=service.registry.authenticate(ADMIN)
        )
        for body, status, said in (
            ({"on": "monday"}, 400, "on is one of"),
            ({"fit": {"rank": 3}}, 400, "fit has no field 'rank'"),
            ({"gate": {"min_n": 0}}, 400, "min_n"),
            ({"window": 256}, 400, "384 examples together"),
            ({"often": 1}, 400, "often"),
            ({"window": "many"}, 400, "window"),
            # What no answer could say again.
            ({"output": "\ud800"}, 400, "Unicode"),
            ({"fit": {"sites": ["\ud800"]}}, 400, "Unicode"),
            ({"fit": {"alpha": math.nan}}, 400, "finite"),
            ({"fit": {"alpha": math.inf}}, 400, "finite"),
            ({"fit": {"kind": "x" * 20_000}}, 400, "up to 16384 bytes"),
            ({"gate": {"margin": 10**400}}, 400, "margin"),
        ):
            as_json = {"Content-Type": "application/json"}
            found = http.put(place, content=json.dumps(body), headers=as_json)
            assert (found.status_code, said in found.text) == (status, True), found.text
        assert http.get(place).status_code == 404
        for name, status in (("clf", 404), ("clf%00", 400)):  # which PostgreSQL would not take
            run = f"{url}/v1/tenants/acme/aliases/{name}/learning:run"
            assert http.post(run).status_code == status
        assert http.delete(place).status_code == 404
        assert http.get(place + "/steps").json() == []
        made = http.put(place, json={"fit": {"r": 2}})
        assert made.status_code == 200
        assert made.json()["on"] == "both"
        ran = http.post(place + ":run")
        assert ran.status_code == 201
        assert ran.json()["step"]["text"] == "there is no labelled example to fit to"
        assert [s["kind"] for s in http.get(place + "/steps").json()] == [
            "learn.policy",
            "learn.skip",
        ]
        assert http.get(place + "/steps", params={"limit": 0}).status_code == 400
        assert http.delete(place).status_code == 204


def test_the_other_client_asks_the_same(served: tuple[Service, str]) -> None:
    service, url = served
    secret = keys(url, "infer", "manage")
    by = service.registry.authenticate(ADMIN)
    service.registry.set_alias("acme", "clf", "", generation=0, by=by)

    async def main() -> None:
        async with AsyncClient(url, secret) as client:
            made = await client.learn(policy())
            assert made.json() == policy().json()
            assert (await client.learning("clf")).fresh == 0
            assert "no labelled example" in (await client.learn_now("clf")).step.text
            with pytest.raises(InputError, match="examples together"):
                await client.learn(policy(window=500))
            await client.end_learning("clf")

    asyncio.run(main())
