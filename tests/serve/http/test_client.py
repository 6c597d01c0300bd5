"""Our clients against a real server."""

from __future__ import annotations

import asyncio
import inspect
import re

import httpx
import pytest
import torch

from tessera import arch
from tessera.errors import (
    AccessError,
    BusyError,
    ConflictError,
    DeltaError,
    InputError,
    MissingDataError,
    TesseraError,
    UnknownNameError,
)
from tessera.serve.async_client import AsyncClient
from tessera.serve.client import Client


@pytest.fixture
def open_client(house, start):
    url = f"http://{start(house.app())}"
    clients = []

    def make(who: str, tenant: str | None = None) -> Client:
        clients.append(Client(url, house.secrets[who], tenant=tenant))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_the_way_from_a_tenant_to_an_answer(open_client, house):
    with open_client("admin", tenant="new") as admin:
        assert admin.create_tenant("new").name == "new"
        assert [t.name for t in admin.tenants()] == ["acme", "globex", "new"]
        key, secret = admin.create_key(["infer", "manage"])
        assert (key.tenant, key.scopes) == ("new", {"infer", "manage"})
        house.secrets["new"] = secret
        with open_client("new") as new:
            first = new.upload(house.times(2))
            assert new.upload(house.times(2)).hash == first.hash == house.times(2).hash
            second = new.upload(house.times(4), parent=first.hash)
            assert second.parent == first.hash
            assert {d.hash for d in new.deltas()} == {first.hash, second.hash}
            new.set_alias("m", first.hash, generation=0)
            alias = new.set_alias("m", second.hash, generation=1, reason="better")
            assert (alias.generation, alias.reason) == (2, "better")
            x = torch.arange(6.0).view(2, 3)
            assert torch.equal(new.infer("m", {"x": x})["x_times"], 4 * x)
            assert new.rollback("m", generation=2).delta == first.hash
            assert torch.equal(new.infer("m", {"x": x})["x_times"], 2 * x)
            assert [a.generation for a in new.history("m")] == [1, 2, 3]
            assert [a.name for a in new.aliases()] == ["m"]
            assert new.metadata("m")["versions"] == ["3"]
        admin.revoke_key(key.id)
        assert admin.keys() == []
        with open_client("new") as late, pytest.raises(AccessError):
            late.infer("m", {"x": x})


def test_every_datatype_comes_back_bit_for_bit(open_client):
    inputs = {
        "half": torch.tensor([[1.5]], dtype=torch.float16),
        "brain": torch.tensor([[1.5]], dtype=torch.bfloat16),
        "long": torch.tensor([[2**40]]),
        "odd": torch.tensor([[True]]),
        "nan": torch.tensor([[torch.nan]]),
    }
    got = open_client("acme").infer("m", inputs, outputs=["brain_times", "nan_times"])
    assert list(got) == ["brain_times", "nan_times"]
    assert got["brain_times"].dtype == torch.bfloat16
    assert got["brain_times"].item() == 3
    assert got["nan_times"].isnan().all()
    assert open_client("acme").infer("m", inputs)["long_times"].item() == 2**41


def test_errors_are_of_the_class_that_the_server_raised(open_client, house):
    acme, x = open_client("acme"), {"x": torch.ones(1, 2)}
    for kind, do in (
        (AccessError, lambda: open_client("reader").deltas()),
        (UnknownNameError, lambda: acme.infer("other", x)),
        (UnknownNameError, lambda: open_client("acme", tenant="globex").infer("m", x)),
        (UnknownNameError, lambda: open_client("acme", tenant="globex").deltas()),
        (ConflictError, lambda: acme.set_alias("m", "", generation=7)),
        (InputError, lambda: acme.infer("m", {})),
        (InputError, lambda: acme.infer("m", x, outputs=["z"])),
        (InputError, lambda: open_client("admin").deltas()),
        (
            DeltaError,
            lambda: acme.upload(
                arch.Delta(kind="prompt", tensors={"prompt": torch.ones(1, 4)}, base_hash="1" * 64)
            ),
        ),
    ):
        with pytest.raises(TesseraError) as caught:
            do()
        assert type(caught.value) is kind
    for raised in (BusyError("full", retry_after_s=7), MissingDataError("the blob is gone")):

        def fail(raised: Exception = raised) -> None:
            raise raised

        house.engine.before = fail
        with pytest.raises(type(raised)) as caught:
            acme.infer("m", x)
        assert getattr(caught.value, "retry_after_s", 7) == 7


