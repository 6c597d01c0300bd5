"""The registry where things go wrong: nothing half done, a message that says so, and on it goes."""

from __future__ import annotations

import contextlib
import resource
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import alembic.command
import alembic.config
import psycopg
import pytest
import sqlalchemy as sa
import torch
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tessera.arch import Delta
from tessera.errors import CheckpointError, InputError, StorageError
from tessera.serve import schema
from tessera.serve.audit import Audit
from tessera.serve.blobs import Blobs
from tessera.serve.database import _MIGRATIONS, Database
from tessera.serve.ledger import Ledger
from tessera.serve.records import SYSTEM
from tessera.serve.registry import Registry

DELTA = Delta(kind="prompt", tensors={"prompt": torch.ones(2, 4)})


def picture(registry: Registry) -> dict[str, object]:
    """All that is there, to compare."""
    with registry._ledger.read() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(sa.select(table))]
            for table in schema.metadata.sorted_tables
        }


@pytest.fixture
def registry(url: str, tmp_path: Path) -> Iterator[Registry]:
    """One tenant with a delta, an alias at its second generation, and a key."""
    registry = Registry(url, Blobs(tmp_path / "blobs"), base_hash="")
    registry.create_tenant("one", by=SYSTEM)
    record = registry.put_delta("one", DELTA, by=SYSTEM)
    registry.set_alias("one", "m", "", generation=0, by=SYSTEM)
    registry.set_alias("one", "m", record.hash, generation=1, by=SYSTEM)
    registry.create_key("one", ["infer"], by=SYSTEM)
    yield registry
    registry.close()


def changes(registry: Registry) -> dict[str, Callable[[], object]]:
    key = registry.keys("one")[0]
    other = Delta(kind="prompt", tensors={"prompt": torch.zeros(2, 4)})
    return {
        "tenant": lambda: registry.create_tenant("two", by=SYSTEM),
        "key": lambda: registry.create_key("one", ["infer"], by=SYSTEM),
        "revoke": lambda: registry.revoke_key(key.id, by=SYSTEM),
        "admin": lambda: registry.first_admin_key(None),
        "own admin": lambda: registry.first_admin_key("an-operators-own-secret"),
        "put": lambda: registry.put_delta("one", other, by=SYSTEM),
        "set": lambda: registry.set_alias("one", "m", "", generation=2, by=SYSTEM),
        "new": lambda: registry.set_alias("one", "n", "", generation=0, by=SYSTEM),
        "rollback": lambda: registry.rollback("one", "m", by=SYSTEM),
        "audit": lambda: registry.audit.extend([("a", None, {}), ("b", "one", {})]),
    }


