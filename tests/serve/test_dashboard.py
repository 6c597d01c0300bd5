"""The dashboard: who gets in, what its buttons do, and what its pages say."""

from __future__ import annotations

import html
import itertools
import math
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from tessera import random
from tessera.arch import Delta
from tessera.errors import BusyError, CheckpointError
from tessera.serve.app import App, make_app
from tessera.serve.audit import GENESIS
from tessera.serve.blobs import Blobs
from tessera.serve.dashboard import add_dashboard
from tessera.serve.dashboard_log import Chain
from tessera.serve.dashboard_session import Sessions
from tessera.serve.dashboard_traffic import Traffic, quantile
from tessera.serve.meters import Meters
from tessera.serve.records import Key
from tessera.serve.registry import Registry

ADMIN = "an-admin-key-for-the-tests-only"
BASE = "0" * 64
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7*7 }}"
PAGES = ("/", "/tenants/acme", "/tenants/acme/aliases/clf", "/events")


@dataclass
class Engine:
    """An engine that only waits."""

    rows: int = 0

    def waiting(self) -> int:
        return self.rows


@dataclass
class Full(Engine):
    """One that says more of itself."""

    slots: int = 64
    slots_used: int = 5
    queue_rows: int = 1024


def prompt(k: float) -> Delta:
    return Delta(kind="prompt", tensors={"prompt": torch.full((1, 4), k)}, base_hash=BASE)


@dataclass
class House:
    """acme with three deltas and the alias clf at generation 2; globex with nothing but a key."""

    registry: Registry
    db: Path
    by: Key
    deltas: list[str]
    keys: dict[str, tuple[Key, str]]
    engine: Engine = field(default_factory=Engine)

    def app(self, **options) -> App:
        app = make_app(self.registry, self.engine)
        self.dashboard = add_dashboard(app, self.registry, self.engine, **options)
        return app

    def client(self, **options) -> TestClient:
        return TestClient(self.app(**options), follow_redirects=False)

    def inside(self, **options) -> TestClient:
        client = self.client(**options)
        assert sign_in(client, ADMIN).status_code == 303
        return client

    def generation(self) -> int:
        return self.registry.alias("acme", "clf").generation


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    db = tmp_path / "r.db"
    registry = Registry(f"sqlite:///{db}", Blobs(tmp_path / "blobs"), base_hash=BASE)
    registry.first_admin_key(ADMIN)
    by = registry.authenticate(ADMIN)
    keys = {}
    for name in ("acme", "globex"):
        registry.create_tenant(name, by=by)
        keys[name] = registry.create_key(name, {"infer", "manage"}, by=by)
    deltas = [registry.put_delta("acme", prompt(k), by=by).hash for k in (1.0, 2.0, 3.0)]
    registry.set_alias("acme", "clf", deltas[0], generation=0, by=by)
    registry.set_alias("acme", "clf", deltas[1], generation=1, by=by, reason="better")
    yield House(registry, db, by, deltas, keys)
    registry.close()


def token_of(page) -> str:
    found = re.search(r'name="token" value="([0-9a-f]{64})"', page.text)
    assert found, page.text
    return found[1]


def sign_in(client: TestClient, key: str, onward: str = "/"):
    page = client.get("/sign-in")
    return client.post("/sign-in", data={"token": token_of(page), "key": key, "next": onward})


def press(client: TestClient, path: str, **fields: str):
    """Send a form of a page, with the token that page has."""
    return client.post(path, data={"token": token_of(client.get(path)), **fields})


def said(page) -> str:
    """The words of a page."""
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.text))
    return html.unescape(re.sub(r" (?=[.,:;])", "", words))


# --- who gets in -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_without_a_session_there_is_nothing_to_see_or_to_do(house, path):
    client = house.client()
    seen = client.get(path)
    assert seen.status_code == 303
    assert seen.headers["location"].startswith("/sign-in")
    assert "acme" not in seen.text
    assert client.get(path, headers={"X-Live": "1"}).status_code == 401
    if path != "/":
        sent = client.post(path, data={"do": "rollback", "generation": "2"})
        assert sent.headers["location"].startswith("/sign-in")
        assert house.generation() == 2