def test_names_are_escaped_not_followed(open_client):
    acme = open_client("acme")
    for odd in ("../../v1/tenants", "a/b", "m?x=1", "m#x", "%2e%2e", "é"):
        with pytest.raises((UnknownNameError, InputError)):
            acme.infer(odd, {"x": torch.ones(1, 2)})
        with pytest.raises((UnknownNameError, InputError)):
            acme.history(odd)


def test_the_id_and_the_time_a_request_has_reach_the_server(open_client, house):
    open_client("acme").infer("m", {"x": torch.ones(1)}, request_id="r-7", timeout_s=0.5)
    assert house.engine.asked == [0.5]


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (httpx.Response(502, text="<html>"), TesseraError, "HTTP 502 from http://x/v2/models/m"),
        (httpx.Response(404, text="nginx"), UnknownNameError, "HTTP 404"),
        (httpx.Response(400, json={"error": "e", "type": "SystemExit"}), InputError, "e"),
        (httpx.Response(400, json={"error": "e", "type": "unknown_name"}), InputError, "e"),
        (httpx.Response(400, json=["error"]), InputError, "HTTP 400"),
        (httpx.Response(429, json={"error": "e"}, headers={"Retry-After": "Mon"}), BusyError, "e"),
    ],
)
def test_what_a_proxy_says_is_an_error_of_ours_too(answer, kind, message):
    transport = httpx.MockTransport(lambda request: answer)
    with Client("http://x", "k", transport=transport) as client:
        with pytest.raises(kind, match=re.escape(message)) as caught:
            client.metadata("m")
        assert type(caught.value) is kind
        assert not client.ready()


def test_a_server_that_is_not_there(house):
    with Client("http://127.0.0.1:1", "k") as client:
        assert not client.ready()
        with pytest.raises(TesseraError, match=r"127\.0\.0\.1:1.* did not answer"):
            client.tenants()


def test_the_client_for_asyncio_asks_the_same(house):
    async def main() -> None:
        transport = httpx.ASGITransport(house.app())
        key = house.secrets["acme"]
        async with AsyncClient("http://x", key, transport=transport) as acme:
            assert await acme.ready()
            record = await acme.upload(house.times(5))
            await acme.set_alias("m", record.hash, generation=1)
            x = torch.ones(2, 2)
            answers = await asyncio.gather(*[acme.infer("m", {"x": k * x}) for k in range(8)])
            assert [a["x_times"][0, 0].item() for a in answers] == [5.0 * k for k in range(8)]
            assert (await acme.rollback("m")).generation == 3
            assert len(await acme.history("m")) == 3
            assert [a.name for a in await acme.aliases()] == ["m"]
            assert len(await acme.deltas()) == 2
            assert [t.name for t in await acme.tenants()] == ["acme"]
            made, _ = await acme.create_key(["infer"])
            await acme.revoke_key(made.id)
            assert made.id not in {k.id for k in await acme.keys()}
            assert (await acme.metadata("m"))["name"] == "m"
            with pytest.raises(AccessError):
                await acme.create_tenant("new")

    asyncio.run(main())


def test_both_clients_have_the_same_methods():
    def signatures(kind: type) -> dict[str, tuple[str, ...]]:
        return {
            name: tuple(map(str, inspect.signature(f).parameters.values()))
            for name, f in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert signatures(Client) == signatures(AsyncClient)
