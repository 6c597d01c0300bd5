"""What every part of the registry writes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, final

from sqlalchemy import Connection

from tessera.serve.audit import Audit
from tessera.serve.database import Change, Database
from tessera.serve.picture import Picture
from tessera.serve.records import Alias, Key

__all__ = ["Ledger"]


@final
class Ledger:
    """A database, its audit chain, the picture of it, and a clock."""

    __slots__ = ("audit", "clock", "database", "picture")

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self.database = Database(url)
        self.clock = clock
        self.audit = Audit(self.database, clock)
        self.picture = Picture()

    def read(self) -> AbstractContextManager[Connection]:
        """See `Database.read`."""
        return self.database.read()

    def write(self) -> AbstractContextManager[Change]:
        """See `Database.write`."""
        return self.database.write()

    def note(
        self,
        change: Change,
        kind: str,
        tenant: str | None,
        body: Mapping[str, Any],
        by: Key,
        *,
        keys: Mapping[bytes, Key | None] | None = None,
        alias: Alias | None = None,
    ) -> int:
        """Finish a change of the state: its event, its revision and, once committed, the picture.

        Returns:
            The revision, with which the changed rows are marked.
        """
        self.audit.record(change, kind, tenant, {**body, "by": by.id})
        revision = change.move()
        change.then(lambda: self.picture.put(revision, keys=keys, alias=alias))
        return revision

    def refresh(self) -> None:
        """Bring the picture up to what the database holds."""
        with self.database.alone(), self.database.read() as connection:
            self.picture.read(connection)