def test_an_api_key_in_a_header_is_no_session(house):
    seen = house.client().get("/", headers={"Authorization": f"Bearer {ADMIN}"})
    assert seen.status_code == 303


@pytest.mark.parametrize("who", ["nobody", "nothing", "a tenant", "long"])
def test_only_an_admins_key_opens(house, who):
    keys = {"nobody": "tsr_wrong", "nothing": "", "long": "k" * 5000}
    client = house.client()
    answer = sign_in(client, keys.get(who, house.keys["acme"][1]))
    assert answer.status_code == 403
    assert "tessera_session" not in answer.headers.get("set-cookie", "")
    assert "That is not an admin's key in force." in said(answer)
    assert client.get("/").status_code == 303


def test_the_session_cookie_is_for_this_site_and_not_for_scripts(house):
    client = house.client()
    cookie = sign_in(client, ADMIN).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "max-age=3600" in cookie
    assert "path=/" in cookie
    assert "secure" not in cookie
    assert ADMIN not in cookie
    assert client.get("/").status_code == 200
    safe = TestClient(house.app(), base_url="https://testserver", follow_redirects=False)
    assert "secure" in sign_in(safe, ADMIN).headers["set-cookie"].lower()


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("/tenants/acme?from=50", "/tenants/acme?from=50"),
        ("//elsewhere.example/", "/"),
        ("/\\elsewhere.example", "/"),
        ("https://elsewhere.example/", "/"),
        ("javascript:alert(1)", "/"),
        ("/a\r\nSet-Cookie: x=1", "/"),
    ],
)
def test_signing_in_leads_on_but_never_elsewhere(house, asked, given):
    answer = sign_in(house.client(), ADMIN, asked)
    assert answer.headers["location"] == given
    assert "x" not in answer.cookies


def test_the_sign_in_form_is_held_to_its_own_page(house):
    client = house.client()
    assert client.post("/sign-in", data={"key": ADMIN}).status_code == 403
    token = token_of(client.get("/sign-in"))
    other = house.client()
    other.get("/sign-in")
    assert other.post("/sign-in", data={"key": ADMIN, "token": token}).status_code == 403
    assert other.get("/").status_code == 303


def test_a_session_ends_by_time_by_signing_out_and_with_its_key(house):
    short = house.inside(session_s=-1.0)
    assert short.get("/").status_code == 303
    client = house.inside()
    cookie = client.cookies["tessera_session"]
    assert client.post("/sign-out", data={"token": "0" * 64}).status_code == 403
    assert client.get("/").status_code == 200
    out = client.post("/sign-out", data={"token": token_of(client.get("/"))})
    assert out.headers["location"] == "/sign-in"
    client.cookies.set("tessera_session", cookie)  # whoever copied it before
    assert client.get("/").status_code == 303
    second, secret = house.registry.create_key(None, {"admin"}, by=house.by)
    client = house.client()
    sign_in(client, secret)
    assert client.get("/").status_code == 200
    house.registry.revoke_key(second.id, by=house.by)
    assert client.get("/").status_code == 303


def test_a_forged_cookie_is_none():
    now = [0.0]
    sessions, others = Sessions(60.0, lambda: now[0]), Sessions(60.0)
    token = sessions.begin("k1")
    assert sessions.find(token).key == "k1"
    text, _, signature = token.partition(".")
    draw = random.generator(0, "tests.forged")
    for _ in range(200):
        at = int(torch.randint(len(token), (1,), generator=draw))
        changed = token[:at] + chr((ord(token[at]) + 1) % 128) + token[at + 1 :]
        assert sessions.find(changed) is None
    for forged in ("", ".", text, "." + signature, others.begin("k1"), "é." + signature):
        assert sessions.find(forged) is None
    # A form's token signs no session, and the other way round.
    assert sessions.find(f"{text}.{sessions.form_token(text)}") is None
    assert not sessions.check_form(text, signature)
    now[0] = 59.9
    assert sessions.find(token) is not None
    now[0] = 60.0
    assert sessions.find(token) is None


