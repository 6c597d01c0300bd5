"""What can be wrong with a server's database and blobs, looked at from outside: `tessera doctor`.

Nothing here brings tables up to date, or makes a database that is not there.
"""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import SQLAlchemyError

from tessera.errors import CheckpointError, InputError, StorageError
from tessera.serve import schema
from tessera.serve.audit import Audit
from tessera.serve.consistency import differences
from tessera.serve.database import Database, url_of

__all__ = ["Health", "free_space", "tables"]

_APART_S = 2.0
_FREE_BYTES = 1 << 30
_MANY_ADMINS = 5


def tables(url: str) -> tuple[str, str]:
    """At which step the tables of a database are, and which is the newest that is known here.

    Args:
        url: Of the database.

    Returns:
        (step, newest); the step is "" where there are no tables, or is no database yet.

    Raises:
        InputError: It is no such URL.
        StorageError: The database is away.

    Example:
        >>> step, newest = tables("sqlite:////nowhere/registry.db")
        >>> step, newest >= "0004"
        ('', True)
    """
    config = Config()
    place = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(place).replace("%", "%%"))
    newest = str(ScriptDirectory.from_config(config).get_current_head())
    found = url_of(url)
    if found.get_backend_name() == "sqlite" and not Path(str(found.database)).exists():
        return "", newest
    engine = sa.create_engine(found, hide_parameters=True)
    try:
        with engine.connect() as connection:
            step = MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise StorageError(
            f"{found.render_as_string(hide_password=True)} cannot be read ({cause}). Is its server "
            "running, is its name right, and does this user have the rights to it?"
        ) from error
    finally:
        engine.dispose()
    return step or "", newest


def free_space(place: str) -> str:
    """How much room the disk of a folder has; "" for what is no folder of this machine.

    Raises:
        StorageError: Less than a gibibyte.

    Example:
        >>> free_space("s3://bucket/prefix")
        ''
    """
    path = Path(place.removeprefix("file://")).absolute()
    if "://" in place.removeprefix("file://"):
        return ""
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < _FREE_BYTES:
        raise StorageError(
            f"{free / 2**20:.0f} MiB free in {path}. Make room, or move it: changes are refused "
            "and answers go without their record once it is full"
        )
    return f"{free / 2**30:.1f} GiB free in {path}"


@final
class Health:
    """Looks at a database whose tables are up to date; each method says what it found, or raises.

    Example:
        >>> import tempfile
        >>> from tessera.serve.database import Database
        >>> url = f"sqlite:///{tempfile.mkdtemp()}/registry.db"
        >>> Database(url).close()
        >>> with Health.of(url) as health:
        ...     health.writing(), health.chain().partition(";")[0]
        ('can be read and written', '0 events, whole')
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    @contextmanager
    def of(cls, url: str) -> Iterator[Health]:
        """Open it, and let it go."""
        database = Database(url)
        try:
            yield cls(database)
        finally:
            database.close()

    def writing(self) -> str:
        """Whether a change could be made; none is.

        Raises:
            StorageError: It could not.
        """
        with self._database.write():
            return "can be read and written"

    def chain(self) -> str:
        """Whether the audit chain is whole, and where it ends.

        Raises:
            CheckpointError: It is not.
        """
        audit = Audit(self._database, time.time)
        count, (seq, hash) = audit.verify(), audit.head()
        return f"{count} events, whole; keep elsewhere what it ends with: {seq} {hash}"

    def tables(self) -> str:
        """Whether the tables are what the audit log says; the chain should be whole.

        Raises:
            CheckpointError: They are not.
        """
        found = differences(self._database)
        first = next(found, None)
        if first is None:
            return "what the audit log says"
        count = 1 + sum(1 for _ in found)
        more = f", the first of {count} differences" if count > 1 else ""
        raise CheckpointError(
            f"{first}{more}. Somebody changed the database past the server: tessera replay lists "
            "all that differs; put a backup from before that back, and keep this one to look into"
        )

    def clock(self) -> str:
        """Whether this machine's clock goes with the database's and the log's.

        Raises:
            CheckpointError: It does not.
        """
        a, said = schema.audit, ""
        with self._database.read() as connection:
            last_s = connection.execute(sa.select(sa.func.max(a.c.time_s))).scalar_one()
            if not self._database.is_sqlite:
                begun_s = time.time()
                asked = sa.text("SELECT extract(epoch FROM clock_timestamp())")
                theirs_s = float(connection.execute(asked).scalar_one())
                apart_s = theirs_s - (begun_s + time.time()) / 2
                said = f"{abs(apart_s):.2f} s from the database's; "
                if abs(apart_s) > _APART_S:
                    raise CheckpointError(
                        f"this machine's clock is {abs(apart_s):.1f} s "
                        f"{'behind' if apart_s > 0 else 'ahead of'} the database's. Set both by "
                        "NTP: timedatectl set-ntp true"
                    )
        ahead_s = (last_s or 0.0) - time.time()
        if ahead_s > _APART_S:
            raise CheckpointError(
                f"the last event is {ahead_s:.0f} s in the future: a clock was wrong, or this one "
                "is. Set it by NTP: timedatectl set-ntp true"
            )
        return f"{said}no event lies in the future"

    def keys(self) -> tuple[bool, str]:
        """Whether the keys are as they should be, and what is said of them.

        Raises:
            InputError: No admin can get in, or others on this machine can read the digests.
        """
        k = schema.keys
        with self._database.read() as connection:
            rows = connection.execute(sa.select(k.c.tenant).where(k.c.revoked_s.is_(None))).all()
        admins = sum(row.tenant is None for row in rows)
        if not admins:
            raise InputError(
                "no admin key is in force. Start tessera serve once: it prints one, or takes the "
                "one in TESSERA_ADMIN_KEY"
            )
        self._check_mode()
        found = f"{admins} of admins, {len(rows) - admins} of tenants in force"
        if admins > _MANY_ADMINS:
            return False, f"{found}; revoke what nobody uses: GET, DELETE /v1/keys"
        return True, found

    def _check_mode(self) -> None:
        if self._database.is_sqlite:
            path = Path(self._database.path)
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                raise InputError(
                    f"{path} can be read by others (mode {mode:03o}), and holds the digests of the "
                    f"keys and the tenants' inputs: chmod 600 {path}"
                )
