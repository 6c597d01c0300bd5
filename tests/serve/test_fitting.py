"""Adaptation at request time, over HTTP: shots in, a delta out, under an alias or in a session."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time

import httpx
import orjson
import pytest
import torch
from torch import nn

from tessera import peft, random
from tessera.arch import base_hash
from tessera.errors import (
    BusyError,
    ConflictError,
    DeltaError,
    InputError,
    NonFiniteError,
    UnknownNameError,
)
from tessera.serve.async_client import AsyncClient
from tessera.serve.blobs import Blobs
from tessera.serve.client import Client
from tessera.serve.fitting import Fitter, FitterSettings, Order
from tessera.serve.fitting_values import FitSettings
from tessera.serve.past import replay
from tessera.serve.registry import Registry
from tessera.serve.service import Service, ServiceSettings

HOW = FitSettings(r=2, sites=["0"], head="2", steps=40, lr=0.05)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def shots(n=12, seed=0):
    """Three classes that the net does not know."""
    draw = random.generator(seed, "tests.fitting")
    y = torch.arange(n) % 3
    return {"input": 2 * torch.eye(6)[y] + 0.3 * torch.randn(n, 6, generator=draw)}, y


@contextlib.contextmanager
def serving(folder, model=None, **settings):
    where = ServiceSettings(
        db=f"sqlite:///{folder}/registry.db", blobs=str(folder / "blobs"), **settings
    )
    with Service(model or net(), where) as service:
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
    return secret


@pytest.fixture
def house(tmp_path):
    """A service, its URL, and the clients of two tenants."""
    with serving(tmp_path) as (service, url), contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(Client(url, tenant_of(url, service.admin_key, name)))
            for name in ("acme", "globex")
        ]
        yield service, url, *clients


def accuracy(client, model, x, y):
    return (client.infer(model, x)["output"].argmax(1) == y).float().mean().item()


def events(service, *kinds):
    return list(service.registry.audit.read(kinds=list(kinds)))


def untouched(service):
    """Nothing is held, and nothing is running."""
    assert service.registry.deltas("acme") == []
    assert service.registry.sessions.all("acme") == []
    assert not events(service, "delta.fit", "delta.put", "session.start")


def test_from_shots_to_an_alias_in_one_call(house):
    service, _, acme, globex = house
    x, y = shots()
    acme.set_alias("clf", "", generation=0)
    before = accuracy(acme, "clf", x, y)
    found = acme.fit(x, y, HOW, alias="clf", generation=1, reason="twelve shots")
    assert found.alias == {"name": "clf", "generation": 2}
    assert (found.kind, found.rows, found.session) == ("lora", 12, None)
    assert 1 <= found.steps <= 40
    assert found.stopped_by in ("steps", "loss")
    assert found.last_loss < found.first_loss / 2
    assert found.spent.ms > 0
    assert found.spent.joules >= 0
    assert found.spent.joules_source in ("nvml", "rapl", "estimate")
    assert accuracy(acme, "clf", x, y) == 1.0 > before
    assert accuracy(acme, "clf", *shots(60, seed=1)) > 0.9
    assert [d.hash for d in acme.deltas()] == [found.hash]
    assert acme.history("clf")[-1].reason == "twelve shots"
    assert globex.deltas() == []
    (told,) = events(service, "delta.fit")
    assert told.tenant == "acme"
    assert told.body["delta"] == found.hash
    assert told.body["rows"] == 12
    assert told.body["last_loss"] == found.last_loss
    assert len(told.body["shots"]) == 64
    assert service.registry.audit.verify() > 0


def test_it_is_the_same_delta_as_fitted_at_home(house):
    _, _, acme, _ = house
    model, (x, y) = net(), shots()
    found = acme.fit(x, y, FitSettings(r=2, alpha=4, sites=["0"], steps=7, lr=0.02, seed=3))
    own = peft.lora(model, 2, 4, sites=["0"], seed=3)
    peft.fit(own, (x["input"], y), steps=7, lr=0.02, seed=3)
    assert found.hash == own.hash
    assert (found.steps, found.stopped_by) == (7, "steps")


@pytest.mark.parametrize(
    "how",
    [
        FitSettings(kind="ia3", sites="0", head=("2",), steps=5),
        FitSettings(kind="mask", sites=["*.bias"], steps=5),
        FitSettings(steps=5),
    ],
    ids=["ia3", "mask", "as it comes"],
)
def test_other_kinds(house, how):
    _, _, acme, _ = house
    found = acme.fit(*shots(), how)
    assert found.kind == (how.kind or "lora")
    assert found.last_loss < found.first_loss


def test_going_on_from_a_delta(house):
    _, _, acme, globex = house
    x, y = shots()
    first = acme.fit(x, y, FitSettings(r=2, steps=3, lr=0.02))
    on = acme.fit(x, y, FitSettings(parent=first.hash, steps=3, lr=0.02))
    assert on.first_loss < first.last_loss
    assert {d.hash: d.parent for d in acme.deltas()} == {first.hash: "", on.hash: first.hash}
    with pytest.raises(UnknownNameError, match="globex has no delta"):
        globex.fit(x, y, FitSettings(parent=first.hash))
    with pytest.raises(InputError, match=r"parent: .*has its own 'r'"):
        acme.fit(x, y, FitSettings(parent=first.hash, r=4))


def test_a_session_is_its_tenants_and_ends(house):
    service, url, acme, globex = house
    x, y = shots()
    made = acme.session(ttl_s=1.5, inputs=x, labels=y, how=HOW)
    begun = time.monotonic()
    assert accuracy(acme, made.name, x, y) == 1.0
    assert acme.deltas() == []
    assert acme.sessions()[0].id == made.id
    assert globex.sessions() == []
    with pytest.raises(UnknownNameError, match="there is no model 'session:"):
        globex.infer(made.name, x)
    with pytest.raises(UnknownNameError, match="globex has no session"):
        globex.end_session(made.id)
    with pytest.raises(UnknownNameError, match="globex has no session"):
        globex.keep_session(made.id)
    headers = {"Authorization": f"Bearer {service.admin_key}", "X-Tessera-Tenant": "acme"}
    body = {"inputs": [{"name": "input", "shape": [1, 6], "datatype": "FP32", "data": [[0] * 6]}]}
    asked = f"{url}/v2/models/{made.name}/versions/%s/infer"
    assert httpx.post(asked % 1, json=body, headers=headers).json()["model_version"] == "1"
    assert httpx.post(asked % 2, json=body, headers=headers).status_code == 404
    time.sleep(max(0.0, begun + 1.6 - time.monotonic()))
    with pytest.raises(UnknownNameError, match="or its session has ended"):
        acme.infer(made.name, x)
    assert acme.sessions() == []
    until = time.monotonic() + 10
    # The memory is freed right after the end is in the log.
    while not events(service, "session.end") or service.engine.has(made.delta):
        assert time.monotonic() < until
        time.sleep(0.05)
    (begin,) = events(service, "session.start")
    (end,) = events(service, "session.end")
    (fit,) = events(service, "delta.fit")
    assert {e.body["session"] for e in (begin, end, fit)} == {made.id}
    assert end.body["why"] == "expired"
    # Its slot goes with the next batch, and what others get stays what it was.
    acme.set_alias("base", "", generation=0)
    y = acme.infer("base", x)["output"]
    assert torch.allclose(y, net()(x["input"]), atol=1e-5)
    assert made.delta not in service.engine._bank.resident()


def test_a_session_over_a_held_delta_and_one_that_is_kept(house):
    _, url, acme, globex = house
    x, y = shots()
    held = acme.fit(x, y, HOW)
    over = acme.session(held.hash, ttl_s=60)
    assert accuracy(acme, over.name, x, y) == 1.0
    about = acme.metadata(over.name)
    assert (about["name"], about["versions"]) == (over.name, ["1"])
    assert about["inputs"] == acme.metadata(over.name)["inputs"]
    models, me = f"{url}/v2/models", acme._http.headers
    for path in (f"{over.name}/ready", f"{over.name}/versions/1/ready", f"{over.name}/config"):
        answer = httpx.get(f"{models}/{path}", headers=me)
        assert (answer.status_code, answer.json()["name"]) == (200, over.name)
    for path, said in (
        (f"{over.name}/versions/2", "served at version 1 only"),
        (f"{over.name}/stats", "those of all are 'session:' in /v2/models/stats"),
        (f"{over.name}x/ready", "there is no model"),
    ):
        answer = httpx.get(f"{models}/{path}", headers=me)
        assert (answer.status_code, said in answer.json()["error"]) == (404, True)
    (stats,) = httpx.get(f"{models}/stats", headers=me).json()["model_stats"]
    assert (stats["name"], stats["execution_count"]) == ("session:", 1)
    with pytest.raises(UnknownNameError, match="there is no model"):
        globex.metadata(over.name)
    assert httpx.get(f"{models}/stats", headers=globex._http.headers).json() == {"model_stats": []}
    with pytest.raises(UnknownNameError, match="globex has no delta"):
        globex.session(held.hash, ttl_s=60)
    brief = acme.fit(x, y, FitSettings(r=1, steps=2), session_s=60)
    assert brief.session["name"].startswith("session:")
    assert brief.hash not in {d.hash for d in acme.deltas()}
    id = brief.session["name"].removeprefix("session:")
    assert acme.keep_session(id).hash == brief.hash
    acme.end_session(id)
    with pytest.raises(UnknownNameError, match="acme has no session"):
        acme.end_session(id)
    acme.set_alias("kept", brief.hash, generation=0)
    acme.infer("kept", x)
    acme.end_session(over.id)
    acme.set_alias("held", held.hash, generation=0)
    assert accuracy(acme, "held", x, y) == 1.0


def test_answers_of_a_session_can_be_computed_again_when_it_is_over(tmp_path):
    with serving(tmp_path) as (service, url):
        x, y = shots()
        with Client(url, tenant_of(url, service.admin_key, "acme")) as acme:
            made = acme.session(ttl_s=60, inputs=x, labels=y, how=HOW)
            acme.infer(made.name, x)
            acme.end_session(made.id)
    blobs = Blobs(str(tmp_path / "blobs"))
    registry = Registry(f"sqlite:///{tmp_path}/registry.db", blobs, base_hash=base_hash(net()))
    again = list(replay(net(), registry.audit, blobs, registry.load))
    assert [(r.what, r.verdict, r.detail) for r in again] == [
        ("fits", "identical", ""),
        ("requests", "identical", ""),
    ]
    registry.close()


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_fitting import FitSettings, HOW, Client, serving, shots, tenant_of
with serving(Path({folder!r})) as (service, url):
    secret = tenant_of(url, service.admin_key, "acme")
    x, y = shots()
    with Client(url, secret) as acme:
        long = acme.session(ttl_s=600, inputs=x, labels=y, how=HOW)
        short = acme.session(ttl_s=1, inputs=x, labels=y, how=FitSettings(steps=2))
    print(secret, long.id, short.id, flush=True)
    sys.stdin.read()
"""