def test_a_form_of_another_site_or_session_does_nothing(house):
    client, other = house.inside(), house.inside()
    path, fields = "/tenants/acme/aliases/clf", {"do": "rollback", "generation": "2"}
    token = token_of(client.get(path))
    cross = {"Sec-Fetch-Site": "cross-site"}
    attempts = [
        client.post(path, data=fields),
        client.post(path, data={**fields, "token": "0" * 64}),
        client.post(path, data={**fields, "token": token_of(other.get(path))}),
        client.post(path, data={**fields, "token": token}, headers=cross),
        client.post(path, data={**fields, "token": token}, headers={"Sec-Fetch-Site": "same-site"}),
    ]
    assert [a.status_code for a in attempts] == [403] * 5
    assert house.generation() == 2
    assert client.post(path, data={**fields, "token": token}).status_code == 303
    assert house.generation() == 3


# --- what the buttons do ---------------------------------------------------------------------


def test_roll_back_goes_to_the_delta_before_and_says_so_once(house):
    client = house.inside()
    path = "/tenants/acme/aliases/clf"
    answer = press(client, path, do="rollback", generation="2")
    assert (answer.status_code, answer.headers["location"]) == (303, path)
    now = house.registry.alias("acme", "clf")
    assert (now.generation, now.delta) == (3, house.deltas[0])
    client.get("/", headers={"X-Live": "1"})  # a script's look does not use it up
    assert f"Rolled back. clf is at generation 3: delta {now.delta[:12]}." in said(client.get(path))
    assert "Rolled back." not in said(client.get(path))
    last = list(house.registry.audit.read())[-1]
    assert (last.kind, last.body["by"]) == ("alias.rolled_back", house.by.id)


def test_a_change_that_came_first_is_shown_and_kept(house):
    client = house.inside()
    path = "/tenants/acme/aliases/clf"
    token = token_of(client.get(path))
    house.registry.set_alias(
        "acme", "clf", house.deltas[2], generation=2, by=house.by, reason="somebody else's"
    )
    for fields in (
        {"do": "rollback"},
        {"do": "promote", "delta": house.deltas[0]},
    ):
        answer = client.post(path, data={"token": token, "generation": "2", **fields})
        assert answer.status_code == 409
        words = said(answer)
        assert "Nothing was changed." in words
        assert "is at generation 3" in words
        assert "somebody else's" in words
        assert '<dd id="generation">3</dd>' in answer.text
        # Whoever asks again is asked about what there is now.
        again = client.get("/tenants/acme/confirm?do=rollback&alias=clf")
        assert 'name="generation" value="3"' in again.text
    now = house.registry.alias("acme", "clf")
    assert (now.generation, now.delta) == (3, house.deltas[2])


def test_nothing_before_the_first_is_said(house):
    client = house.inside()
    house.registry.set_alias("acme", "new", house.deltas[0], generation=0, by=house.by)
    path = "/tenants/acme/aliases/new"
    assert "do=rollback" not in client.get(path).text
    answer = press(client, path, do="rollback", generation="1")
    assert answer.status_code == 409
    assert "there is nothing before" in said(answer)


def test_promote_from_the_aliases_page_and_from_the_deltas(house):
    client = house.inside()
    two, three = house.deltas[1:]
    path = "/tenants/acme/aliases/clf"
    press(client, path, do="promote", generation="2", delta=three, reason=" a reason ")
    now = house.registry.alias("acme", "clf")
    assert (now.generation, now.delta, now.reason) == (3, three, "a reason")
    press(client, path, do="promote", generation="3", delta="")
    assert house.registry.alias("acme", "clf").delta == ""
    page = f"/tenants/acme/deltas/{two}"
    assert press(client, page, do="promote", alias="4 clf", new="").status_code == 303
    assert house.registry.alias("acme", "clf").delta == two
    assert press(client, page, do="promote", alias="4 clf", new="").status_code == 409
    assert press(client, page, do="promote", alias="", new="beta").status_code == 303
    assert house.registry.alias("acme", "beta").generation == 1
    assert press(client, page, do="promote", alias="", new="clf").status_code == 409
    assert house.generation() == 5


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"do": "rollback"}, 400),
        ({"do": "rollback", "generation": "-1"}, 400),
        ({"do": "rollback", "generation": "²"}, 400),
        ({"do": "promote", "generation": "2"}, 400),
        ({"do": "promote", "generation": "2", "delta": "../../etc"}, 400),
        ({"do": "promote", "generation": "2", "delta": "ab" * 32}, 404),
        ({"do": "promote", "generation": "2", "delta": "", "reason": "r" * 501}, 400),
        ({"do": "drop", "generation": "2"}, 400),
        ({}, 400),
    ],
)
def test_a_form_that_asks_for_nonsense_is_told_so(house, fields, status):
    answer = press(house.inside(), "/tenants/acme/aliases/clf", **fields)
    assert answer.status_code == status
    assert "Nothing was changed." in said(answer)
    assert house.generation() == 2


