"""Keys of one's own kind over HTTP: the admins', and a tenant's."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest
from starlette.testclient import TestClient

from tessera.errors import AccessError, ConflictError, InputError, UnknownNameError
from tessera.serve.async_client import AsyncClient
from tessera.serve.client import Client


@pytest.fixture
def web(house):
    return TestClient(house.app())


def test_an_admin_makes_another_and_that_one_revokes_the_first(house, web):
    old = house.headers("admin")
    made = web.post("/v1/keys", json={"scopes": ["admin"]}, headers=old)
    assert made.status_code == 201
    key, secret = made.json()["key"], made.json()["secret"]
    assert (key["tenant"], key["scopes"]) == (None, ["admin"])
    new = {"Authorization": f"Bearer {secret}"}
    shown = web.get("/v1/keys", headers=new)
    (first,) = [k["id"] for k in shown.json() if k["id"] != key["id"]]
    assert secret not in shown.text  # it was said once
    assert web.delete(f"/v1/keys/{first}", headers=new).status_code == 204
    assert web.get("/v1/keys", headers=old).status_code == 401
    told = [(e.kind, e.body["by"]) for e in house.registry.audit.read(tenant="")][-2:]
    assert told == [("key.created", first), ("key.revoked", key["id"])]


def test_the_last_admins_key_stays(house, web):
    headers = house.headers("admin")
    (only,) = web.get("/v1/keys", headers=headers).json()
    refused = web.delete(f"/v1/keys/{only['id']}", headers=headers)
    assert refused.status_code == 409
    assert "last admin" in refused.json()["error"]
    assert web.get("/v1/keys", headers=headers).json() == [only]


def test_two_admins_that_revoke_each_other_at_once_leave_one(house, web):
    secrets = [house.secrets["admin"]]
    secrets.append(
        web.post("/v1/keys", json={"scopes": ["admin"]}, headers=house.headers("admin")).json()[
            "secret"
        ]
    )
    keys = [house.registry.authenticate(secret) for secret in secrets]
    start, answers = threading.Barrier(2), []

    def revoke(secret: str, other: str) -> None:
        headers = {"Authorization": f"Bearer {secret}"}
        start.wait(10)
        answers.append(web.delete(f"/v1/keys/{other}", headers=headers).status_code)

    threads = [threading.Thread(target=revoke, args=(secrets[i], keys[1 - i].id)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers.count(204) == 1
    assert len(house.registry.keys(None)) == 1


def test_a_tenants_key_sees_and_makes_its_tenants_and_never_an_admins(house, web):
    headers = house.headers("acme")
    own = {k["id"] for k in web.get("/v1/keys", headers=headers).json()}
    assert own == {k.id for k in house.registry.keys("acme")}
    assert web.post("/v1/keys", json={"scopes": ["admin"]}, headers=headers).status_code == 403
    made = web.post("/v1/keys", json={"scopes": ["infer"]}, headers=headers).json()["key"]
    assert made["tenant"] == "acme"
    for other in (house.registry.keys(None)[0].id, house.registry.keys("globex")[0].id):
        assert web.delete(f"/v1/keys/{other}", headers=headers).status_code == 404
    assert web.delete(f"/v1/keys/{made['id']}", headers=headers).status_code == 204


@pytest.mark.parametrize(
    ("who", "scopes", "status"),
    [
        ("admin", ["infer"], 400),
        ("admin", ["admin", "infer"], 400),
        ("admin", [], 400),
        ("reader", ["infer"], 403),
        (None, ["admin"], 401),
    ],
)
def test_what_is_refused_makes_no_key(house, web, who, scopes, status):
    before = len(house.registry.view().keys)
    headers = house.headers(who) if who else {}
    answer = web.post("/v1/keys", json={"scopes": scopes}, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "type"}
    assert len(house.registry.view().keys) == before


def test_an_admin_does_not_revoke_a_tenants_key_here(house, web):
    id = house.registry.keys("acme")[0].id
    assert web.delete(f"/v1/keys/{id}", headers=house.headers("admin")).status_code == 404


def test_the_clients_manage_the_keys_of_their_kind(house, start):
    url = f"http://{start(house.app())}"
    with Client(url, house.secrets["admin"]) as root:
        key, secret = root.create_key(["admin"])
        assert key.is_admin
        held = root.keys()
        assert key.id in {k.id for k in held}
        with pytest.raises(InputError, match="has admin"):
            root.create_key(["infer"])
        with pytest.raises(UnknownNameError):
            root.revoke_key("none-such")
        with Client(url, house.secrets["admin"], tenant="acme") as acme:
            assert acme.create_key(["infer"])[0].tenant == "acme"
            with pytest.raises(AccessError, match="never admin"):
                acme.create_key(["admin"])
            held = acme.keys()
            assert {k.tenant for k in held} == {"acme"}

    async def the_rest() -> None:
        async with AsyncClient(url, secret) as root:
            (old,) = [k.id for k in await root.keys() if k.id != key.id]
            await root.revoke_key(old)
            with pytest.raises(ConflictError, match="last admin"):
                await root.revoke_key(key.id)
        async with AsyncClient(url, house.secrets["acme"]) as own:
            made, _ = await own.create_key(["infer"])
            assert made.tenant == "acme"

    asyncio.run(the_rest())
    with httpx.Client(base_url=url) as web:
        assert web.get("/v1/key", headers=house.headers("admin")).status_code == 401