def test_sessions_outlive_a_killed_server_and_end_on_time(tmp_path):
    code = CHILD.format(here=os.path.dirname(__file__), folder=str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        secret, long, short = child.stdout.readline().split()
    finally:
        child.kill()
        child.communicate()
    time.sleep(1.0)  # the short one ends while no server runs
    x, y = shots()
    with serving(tmp_path) as (service, url), Client(url, secret) as acme:
        assert accuracy(acme, f"session:{long}", x, y) == 1.0
        with pytest.raises(UnknownNameError, match="or its session has ended"):
            acme.infer(f"session:{short}", x)
        assert [s.id for s in acme.sessions()] == [long]
        until = time.monotonic() + 10
        while not events(service, "session.end"):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert [e.body["session"] for e in events(service, "session.end")] == [short]


def test_plain_json(house):
    service, url, acme, _ = house
    x, y = shots()
    body = {
        "inputs": [
            {
                "name": "input",
                "shape": list(x["input"].shape),
                "datatype": "FP32",
                "data": x["input"].tolist(),
            }
        ],
        "labels": y.tolist(),
        "r": 2,
        "sites": ["0"],
        "head": "2",
        "steps": 40,
        "lr": 0.05,
    }
    headers = {"Authorization": f"Bearer {service.admin_key}"}
    answer = httpx.post(f"{url}/v1/tenants/acme/deltas:fit", json=body, headers=headers)
    assert answer.status_code == 201
    assert answer.json()["hash"] == acme.fit(x, y, HOW).hash  # the binary form: the same
    answer = httpx.post(f"{url}/v1/tenants/nobody/deltas:fit", json=body, headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (404, "UnknownNameError")
    assert httpx.post(f"{url}/v1/tenants/acme/deltas:fit", json=body).status_code == 401
    with Client(url, service.admin_key, tenant="acme") as root:
        _, reader = root.create_key(["infer"])
    headers = {"Authorization": f"Bearer {reader}"}
    answer = httpx.post(f"{url}/v1/tenants/acme/deltas:fit", json=body, headers=headers)
    assert answer.status_code == 403
    described = httpx.get(f"{url}/v1/openapi.json").json()["paths"]
    assert "/v1/tenants/{tenant}/deltas:fit" in described
    assert set(described["/v1/tenants/{tenant}/sessions"]) == {"get", "post"}


def test_the_asynchronous_client_asks_the_same(house):
    _, url, acme, _ = house
    x, y = shots()
    key = acme._http.headers["Authorization"].removeprefix("Bearer ")

    async def ask():
        async with AsyncClient(url, key) as client:
            found = await client.fit(x, y, HOW, alias="clf")
            made = await client.session(found.hash, ttl_s=60)
            out = await client.infer(made.name, x)
            assert [s.id for s in await client.sessions()] == [made.id]
            assert (await client.keep_session(made.id)).hash == found.hash
            await client.end_session(made.id)
            return found, out["output"]

    found, out = asyncio.run(ask())
    assert found.alias == {"name": "clf", "generation": 1}
    assert (out.argmax(1) == y).all()


def test_a_budget_ends_it(house):
    _, _, acme, _ = house
    x, y = shots()
    found = acme.fit(x, y, FitSettings(r=2, steps=500, lr=0.01, budget={"steps": 4}))
    assert (found.steps, found.stopped_by) == (4, "steps")
    found = acme.fit(x, y, FitSettings(r=2, steps=1000, lr=1e-7, budget={"joules": 1e9}))
    assert (found.stopped_by, found.steps < 100) == ("loss", True)
    with pytest.raises(InputError, match=r"budget: .* no step was left to take"):
        acme.fit(x, y, FitSettings(r=2, budget={"ms": 1e-6}))


BAD = {
    "no shots": ({"inputs": []}, "inputs: there are no shots"),
    "shots of no rows": (
        {"inputs": [{"name": "input", "shape": [0, 6], "datatype": "FP32", "data": []}],
         "labels": []},
        r"inputs: 'input' \(0, 6\) holds no shots",
    ),
    "a label of no class": ({"labels": [0, 3]}, r"labels: .*outside 0 .. 2"),
    "a negative label": ({"labels": [0, -1]}, r"labels: .*outside 0 .. 2"),
    "too few labels": ({"labels": [0]}, r"labels: there are \(1,\) for 2 shots"),
    "no labels": ({"labels": None}, "labels: "),
    "labels of text": ({"labels": ["cat", "dog"]}, "labels"),
    "a label in halves": (
        {"labels": {"shape": [2], "datatype": "FP32", "data": [0, 1]}}, "labels must be whole"
    ),
    "of another width": (
        {"inputs": [{"name": "input", "shape": [2, 5], "datatype": "FP32", "data": [0] * 10}]},
        "inputs: the model could not run",
    ),
    "of another name": (
        {"inputs": [{"name": "x", "shape": [2, 6], "datatype": "FP32", "data": [0] * 12}]},
        "inputs: the model could not run",
    ),
    "unknown sites": ({"sites": ["nowhere"]}, "sites: .*nowhere"),
    "a site that can be none": ({"sites": ["1"]}, "sites: "),
    "an unknown head": ({"head": "nowhere"}, "head: .*nowhere"),
    "a rank too high": ({"r": 9, "sites": ["0"]}, "r, sites: .*rank 9"),
    "a rank of text": ({"r": "9"}, "r must be a whole number"),
    "an unknown kind": ({"kind": "dora"}, "kind is one of lora, ia3, mask, prefix, prompt"),
    "what the kind lacks": ({"kind": "ia3", "r": 2}, "an? ia3 has no 'r'"),
    "a mask of nothing": ({"kind": "mask"}, "a mask needs sites"),
    "no tokens": ({"kind": "prompt"}, "a prompt needs tokens"),
    "no attention": ({"kind": "prefix", "tokens": 2}, "kind, tokens: .*prefix"),
    "no steps": ({"steps": 0}, "steps is 1 to 1000"),
    "too many steps": ({"steps": 10**6}, "steps is 1 to 1000"),
    "a rate of nothing": ({"lr": 0}, "lr is a finite number > 0"),
    "an unknown cap": ({"budget": {"watts": 3}}, "budget has a field 'watts'"),
    "a cap below 0": ({"budget": {"ms": -3}}, "budget.ms is a number > 0"),
    "a misspelt field": ({"step": 3}, "the request has a field 'step'"),
    "no hash": ({"parent": "abc"}, "content hash"),
    "no alias": ({"alias": "../x"}, "an alias's name"),
    "a generation of nothing": ({"generation": 3}, "generation and reason belong to an alias"),
    "two ways": ({"alias": "a", "session_s": 60}, "alias and session_s exclude"),
    "too short a session": ({"session_s": 0}, "1 to 86400 seconds"),
}  # fmt: skip


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A service with one tenant that nothing here changes; a function that posts to it."""
    with serving(tmp_path_factory.mktemp("standing")) as (service, url):
        headers = {"Authorization": f"Bearer {tenant_of(url, service.admin_key, 'acme')}"}
        with httpx.Client(base_url=url, headers=headers) as web:
            yield service, web


def good():
    return {
        "inputs": [{"name": "input", "shape": [2, 6], "datatype": "FP32", "data": [0.5] * 12}],
        "labels": [0, 1],
        "steps": 2,
    }


@pytest.mark.parametrize("case", BAD, ids=BAD)
def test_what_cannot_be_fitted_is_named_and_leaves_nothing(standing, case):
    service, web = standing
    wrong, message = BAD[case]
    answer = web.post("/v1/tenants/acme/deltas:fit", json=good() | wrong)
    assert answer.status_code == 400, answer.text
    with pytest.raises(InputError, match=message):
        raise InputError(answer.json()["error"])
    untouched(service)


def test_numbers_that_are_none(house):
    service, _, acme, _ = house
    x, y = shots()
    for value in (float("nan"), float("inf")):
        bad = {"input": x["input"].clone()}
        bad["input"][3, 2] = value
        with pytest.raises(InputError, match="inputs: 'input' holds NaN or infinity"):
            acme.fit(bad, y)
    with pytest.raises(NonFiniteError):
        acme.fit(x, y, FitSettings(r=1, lr=1e20))
    untouched(service)


def test_too_much_is_refused(tmp_path):
    few = FitterSettings(rows=4)
    with (
        serving(tmp_path, fits=few) as (service, url),
        Client(url, tenant_of(url, service.admin_key, "acme")) as acme,
    ):
        with pytest.raises(InputError, match="inputs: 'input' holds 5 shots, at most 4"):
            acme.fit(*shots(5))
        with pytest.raises(InputError, match="the body may have at most 16777216 bytes"):
            acme.fit({"input": torch.zeros(1 << 20, 6)}, torch.zeros(1 << 20).long())
        untouched(service)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"ttl_s": 60}, "a session needs a delta's hash, or inputs"),
        (good() | {"ttl_s": 60, "delta": "0" * 64}, "one of them"),
        ({"delta": "0" * 64}, "ttl_s, how long"),
        ({"delta": 7, "ttl_s": 60}, "delta must be a hash"),
        (good() | {"ttl_s": 60, "alias": "a"}, "the request has a field 'alias'"),
        ([], "the body is a list"),
    ],
)
def test_a_session_that_is_asked_for_wrongly(standing, body, message):
    service, web = standing
    answer = web.post("/v1/tenants/acme/sessions", json=body)
    assert (answer.status_code, answer.json()["type"]) == (400, "InputError")
    assert message in answer.json()["error"]
    untouched(service)


def test_bodies_that_are_none(standing):
    service, web = standing
    whole = orjson.dumps(good())
    for body, length in [
        (b"", None), (b"{", None), (whole, "x"), (whole, "0"), (whole, str(len(whole) + 1)),
        (whole + b"1234", str(len(whole))),
    ]:  # fmt: skip
        headers = {} if length is None else {"Inference-Header-Content-Length": length}
        answer = web.post("/v1/tenants/acme/deltas:fit", content=body, headers=headers)
        assert answer.status_code == 400, answer.text
    untouched(service)


def test_an_alias_that_moved_is_left(house):
    service, _, acme, _ = house
    x, y = shots()
    acme.set_alias("clf", "", generation=0)
    with pytest.raises(ConflictError, match="is at generation 1, and 0 was expected; nothing was"):
        acme.fit(x, y, alias="clf")
    untouched(service)
    # It moves while the fit runs: the delta is there, and the message says which.
    real = service.registry.put_delta

    def slow(*args, **named):
        record = real(*args, **named)
        acme.set_alias("clf", "", generation=1)
        return record

    service.registry.put_delta = slow
    with pytest.raises(ConflictError, match="The delta is kept, as ") as caught:
        acme.fit(x, y, FitSettings(steps=2), alias="clf", generation=1)
    (held,) = acme.deltas()
    assert held.hash in str(caught.value)
    assert acme.history("clf")[-1].generation == 2


def order(tenant="acme", how=None):
    x, y = shots()
    return Order(tenant=tenant, inputs=x, labels=y, settings=how or HOW)


def test_one_fit_a_tenant_and_a_short_queue():
    fitter = Fitter(net(), None, FitterSettings(workers=1, waiting=1))
    with fitter.place("acme"):
        with pytest.raises(BusyError, match="a fit of acme's is under way"), fitter.place("acme"):
            pass
        with (
            fitter.place("globex"),
            pytest.raises(BusyError, match="2 fits are under way"),
            fitter.place("hooli"),
        ):
            pass
        with fitter.place("hooli"):
            assert fitter.submit(order("hooli")).result().steps > 0
    with fitter.place("acme"):
        pass
    fitter.close()
    with pytest.raises(BusyError, match="shutting down"), fitter.place("acme"):
        pass
    with pytest.raises(BusyError, match="shutting down"):
        fitter.submit(order())


def test_a_fit_that_waited_too_long_is_refused():
    fitter = Fitter(net(), None, FitterSettings(wait_s=-1.0))
    with pytest.raises(BusyError, match="waited too long"):
        fitter.submit(order()).result()
    fitter.close()


def test_over_http_it_is_429(house, monkeypatch):
    service, _, acme, globex = house
    x, y = shots()
    begun, go_on = threading.Event(), threading.Event()
    real = service.fitter._run

    def held(*args):
        begun.set()
        assert go_on.wait(30)
        return real(*args)

    monkeypatch.setattr(service.fitter, "_run", held)
    found = []
    first = threading.Thread(target=lambda: found.append(acme.fit(x, y, HOW)))
    first.start()
    assert begun.wait(30)
    with pytest.raises(BusyError, match="a fit of acme's is under way") as caught:
        acme.fit(x, y)
    assert caught.value.retry_after_s >= 1
    acme.set_alias("plain", "", generation=0)  # nothing else waits for it
    assert acme.infer("plain", x)["output"].shape == (12, 3)
    other = threading.Thread(target=lambda: found.append(globex.fit(x, y, HOW)))
    other.start()
    go_on.set()
    first.join(30)
    other.join(30)
    assert len(found) == 2
    assert found[0].hash == found[1].hash


def test_the_base_and_torchs_threads_stay_as_they_were():
    model = net()
    before, threads = base_hash(model), torch.get_num_threads()
    modes = [m.training for m in model.modules()]
    fitter = Fitter(model, None, FitterSettings(workers=2, threads=2))
    seen = []
    fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    inside = fitter._pool.submit(torch.get_num_threads).result()
    assert (inside, seen, torch.get_num_threads()) == (2, [threads], threads)
    with torch.inference_mode():
        jobs = [fitter.submit(order(str(n))) for n in range(4)]
        hashes = {job.result().delta.hash for job in jobs}
    assert len(hashes) == 1
    assert base_hash(model) == before
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    fitter.close()


def test_a_delta_of_another_base_is_none_to_go_on_from():
    torch.manual_seed(1)
    other = peft.lora(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), 2).snapshot()

    class Shelf:
        def load(self, hash, *, tenant=None):
            return other

    fitter = Fitter(net(), Shelf())
    with pytest.raises(DeltaError, match="base"):
        fitter.submit(order(how=FitSettings(parent=other.hash))).result()
    fitter.close()