def test_a_key_is_revoked_and_only_on_its_tenants_page(house):
    client, registry = house.inside(), house.registry
    (own, secret), (other, _) = house.keys["acme"], house.keys["globex"]
    for id in (other.id, house.by.id, "x", ""):
        answer = press(client, "/tenants/acme", do="revoke", key=id)
        assert answer.status_code == 404
    assert [k.id for k in registry.keys("globex")] == [other.id]
    assert registry.authenticate(ADMIN).id == house.by.id
    assert press(client, "/tenants/acme", do="revoke", key=own.id).status_code == 303
    assert registry.keys("acme") == []
    assert secret not in client.get("/tenants/acme").text
    assert "No key in force." in said(client.get("/tenants/acme"))


# --- what the pages say ----------------------------------------------------------------------


def test_the_pages_say_what_the_registry_holds(house):
    client = house.inside()
    overview, tenant = said(client.get("/")), said(client.get("/tenants/acme"))
    assert "2 tenants, 3 deltas, 1 alias" in overview
    assert "acme/clf generation 2" in overview
    house.registry.put_delta("globex", prompt(4.0), by=house.by)
    assert "2 tenants, 4 deltas, 1 alias" in said(client.get("/"))
    assert "1 alias, 3 deltas of 1,000 allowed, 1 key" in tenant
    for hash in house.deltas:
        assert hash[:12] in tenant
    assert house.keys["acme"][0].id in tenant
    alias = said(client.get("/tenants/acme/aliases/clf"))
    assert re.search(rf"2 {house.deltas[1][:12]} prompt .* better", alias)
    delta = said(client.get(f"/tenants/acme/deltas/{house.deltas[1]}"))
    assert house.deltas[1] in delta
    assert "In use as clf" in delta
    assert "promote" in said(client.get("/tenants/globex")).lower()


def test_what_is_not_there_is_404_as_a_page(house):
    client = house.inside()
    for path in (
        "/tenants/nobody",
        "/tenants/globex/aliases/clf",
        f"/tenants/globex/deltas/{house.deltas[0]}",
        "/static/none",
    ):
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.headers["content-type"].startswith("text/html")
    assert client.get(f"/tenants/{'x' * 64}").status_code == 400
    # The rest of the server still speaks JSON.
    for path in ("/v1/tenants", "/v1/nothing", "/nothing", "/static/..%2fdashboard.py"):
        assert "error" in client.get(path).json()
    assert all(p.startswith("/v1/") for p in client.get("/v1/openapi.json").json()["paths"])


def test_nothing_that_others_wrote_becomes_markup(house):
    registry, by = house.registry, house.by
    registry.set_alias("acme", "clf", house.deltas[2], generation=2, by=by, reason=HOSTILE)
    registry.audit.append("gate.refused", "acme", {"reason": HOSTILE, HOSTILE: [HOSTILE]})
    client = house.inside()
    quoted = {"tenant": HOSTILE, "kind": HOSTILE, "alias": HOSTILE}
    pages = [client.get(path) for path in PAGES]
    pages += [client.get("/events", params=quoted), client.get("/", params={"after": HOSTILE})]
    pages += [client.get("/", params={"part": HOSTILE[:63]})]
    asked = {"do": HOSTILE, "alias": HOSTILE, "new": HOSTILE, "delta": HOSTILE, "gate": HOSTILE}
    pages += [client.get("/tenants/acme/confirm", params=asked)]
    asked |= {"do": "promote", "alias": "clf", "new": "", "delta": house.deltas[0]}
    pages += [client.get("/tenants/acme/confirm", params=asked)]
    pages += [client.get("/sign-in", params={"next": f"/{HOSTILE}"})]
    stranger = house.client()
    pages.append(stranger.get("/sign-in", params={"next": f"/{HOSTILE}"}))
    pages.append(press(client, "/tenants/acme/aliases/clf", do="rollback", generation="1"))
    for page in pages:
        assert "<script>" not in page.text
        assert "<img src=x" not in page.text
    shown = [page for page in pages if "&lt;script&gt;alert(" in page.text]
    assert all("{{ 7*7 }}" in page.text for page in shown)
    assert len(shown) >= 7


