"""Signing in to the dashboard: how often one may try, and what the audit log says of it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.testclient import TestClient

from tessera.errors import AccessError, BusyError, StorageError
from tessera.serve.app import make_app
from tessera.serve.blobs import Blobs
from tessera.serve.dashboard import add_dashboard
from tessera.serve.dashboard_door import Door
from tessera.serve.dashboard_session import Throttle
from tessera.serve.registry import Registry

ADMIN = "an-admin-key-for-the-tests-only"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry(tmp_path):
    found = Registry(f"sqlite:///{tmp_path}/r.db", Blobs(tmp_path / "blobs"), base_hash="")
    found.first_admin_key(ADMIN)
    yield found
    found.close()


def asking(address: str, forwarded: str | None = None) -> Request:
    headers = [] if forwarded is None else [(b"x-forwarded-for", forwarded.encode("latin-1"))]
    return Request({"type": "http", "client": (address, 1), "headers": headers})


def told(registry: Registry) -> list[tuple[str, dict]]:
    events = registry.audit.read(kinds=["dashboard.signin", "dashboard.refused"])
    return [(e.kind, dict(e.body)) for e in events]


def test_who_comes_in_and_who_does_not_is_in_the_log_without_the_secret(registry):
    door, admin = Door(registry), registry.authenticate(ADMIN)
    registry.create_tenant("acme", by=admin)
    key, secret = registry.create_key("acme", ["infer"], by=admin)
    assert door.enter(ADMIN, asking("192.0.2.1")).id == admin.id
    for wrong in ("a-guess-at-the-key", secret):
        with pytest.raises(AccessError):
            door.enter(wrong, asking("192.0.2.2"))
    assert told(registry) == [
        ("dashboard.signin", {"address": "192.0.2.1", "by": admin.id}),
        ("dashboard.refused", {"address": "192.0.2.2", "key": ""}),
        ("dashboard.refused", {"address": "192.0.2.2", "key": key.id}),
    ]
    bodies = str([e.body for e in registry.audit.read()])
    assert not any(word in bodies for word in (ADMIN, secret, "a-guess"))


def test_nobody_gets_in_unlogged(registry):
    door = Door(registry)
    registry._ledger.database.close()
    with pytest.raises(StorageError):
        door.enter(ADMIN, asking("192.0.2.1"))


def test_after_too_many_wrong_keys_the_right_one_has_to_wait_too(registry):
    clock = Clock()
    door = Door(registry, Throttle(each=3, all=100, window_s=60.0, clock=clock))
    for _ in range(3):
        with pytest.raises(AccessError):
            door.enter("a-guess-at-the-key", asking("192.0.2.1"))
        clock.now += 1
    with pytest.raises(BusyError) as error:
        door.enter(ADMIN, asking("192.0.2.1"))
    assert error.value.retry_after_s == 57.0
    assert len(told(registry)) == 3  # who waits fills no log
    assert door.enter(ADMIN, asking("192.0.2.9"))  # another address does not wait
    clock.now += 57
    assert door.enter(ADMIN, asking("192.0.2.1"))


def test_right_keys_do_not_count(registry):
    door = Door(registry, Throttle(each=2, all=2, clock=Clock()))
    for _ in range(10):
        door.enter(ADMIN, asking("192.0.2.1"))
    with pytest.raises(AccessError):
        door.enter("wrong", asking("192.0.2.1"))


def test_all_addresses_together_are_bounded():
    clock = Clock()
    throttle = Throttle(each=2, all=5, window_s=10.0, clock=clock)
    for host in range(5):
        throttle.enter(f"192.0.2.{host}")
    with pytest.raises(BusyError):
        throttle.enter("192.0.2.200")
    clock.now += 10
    throttle.enter("192.0.2.200")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),  # a customer has the whole network
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::1", True),
        ("unknown", "", True),
    ],
)
def test_what_is_one_address(first, second, same):
    throttle = Throttle(each=1, all=9, clock=Clock())
    throttle.enter(first)
    if same:
        with pytest.raises(BusyError):
            throttle.enter(second)
    else:
        throttle.enter(second)


@pytest.mark.parametrize(
    ("peer", "forwarded", "found"),
    [
        ("127.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("127.0.0.1", "made-up, 203.0.113.9", "203.0.113.9"),
        ("198.51.100.7", "203.0.113.9", "198.51.100.7"),  # no proxy of this machine
        ("::1", None, "::1"),
        ("127.0.0.1", "x\x85" + "y" * 100, "x" + "y" * 63),
    ],
)
def test_whose_address_is_believed(registry, peer, forwarded, found):
    Door(registry).enter(ADMIN, asking(peer, forwarded))
    assert told(registry)[-1][1]["address"] == found


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["::1", "192.0.2.1", "192.0.2.2"]), st.integers(0, 5), st.booleans()
        ),
        max_size=60,
    )
)
def test_in_no_window_are_more_tried_than_allowed(steps):
    """Against a list of all wrong tries that were let through, counted anew each time."""
    clock = Clock()
    throttle = Throttle(each=2, all=4, window_s=10.0, clock=clock)
    wrong: list[tuple[float, str]] = []
    for who, pause, right in steps:
        clock.now += pause
        recent = [w for at, w in wrong if at > clock.now - 10.0]
        allowed = recent.count(who) < 2 and len(recent) < 4
        if not allowed:
            with pytest.raises(BusyError) as error:
                throttle.enter(who)
            assert 0 < error.value.retry_after_s <= 10.0
            continue
        throttle.enter(who)
        if right:
            throttle.right(who)
        else:
            wrong.append((clock.now, who))


class Engine:
    def waiting(self) -> int:
        return 0


def test_the_page_says_how_long_to_wait(registry):
    app = make_app(registry, Engine())
    add_dashboard(app, registry, Engine())
    web = TestClient(app, follow_redirects=False)

    def sign_in(key: str):
        token = re.search(r'name="token" value="([0-9a-f]{64})"', web.get("/sign-in").text)
        return web.post("/sign-in", data={"token": token[1], "key": key, "next": "/"})

    assert sign_in(ADMIN).status_code == 303
    web.cookies.delete("tessera_session")
    assert [sign_in("a-guess-at-the-key").status_code for _ in range(11)] == [403] * 10 + [429]
    refused = sign_in(ADMIN)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert "too many wrong keys" in refused.text
    assert "tessera_session" not in refused.headers.get("set-cookie", "")
    assert len(told(registry)) == 11