@contextlib.contextmanager
def failing_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The writing statement of that number fails, and those after it."""
    real, writes = sa.Connection.execute, count()

    def execute(self: sa.Connection, statement: object, *rest: object) -> object:
        if isinstance(statement, sa.Insert | sa.Update) and next(writes) >= number:
            raise sa.exc.OperationalError("x", {}, Exception("pulled the plug"))
        return real(self, statement, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sa.Connection, "execute", execute)
        yield


@pytest.mark.parametrize(
    ("name", "statements"),
    [
        ("tenant", 3),
        ("key", 3),
        ("revoke", 3),
        ("admin", 3),
        ("own admin", 3),
        ("put", 3),
        ("set", 4),
        ("new", 4),
        ("rollback", 4),
        ("audit", 2),
    ],
)
def test_a_fault_at_any_statement_leaves_nothing(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, name: str, statements: int
) -> None:
    before, view, act = picture(registry), registry.view(), changes(registry)[name]
    for number in range(statements):
        with (
            failing_at(number, monkeypatch),
            pytest.raises(StorageError, match=r"\(pulled the plug\); nothing was written"),
        ):
            act()
        assert picture(registry) == before
        assert registry.view() is view
    with failing_at(statements, monkeypatch):
        act()
    assert picture(registry) != before
    assert registry.audit.verify() == len(before["audit"]) + (2 if name == "audit" else 1)


def test_what_is_read_while_a_change_is_made_is_the_state_before(registry: Registry) -> None:
    view, seen = registry.view(), []
    with registry._ledger.write() as change:
        registry.audit.record(change, "a", None, {})
        thread = threading.Thread(target=lambda: seen.append(registry.audit.head()[0]))
        thread.start()
        thread.join()
    assert seen == [5]
    assert registry.audit.head()[0] == 6
    assert registry.view() is view


def test_a_view_is_never_changed(registry: Registry) -> None:
    view = registry.view()
    aliases, keys = dict(view.aliases), dict(view.keys)
    with pytest.raises(TypeError):
        view.aliases["one", "m"] = view.aliases["one", "m"]
    registry.rollback("one", "m", by=SYSTEM)
    registry.revoke_key(registry.keys("one")[0].id, by=SYSTEM)
    assert (dict(view.aliases), dict(view.keys)) == (aliases, keys)
    assert registry.view().revision == view.revision + 2
    assert registry.refresh() is registry.view()


def test_a_change_here_is_seen_while_those_of_others_wait(
    registry: Registry, url: str, tmp_path: Path
) -> None:
    other = Registry(url, Blobs(tmp_path / "blobs"), base_hash="")
    registry.set_alias("one", "a", "", generation=0, by=SYSTEM)
    other.set_alias("one", "b", "", generation=0, by=SYSTEM)
    assert {name for _, name in other.view().aliases} == {"m", "b"}
    assert {name for _, name in other.refresh().aliases} == {"m", "a", "b"}
    assert {name for _, name in registry.refresh().aliases} == {"m", "a", "b"}
    assert other.view().revision == registry.view().revision == 7
    other.close()


def test_a_database_that_went_back_is_read_afresh(registry: Registry) -> None:
    registry.set_alias("one", "late", "", generation=0, by=SYSTEM)
    with registry._ledger.write() as change:  # a backup from before that was played back
        a = schema.aliases
        change.connection.execute(sa.delete(a).where(a.c.name == "late"))
        change.connection.execute(sa.update(schema.head).values(revision=5))
    assert {name for _, name in registry.refresh().aliases} == {"m"}


@contextlib.contextmanager
def no_file_larger_than(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/r.db", Blobs(tmp_path / "blobs"), base_hash="")
    registry.create_tenant("one", by=SYSTEM)
    before, view = picture(registry), registry.view()
    body = {"x": "y" * 100_000}
    acts = [
        lambda: registry.set_alias("one", "m", "", generation=0, by=SYSTEM),
        lambda: registry.put_delta("one", DELTA, by=SYSTEM),
        lambda: registry.audit.extend([("a", None, {}), ("a", None, body)]),
    ]
    used = (tmp_path / "r.db-wal").stat().st_size
    # At the first page of a change, within one, and after several.
    for act, room in [(0, 0), (0, 30), (0, 4200), (1, 0), (2, 0), (2, 9000), (2, 60_000)]:
        with (
            no_file_larger_than(used + room if act != 1 else 100),
            pytest.raises(StorageError, match=r"(nothing was written|is unchanged)"),
        ):
            acts[act]()
        assert picture(registry) == before
        assert registry.view() is view
    for act in acts:
        act()
    assert registry.audit.verify() == 5
    registry.close()


def test_a_closed_registry_says_so(registry: Registry) -> None:
    acts = changes(registry)
    view = registry.view()
    registry.close()
    for act in (*acts.values(), registry.refresh, registry.tenants, registry.audit.verify):
        with pytest.raises(StorageError, match="is closed; open a new one"):
            act()
    assert registry.view() is view
    registry.close()


def test_a_server_that_goes_away_and_comes_back(
    postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(f"{postgresql}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE away")
        url = f"{postgresql}/away".replace("postgresql://", "postgresql+psycopg://")
        registry = Registry(url, Blobs(tmp_path / "blobs"), base_hash="")
        registry.create_tenant("one", by=SYSTEM)
        before = picture(registry)

        def leave() -> None:
            connection.execute("ALTER DATABASE away ALLOW_CONNECTIONS false")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'away'"
            )

        leave()
        for act in (
            lambda: registry.create_tenant("two", by=SYSTEM),
            lambda: registry.put_delta("one", DELTA, by=SYSTEM),
            lambda: registry.set_alias("one", "m", "", generation=0, by=SYSTEM),
            lambda: registry.audit.append("a", None, {}),
            registry.refresh,
        ):
            with pytest.raises(StorageError, match=r"could not be (changed|read).*; nothing was"):
                act()
        connection.execute("ALTER DATABASE away ALLOW_CONNECTIONS true")
        assert picture(registry) == before
        real = psycopg.Connection.commit

        def commit(self: psycopg.Connection) -> None:
            leave()
            real(self)

        with monkeypatch.context() as patch:
            patch.setattr(psycopg.Connection, "commit", commit)
            with pytest.raises(StorageError, match="it may have been written, or not: read it"):
                registry.audit.append("a", None, {})
        connection.execute("ALTER DATABASE away ALLOW_CONNECTIONS true")
        assert picture(registry) == before
        registry.set_alias("one", "m", "", generation=0, by=SYSTEM)
        registry.close()


# --- opening ---------------------------------------------------------------------------------


def test_the_steps_lead_to_the_tables(url: str) -> None:
    database = Database(url)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_revision() == "0004"
    database.close()


def test_the_steps_lead_back(url: str) -> None:
    database = Database(url)
    config = alembic.config.Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    with database.write() as change:
        config.attributes["connection"] = change.connection
        alembic.command.downgrade(config, "base")
        assert sa.inspect(change.connection).get_table_names() == ["alembic_version"]
    database.close()
    database = Database(url)  # and up again
    with database.write() as change:
        assert (change.revision, change.seq) == (0, 0)
    database.close()


def test_another_process_that_never_ends_its_change(
    registry: Registry, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = picture(registry)
    monkeypatch.setattr("tessera.serve.database._BUSY_S", 0.2 if "sqlite" in url else 1)
    waiting = Database(url)
    with registry._ledger.write(), pytest.raises(StorageError, match=r"\(.*lock.*\); nothing was"):
        Audit(waiting, clock=lambda: 1.0).append("a", None, {})
    assert picture(registry) == before
    waiting.close()


def test_many_may_open_a_new_one_at_once(url: str, tmp_path: Path) -> None:
    opened, failed = [], []

    def open_one() -> None:
        try:
            opened.append(Registry(url, Blobs(tmp_path / "blobs"), base_hash=""))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    secrets = [registry.first_admin_key(None) for registry in opened]
    assert sum(secret is not None for secret in secrets) == 1
    for registry in opened:
        registry.close()


def test_a_newer_database_is_left_alone(url: str) -> None:
    database = Database(url)
    with database.write() as change:
        change.connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(CheckpointError, match=r"does not know .*Upgrade with: pip"):
        Database(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite:///x?mode=ro", "needs a file"),
        ("mysql://u:secret@h/d", "not mysql://"),
        ("nonsense secret", "registry's URL is"),
        ("postgresql+psycopg://u:secret@h:port/d", "registry's URL is"),
        ("", "registry's URL is"),
    ],
)
def test_a_url_that_is_none(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Database(url)
    assert "secret" not in str(caught.value)


def test_a_place_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no database, but long enough to look at" * 100)
    with pytest.raises(StorageError, match="could not be opened"):
        Database(f"sqlite:///{tmp_path}/file/x.db")
    with pytest.raises(StorageError, match="not a database"):
        Database(f"sqlite:///{tmp_path}/file")
    with pytest.raises(StorageError, match="could not be opened") as caught:
        Database("postgresql+psycopg://u:secret@127.0.0.1:9/d")
    assert "secret" not in str(caught.value)


def test_the_disk_is_waited_for(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/r.db", clock=lambda: 1.0)
    with ledger.write() as change:
        found = {
            name: change.connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 10_000,
    }
    ledger.database.close()


def test_a_connection_that_would_not_wait_for_the_disk_is_made_to(postgresql: str) -> None:
    with psycopg.connect(f"{postgresql}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE hasty")
        connection.execute("ALTER DATABASE hasty SET synchronous_commit = off")
    database = Database(f"{postgresql}/hasty")
    with database.write() as change:
        found = change.connection.exec_driver_sql("SHOW synchronous_commit").scalar()
    assert found == "on"
    database.close()