@pytest.mark.parametrize("path", [*PAGES, "/sign-in", "/static/dashboard.css", "/tenants/none"])
def test_every_answer_has_a_strict_policy_and_keeps_to_it(house, path):
    client = house.client() if path == "/sign-in" else house.inside()
    answer = client.get(path)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    kept = "immutable" if path.startswith("/static") else "no-store"
    assert kept in answer.headers["cache-control"]
    if answer.headers["content-type"].startswith("text/html"):
        assert not re.search(r"\sstyle=|<style|\son[a-z]+=|javascript:", answer.text)
        assert all(
            re.match(r'<script src="/static/', s) for s in re.findall("<script.*", answer.text)
        )
        assert not re.search(r"(src|href|action)=\"(https?:)?//", answer.text)
        for form in re.findall(r'<form[^>]*method="post".*?</form>', answer.text, re.DOTALL):
            assert re.search('name="token" value="[0-9a-f]{64}"', form)


def test_bodies_that_are_no_form_are_refused(house):
    client = house.inside()
    path = "/tenants/acme"
    assert client.post(path, json={"do": "revoke"}).status_code == 415
    assert client.post(path, files={"do": b"revoke"}).status_code == 415
    kind = {"content-type": "application/x-www-form-urlencoded"}
    for body in (b"\xff=1", b"a=%ff", b"&".join(b"f%d=1" % n for n in range(50))):
        assert client.post(path, content=body, headers=kind).status_code == 400
    assert client.post(path, content=b"a" * (2 << 20), headers=kind).status_code == 413


def test_the_engine_says_what_it_can(house):
    house.engine.rows = 17
    words = said(house.inside().get("/"))
    assert "Rows in the queue 17" in words
    assert "Slots" not in words
    house.engine = Full(rows=3)
    words = said(house.inside().get("/"))
    assert "Rows in the queue 3 of 1,024 that may wait" in words
    assert "Slots in use 5 of 64 for deltas" in words


def test_the_state_of_a_page_changes_with_what_its_forms_act_upon(house):
    client = house.inside()

    def state(path: str) -> str:
        found = re.search('<body data-state="(.*?)">', client.get(path).text)
        assert found
        return found[1]

    before = {path: state(path) for path in PAGES}
    assert before == {path: state(path) for path in PAGES}
    house.registry.rollback("acme", "clf", by=house.by)
    after = {path: state(path) for path in PAGES}
    assert {p for p in PAGES if before[p] != after[p]} == set(PAGES) - {"/"}


# --- the log ---------------------------------------------------------------------------------


def seqs(page) -> list[int]:
    return [int(n) for n in re.findall(r'<li id="e(\d+)">', page.text)]


@pytest.mark.parametrize("kind", ["all", "request"])
def test_the_pages_of_the_log_hold_each_event_once_the_newest_first(house, kind):
    audit, client = house.registry.audit, house.inside()
    audit.extend([("request", "acme", {"n": n}) for n in range(120)])
    path, found = f"/events?kind={kind}", []
    for _ in range(10):
        page = client.get(path)
        found += seqs(page)
        onward = re.search(r'rel="next" href="(.*?)"', page.text)
        if not onward:
            break
        path = html.unescape(onward[1])
    first = 0 if kind == "all" else audit.head()[0] - 120
    assert found == list(range(audit.head()[0], first, -1))


