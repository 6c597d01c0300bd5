"""One database, SQLite or PostgreSQL: transactions that are there whole or not, in one order."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import alembic.command
import alembic.config
import alembic.util
import sqlalchemy as sa
from sqlalchemy import Connection, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from tessera.errors import CheckpointError, InputError, StorageError
from tessera.files import sync_name
from tessera.serve import schema

__all__ = ["Change", "Database", "url_of"]

_BUSY_S = 10  # how long a writer waits for that of another process
_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATING = 0x7E55E7A  # PostgreSQL's advisory lock: one process at a time makes the tables


@final
class Change:
    """A transaction that has its turn: no other, in any process, writes before it has ended.

    Attributes:
        connection: For statements.
        revision: Of the state; `move` counts it up.
        seq: Of the last event of the audit chain.
        hash: Of the same.
    """

    __slots__ = ("_after", "connection", "hash", "revision", "seq")

    def __init__(self, connection: Connection, revision: int, seq: int, hash: str) -> None:
        self.connection = connection
        self.revision = revision
        self.seq = seq
        self.hash = hash
        self._after: list[Callable[[], None]] = []

    def move(self) -> int:
        """Count the revision up: other processes will look at what is marked with it."""
        self.revision += 1
        return self.revision

    def then(self, act: Callable[[], None]) -> None:
        """Do this once all is committed, before the next change has its turn."""
        self._after.append(act)

    def settle(self) -> None:
        """Do what was to be done once all is committed."""
        for act in self._after:
            act()


@final
class Database:
    """The tables of `schema`, made or brought up to date where needed.

    On SQLite a change is on the disk when `write` has ended (WAL, synchronous=FULL); on PostgreSQL
    when the server says so (a connection whose default is synchronous_commit=off puts it on).

    Args:
        url: ``sqlite:///path`` or ``postgresql+psycopg://user:password@host/name``.

    Raises:
        InputError: It is no such URL.
        StorageError: It cannot be reached, or not be written to.
        CheckpointError: A newer Tessera has changed its tables.

    Example:
        >>> import tempfile
        >>> database = Database(f"sqlite:///{tempfile.mkdtemp()}/registry.db")
        >>> with database.write() as change:
        ...     change.move()
        1
        >>> database.close()
    """

    def __init__(self, url: str) -> None:
        self._url = url_of(url)
        self.name = self._url.render_as_string(hide_password=True)
        self._turn = threading.Lock()
        self._closed = False
        self._engine = self._sqlite() if self.is_sqlite else self._postgresql()
        if self.is_sqlite:
            self._reader = self._engine.execution_options()
            self._writer = self._engine.execution_options(tessera_write=True)
        else:
            # A reader sees all tables as they were at one moment; a writer, once it has its turn,
            # what those before it left. Neither is to depend on the server's settings.
            self._reader = self._engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            self._writer = self._engine.execution_options(isolation_level="READ COMMITTED")
        try:
            self._migrate()
            if self._url.database and self.is_sqlite:
                sync_name(Path(self._url.database))
        except BaseException:
            self.close()
            raise

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file of this machine."""
        return self._url.get_backend_name() == "sqlite"

    @property
    def path(self) -> str:
        """That file; with PostgreSQL the name that its server has for it."""
        return str(self._url.database)

    @contextmanager
    def write(self) -> Iterator[Change]:
        """A transaction that changes things: all of it, or nothing where the block raises.

        The threads of this process take turns at a lock of their own, processes at the row `head`.

        Raises:
            StorageError: The database is away or full; the message says if nothing was written.
        """
        with self._turn:
            done = "nothing was written"
            try:
                with self._open(self._writer) as connection, connection.begin() as transaction:
                    row = connection.execute(sa.select(schema.head).with_for_update()).one()
                    change = Change(connection, row.revision, row.seq, row.hash)
                    yield change
                    if (change.revision, change.seq) != (row.revision, row.seq):
                        connection.execute(
                            sa.update(schema.head).values(
                                revision=change.revision, seq=change.seq, hash=change.hash
                            )
                        )
                    if not self.is_sqlite:  # its server may have committed, and the answer be lost
                        done = "it may have been written, or not: read it before you try again"
                    transaction.commit()
                    change.settle()
            except SQLAlchemyError as error:
                raise self._failed("could not be changed", error, done) from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts no thread of this process writes."""
        with self._turn:
            yield

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads, and sees one moment.

        Raises:
            StorageError: The database is away.
        """
        try:
            with self._open(self._reader) as connection, connection.begin():
                yield connection
        except SQLAlchemyError as error:
            raise self._failed("could not be read", error, "nothing was changed") from error

    def close(self) -> None:
        """Let all connections go; what comes later raises StorageError."""
        self._closed = True
        self._engine.dispose()

    # -- opening ------------------------------------------------------------------------------

    def _open(self, engine: sa.Engine) -> Connection:
        if self._closed:
            raise StorageError(f"the registry {self.name} is closed; open a new one")
        return engine.connect()

    def _sqlite(self) -> sa.Engine:
        path = Path(str(self._url.database))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # It holds the digests of the keys: nobody else's to read. WAL files take its mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StorageError(
                f"the registry's database {path} could not be opened ({error.strerror}). Give "
                "another path, or make this one writable"
            ) from error
        engine = sa.create_engine(
            self._url, connect_args={"timeout": _BUSY_S}, hide_parameters=True, pool_size=8
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _postgresql(self) -> sa.Engine:
        engine = sa.create_engine(
            self._url,
            connect_args={
                "connect_timeout": _BUSY_S,
                # A server that fell silent is given up after about as long.
                "tcp_user_timeout": 1000 * _BUSY_S,
                "keepalives_idle": 5,
                "keepalives_interval": 2,
                "keepalives_count": 3,
            },
            hide_parameters=True,
            pool_pre_ping=True,  # a server that was restarted is found again
            pool_size=8,
        )
        event.listen(engine, "connect", _prepare_postgresql)
        return engine

    def _migrate(self) -> None:
        config = alembic.config.Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        with self._turn:
            try:
                with self._writer.connect() as connection, connection.begin():
                    if not self.is_sqlite:
                        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
                    config.attributes["connection"] = connection
                    alembic.command.upgrade(config, "head")
            except SQLAlchemyError as error:
                raise self._failed("could not be opened", error, "nothing was changed") from error
            except alembic.util.CommandError as error:
                raise CheckpointError(
                    f"the registry {self.name} has tables that this Tessera does not know "
                    f"({error}). Upgrade with: pip install -U tessera-lifelong"
                ) from error

    def _failed(self, what: str, error: SQLAlchemyError, done: str) -> StorageError:
        cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        return StorageError(f"the registry {self.name} {what} ({cause}); {done}")


def url_of(url: str) -> URL:
    """The URL of a registry, taken apart.

    Raises:
        InputError: It can be none.

    Example:
        >>> url_of("postgresql://host/name").drivername
        'postgresql+psycopg'
    """
    try:
        found = make_url(url)
    except (ArgumentError, ValueError, AttributeError):
        found = None
    if found is not None and found.drivername in ("sqlite", "sqlite+pysqlite"):
        if found.database and found.database != ":memory:" and not found.query:
            return found
        raise InputError(
            "a registry outlives its process: it needs a file, as sqlite:///path/registry.db, and "
            "no ?options"
        )
    if found is not None and found.drivername in ("postgresql", "postgresql+psycopg"):
        return found.set(drivername="postgresql+psycopg")
    # Not what was given: it may hold a password.
    raise InputError(
        "a registry's URL is sqlite:///path or postgresql+psycopg://user:password@host/name"
        + (f", not {found.drivername}://..." if found is not None else "")
    )


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say, see _begin_sqlite
    mode = _into_wal(connection)
    if mode != "wal":
        raise sqlite3.OperationalError(f"no WAL here, only {mode}; a local disk has it")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _into_wal(connection: sqlite3.Connection) -> str:
    """The mode the file is in after asking for WAL.

    Of all statements this one does not wait for others' locks: where several open a new file at
    once, all but the first may be told that it is locked.
    """
    until = time.monotonic() + _BUSY_S
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # A reader that turned into a writer halfway would fail where another process wrote meanwhile.
    write = connection.get_execution_options().get("tessera_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _prepare_postgresql(connection: Any, _: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{_BUSY_S}s'")
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false) "
            "WHERE current_setting('synchronous_commit') = 'off'"
        )
    connection.commit()
