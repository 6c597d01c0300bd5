"""The audit chain: by hand, by tampering, by two writers, by message."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.errors import CheckpointError, InputError, StorageError
from tessera.serve.audit import GENESIS, Audit
from tessera.serve.database import Database


@pytest.fixture
def opened(url: str) -> Iterator[Callable[[], Audit]]:
    """Each call is another process, as far as the database can tell."""
    databases = []
    ticks = count(1)

    def make() -> Audit:
        databases.append(Database(url))
        return Audit(databases[-1], clock=lambda: next(ticks) / 10)

    yield make
    for database in databases:
        database.close()


@pytest.fixture
def audit(tmp_path: Path) -> Iterator[Audit]:
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    yield Audit(database, clock=lambda: 1.5)
    database.close()


def tamper(tmp_path: Path, *statements: str) -> None:
    connection = sqlite3.connect(tmp_path / "registry.db")
    for statement in statements:
        assert connection.execute(statement).rowcount > 0
    connection.commit()
    connection.close()


def test_the_chain_by_hand(opened: Callable[[], Audit]) -> None:
    audit = opened()
    assert (audit.head(), audit.verify()) == ((0, GENESIS), 0)
    first = audit.append("gate.passed", "acme", {"b": [1.5, None], "a": "caf\u00e9"})
    second = audit.append("start", None, {})
    words = '[1,"%s",0.1,"gate.passed","acme",{"a":"caf\\u00e9","b":[1.5,null]}]' % ("0" * 64)
    assert first.hash == hashlib.sha256(words.encode()).hexdigest()
    listed = [2, first.hash, 0.2, "start", "", {}]
    words = json.dumps(listed, separators=(",", ":"))
    assert second.hash == hashlib.sha256(words.encode()).hexdigest()
    assert (second.previous, second.tenant, audit.head()) == (first.hash, "", (2, second.hash))
    again = opened()
    assert [(e.seq, e.hash, e.body, e.time_s) for e in again.read()] == [
        (1, first.hash, {"a": "caf\u00e9", "b": [1.5, None]}, 0.1),
        (2, second.hash, {}, 0.2),
    ]
    assert again.verify(expect=(1, first.hash)) == 2


def test_reading_a_part(opened: Callable[[], Audit]) -> None:
    audit = opened()
    audit.append("a", "one", {"n": 1})
    audit.extend([("b", "two", {"n": 2}), ("a", "two", {"n": 3}), ("c", None, {"n": 4})])

    def found(**wanted: object) -> list[int]:
        return [e.body["n"] for e in audit.read(**wanted)]

    assert found() == [1, 2, 3, 4]
    assert found(tenant="two") == [2, 3]
    assert found(tenant="") == [4]
    assert found(kinds=["a", "c"]) == [1, 3, 4]
    assert found(kinds=[]) == []
    assert found(after_seq=2) == [3, 4]
    assert found(since_s=0.2, kinds=["a"]) == [3]
    assert found(tenant="nobody") == []


def test_what_nothing_can_be_read_by(opened: Callable[[], Audit]) -> None:
    audit = opened()
    for wanted in (
        {"tenant": "\0"},
        {"kinds": ["a\0"]},
        {"after_seq": -1},
        {"after_seq": 1 << 63},
        {"after_seq": True},
        {"since_s": float("nan")},
    ):
        with pytest.raises(InputError):
            audit.read(**wanted)


def test_a_long_log_is_read_page_by_page_and_half_read_is_no_harm(
    opened: Callable[[], Audit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.serve.audit._PAGE", 7)
    audit = opened()
    assert audit.extend([]) == []
    events = audit.extend([("a", None, {"n": n}) for n in range(21)])
    assert [e.seq for e in events] == list(range(1, 22))
    half = audit.read()
    assert next(half).body == {"n": 0}
    audit.append("a", None, {"n": 21})  # while somebody reads
    assert [e.body["n"] for e in half] == list(range(1, 22))
    assert audit.verify() == 22


def test_several_writers_make_one_chain(opened: Callable[[], Audit]) -> None:
    audits = [opened(), opened()]
    failed: list[BaseException] = []

    def write(audit: Audit, who: int) -> None:
        try:
            for n in range(15):
                audit.extend([("a", None, {"who": who, "n": n}), ("b", None, {})])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(audits[i % 2], i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert audits[0].verify() == 4 * 15 * 2
    for who in range(4):
        own = [e.body["n"] for e in audits[1].read(kinds=["a"]) if e.body["who"] == who]
        assert own == list(range(15))


# --- tampering -------------------------------------------------------------------------------


def test_tampering_shows_where_it_begins(tmp_path: Path, audit: Audit) -> None:
    events = audit.extend([("a", "acme", {"n": n}) for n in range(6)])
    for statement, seq in [
        ("UPDATE audit SET body = '{\"n\":9}' WHERE seq = 4", 4),
        ("UPDATE audit SET body = '{\"n\": 3}' WHERE seq = 4", 4),  # a blank more
        ("UPDATE audit SET kind = 'b' WHERE seq = 1", 1),
        ("UPDATE audit SET tenant = '' WHERE seq = 2", 2),
        ("UPDATE audit SET time_s = 1.6 WHERE seq = 6", 6),
        (f"UPDATE audit SET hash = '{'0' * 64}' WHERE seq = 3", 3),
        (f"UPDATE audit SET previous = '{'0' * 64}' WHERE seq = 3", 3),
        ("DELETE FROM audit WHERE seq = 2", 2),
        ("DELETE FROM audit WHERE seq = 1", 1),
        ("DELETE FROM audit WHERE seq = 6", 6),
        ("UPDATE head SET seq = 5", 6),
        (f"UPDATE head SET hash = '{'1' * 64}'", 7),
        ("UPDATE audit SET seq = 7 WHERE seq = 6", 6),
    ]:
        assert audit.verify() == 6
        saved = sqlite3.connect(tmp_path / "registry.db")
        before = list(saved.iterdump())
        saved.close()
        tamper(tmp_path, statement)
        with pytest.raises(CheckpointError, match=f"broken at event {seq}:"):
            audit.verify()
        # Put it back as it was.
        rows = [line for line in before if line.startswith('INSERT INTO "audit"')]
        rows += [line for line in before if line.startswith('INSERT INTO "head"')]
        tamper(tmp_path, "DELETE FROM audit", "DELETE FROM head", *rows)
    assert audit.head() == (6, events[-1].hash)


def test_a_chain_that_was_rewritten_whole_shows_against_a_head_kept_elsewhere(
    tmp_path: Path, audit: Audit
) -> None:
    audit.append("a", None, {"n": 1})
    kept = audit.head()
    audit.append("a", None, {"n": 2})
    assert audit.verify(expect=kept) == 2
    assert audit.verify(expect=(0, GENESIS)) == 2
    tamper(tmp_path, "DELETE FROM audit", f"UPDATE head SET seq = 0, hash = '{GENESIS}'")
    audit.append("a", None, {"n": 3})
    audit.append("a", None, {"n": 2})
    assert audit.verify() == 2
    with pytest.raises(CheckpointError, match="broken at event 1: it is not the one"):
        audit.verify(expect=kept)
    with pytest.raises(CheckpointError, match="broken at event 9"):
        audit.verify(expect=(9, kept[1]))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(st.text(max_size=6), JSON, max_size=3), min_size=1, max_size=4))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_json_says_comes_back(audit: Audit, bodies: list[dict[str, object]]) -> None:
    after, events = audit.head()[0], audit.extend([("a", "acme", body) for body in bodies])
    read = list(audit.read(after_seq=after))
    for body, event, found in zip(bodies, events, read, strict=True):
        assert body == event.body == found.body
        assert found.hash == event.hash
    assert audit.verify() == after + len(bodies)


# --- messages --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("A", None, {}), "kind of an event"),
        (("", None, {}), "kind of an event"),
        (("a\n", None, {}), "kind of an event"),
        (("a" * 65, None, {}), "kind of an event"),
        ((7, None, {}), "kind of an event"),
        (("a", "../x", {}), "tenant's name"),
        (("a", None, [1]), "is a dict, got list"),
        (("a", None, {"x": float("nan")}), "plain values"),
        (("a", None, {"x": {1: 2}}), "the key 1"),
        (("a", None, {"x": {"y"}}), "plain values"),
        (("a", None, {"x": "y" * (1 << 20)}), "log its hash"),
    ],
)
def test_what_is_no_event_is_refused_with_all_beside_it(
    audit: Audit, entry: tuple[str, str | None, dict[str, object]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        audit.extend([("good", None, {}), entry])
    assert audit.head() == (0, GENESIS)


def test_a_closed_database(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    audit = Audit(database, clock=lambda: 1.5)
    database.close()
    for act in (audit.verify, audit.head, lambda: audit.append("a", None, {})):
        with pytest.raises(StorageError, match="is closed"):
            act()