def test_the_log_is_filtered_by_tenant_and_kind(house):
    house.registry.audit.extend([("request", t, {}) for t in ("acme", "globex") for _ in range(5)])
    client = house.inside()
    every = list(house.registry.audit.read())

    def shown(query: str) -> list[int]:
        return seqs(client.get(f"/events?{query}"))

    def right(wanted) -> list[int]:
        return [e.seq for e in reversed(every) if wanted(e)]

    assert shown("") == right(lambda e: e.kind != "request")
    assert shown("kind=request&tenant=globex") == right(
        lambda e: e.kind == "request" and e.tenant == "globex"
    )
    assert shown("kind=alias.set") == right(lambda e: e.kind == "alias.set")
    assert shown("tenant=nobody") == []
    assert shown("before=4&kind=all") == [3, 2, 1]
    assert shown("before=nonsense&kind=all") == right(lambda e: True)


def test_a_page_of_the_log_costs_no_more_than_it_may(house):
    audit, listing = house.registry.audit, house.registry.listing
    audit.append("gate.passed", "acme", {"alias": "clf"})
    audit.extend([("request", "acme", {"alias": "clf"}) for _ in range(1000)])
    end = audit.head()[0]
    page = listing.events(kind="gate", most=500)
    assert page.events == ()
    assert (page.first, page.last, page.more) == (end - 499, end, True)
    page = listing.events(kind="gate", most=500, before=page.first)
    assert page.events == ()
    page = listing.events(kind="gate", most=500, before=page.first)
    assert [e.kind for e in page.events] == ["gate.passed"]
    assert (page.first, page.more) == (1, False)
    page = listing.events(kind="gate", limit=1)
    assert (page.first, page.more) == (page.events[0].seq, True)
    page = listing.events(before=501)
    assert [e.seq for e in page.events] == list(range(500, 450, -1))
    assert listing.events(before=1).events == ()


def test_what_is_looked_for_is_taken_as_it_is(house):
    audit, listing = house.registry.audit, house.registry.listing
    audit.append("gate.passed", "acme", {"alias": "a_b", "more": {"alias": "a%b"}})
    audit.append("gate.passed", "acme", {"alias": "axb"})
    audit.append("gates", "acme", {"alias": HOSTILE})

    def seen(**filter: str) -> list[str]:
        return [e.body["alias"] for e in listing.events(**filter).events]

    assert seen(alias="a_b") == ["a_b"]
    assert seen(alias="a%b") == []  # it is in the body, but not what that is about
    assert seen(alias="axb") == ["axb"]
    assert seen(alias=HOSTILE) == [HOSTILE]
    assert seen(kind="gate") == ["axb", "a_b"]
    assert seen(kind="gate.%") == seen(kind="g") == seen(tenant="%", kind="gate") == []


def tamper(house: House, statement: str) -> None:
    with sqlite3.connect(house.db) as connection:
        triggers = connection.execute("select name from sqlite_master where type = 'trigger'")
        for (name,) in triggers.fetchall():
            connection.execute(f"drop trigger {name}")
        connection.execute(statement)


def test_whether_the_chain_holds_is_shown(house):
    client = house.inside()
    assert "The chain was not checked since the server's start." in said(client.get("/events"))
    press(client, "/events", do="verify")
    count = house.registry.audit.head()[0]
    assert f"The chain is whole: {count} events checked just now." in said(client.get("/events"))
    tamper(house, "update audit set tenant = 'globex' where seq = 3")
    press(client, "/events", do="verify")
    words = said(client.get("/events"))
    assert "The audit chain is broken at event 3" in words
    assert "whole" not in words


def test_an_event_that_is_no_longer_json_is_a_page_not_a_crash(house):
    client = house.inside()
    tamper(house, "update audit set body = '{' where seq = 5")
    answer = client.get("/events")
    assert answer.status_code == 503
    assert "cannot be read" in said(answer)


def test_a_chain_that_was_replaced_by_another_whole_one_is_found(house):
    class Swapped:
        def __init__(self) -> None:
            self.now = (3, "a" * 64)

        def head(self):
            return self.now

        def verify(self, expect=None):
            if expect[1] != self.now[1]:
                raise CheckpointError("it is not the one that was the head then")
            return self.now[0]

    log = Swapped()
    chain = Chain(log, lambda: 0.0)
    assert chain.check().whole
    log.now = (4, "b" * 64)
    assert not chain.check().whole
    assert not chain.check().whole  # what was seen once is not forgotten


def test_the_chain_is_checked_by_one_at_a_time(house):
    seen = []

    class Slow:
        def head(self):
            return 0, GENESIS

        def verify(self, expect=None):
            with pytest.raises(BusyError):
                chain.check()
            seen.append(1)
            return 0

    chain = Chain(Slow(), lambda: 0.0)
    assert chain.check().whole
    assert chain.check().whole
    assert seen == [1, 1]


# --- figures ---------------------------------------------------------------------------------


def test_quantiles_from_buckets_are_within_a_bucket_of_the_true_ones():
    draw = random.generator(0, "tests.quantiles")
    bounds = [*(2.0**k for k in range(-6, 7)), math.inf]
    for _ in range(20):
        values = torch.exp(torch.randn(500, generator=draw))
        counts, low = [], 0.0
        for bound in bounds:
            counts.append(int(((values > low) & (values <= bound)).sum()))
            low = bound
        for share in (0.5, 0.95, 0.99):
            true = float(torch.sort(values).values[math.ceil(share * 500) - 1])
            at = next(i for i, b in enumerate(bounds) if true <= b)
            found = quantile(bounds, counts, share)
            assert (bounds[at - 1] if at else 0.0) <= found <= bounds[at]


def test_rates_and_errors_are_differences_over_their_own_time():
    meters, now = Meters(1), [0.0]
    meters.done("infer", "acme", 200, 0.004)  # before anybody looked
    traffic = Traffic(meters.registry, every_s=10.0, clock=lambda: now[0])
    for minute in range(10):
        for _ in range(6):
            now[0] += 10.0
            for status in (200, 200, 429, 500):
                meters.done("infer", "acme", status, 0.004)
            meters.done("management", "acme", 500, 9.0)  # is none of it
            if minute == 9:
                meters.done("infer", "globex", 200, 0.04)  # shares "_other"
            traffic.sample()
            traffic.sample()
    look = traffic.look()
    everyone, acme = look.now(), look.now("acme")
    assert acme.per_minute == pytest.approx(24.0)
    assert everyone.per_minute == pytest.approx(30.0)
    assert (acme.requests, acme.failed, acme.refused) == (120, 30, 30)
    assert acme.over_s == 300.0
    assert look.now("globex") is None
    assert look.now("nobody") is None
    # All of acme's lie in the bucket (2.5 ms, 5 ms].
    assert acme.seconds == pytest.approx((0.00375, 0.004875, 0.004975))
    course = look.course("acme")
    assert [round(s.per_minute) for s in course] == [24] * 60
    assert [s.failed for s in course] == [1] * 60
    assert [s.ago_s for s in course] == [pytest.approx(10.0 * n) for n in range(59, -1, -1)]
    few = look.course("acme", steps=20)
    assert len(few) <= 20
    assert {round(s.per_minute) for s in few} == {24}


def test_a_time_without_requests_has_no_latency():
    meters, now = Meters(5), [0.0]
    traffic = Traffic(meters.registry, clock=lambda: now[0])
    for count in (0, 3, 0):
        now[0] += 10.0
        for _ in range(count):
            meters.done("infer", "acme", 200, 99.0)
        traffic.sample()
    course = traffic.look().course()
    assert [s.seconds for s in course] == [None, (math.inf,) * 3, None]
    assert [s.per_minute for s in course] == [0.0, 18.0, 0.0]


def test_an_hour_is_kept_and_no_more():
    meters, now = Meters(5), [0.0]
    traffic = Traffic(meters.registry, clock=lambda: now[0])
    lengths = []
    for _ in itertools.repeat(None, 800):
        now[0] += 10.0
        traffic.sample()
        lengths.append(len(traffic.look().course()))
    assert max(lengths) <= 91
    course = traffic.look().course()
    assert 3400 <= course[0].ago_s <= 3600
    assert course[-1].ago_s <= 30


def test_the_overview_shows_the_traffic(house):
    client = house.inside()
    meters = client.app.meters
    for status in (200,) * 9 + (503,):
        meters.done("infer", "acme", status, 0.004)
    words = said(client.get("/"))
    assert "Requests a minute" in words
    assert "10 in last" in words
    assert "Errors 10 %" in words
    assert "4.88 ms" in words
    assert "<svg" not in client.get("/").text.split("<table")[0]  # one reading makes no chart
