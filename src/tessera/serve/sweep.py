"""Blobs that nothing refers to: set aside, and deleted a good while later."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import sqlalchemy as sa

from tessera.errors import InputError
from tessera.serve.blobs import Blobs, Stored
from tessera.serve.database import Database

__all__ = ["Swept", "sweep"]

_DAY_S = 86_400.0
_LEAST_S = 3600.0
_PAGE = 1000
_HASH = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Swept:
    """What a sweep found, and did or would do.

    Attributes:
        blobs: There were, set aside or not.
        aside: Were set aside now.
        aside_bytes: That these take.
        restored: Had been set aside, and are referred to.
        deleted: Had been set aside a good while ago, or are the rest of a write that was killed.
        deleted_bytes: That these took.
    """

    blobs: int
    aside: int
    aside_bytes: int
    restored: int
    deleted: int
    deleted_bytes: int


def sweep(
    database: Database,
    blobs: Blobs,
    *,
    grace_s: float = _DAY_S,
    dry: bool = True,
    clock: Callable[[], float] = time.time,
) -> Swept:
    """Set aside the blobs that nothing refers to, and delete those set aside a grace before.

    A blob is referred to where its hash stands in any text of any table, the audit log included.
    It may run beside servers, and be killed at any moment: a blob is written before its record, so
    a young one is left alone; one that is set aside is still found by `Blobs.get`; and it is
    deleted only if, a whole `grace_s` later, there is still no record. A sweep that finds one
    brings the blob back.

    Args:
        database: Of the registry. No other may keep its blobs in this place.
        blobs: The place.
        grace_s: No record is written later than this after its blob; an hour or more.
        dry: Only say what would be done.
        clock: Seconds since 1970, as the clock of the place has them.

    Raises:
        InputError: `grace_s` is too short; or there are blobs here, and the registry refers to none
            of them: it is another's place.
        StorageError: The database or the place is away.

    Example:
        >>> import tempfile
        >>> from tessera.serve.audit import Audit
        >>> folder = tempfile.mkdtemp()
        >>> database, blobs = Database(f"sqlite:///{folder}/registry.db"), Blobs(f"{folder}/blobs")
        >>> _ = Audit(database, time.time).append("kept", None, {"blob": blobs.put(b"needed")})
        >>> _ = blobs.put(b"not needed")
        >>> tomorrow = time.time() + 90_000
        >>> sweep(database, blobs, dry=False, clock=lambda: tomorrow).aside
        1
        >>> database.close()
    """
    if not grace_s >= _LEAST_S:
        raise InputError(f"grace_s is {_LEAST_S:.0f} s or more, got {grace_s}")
    # First the blobs, then the records: what is written meanwhile is not among these blobs.
    found = list(blobs.stored())
    needed = _needed(database, {one.name for one in found if one.name})
    if not needed and any(one.name for one in found):
        raise InputError(
            f"the registry {database.name} refers to none of the blobs in {blobs.place}: they are "
            "another's. Give the --db and --blobs of one server"
        )
    before = clock() - grace_s
    here = {one.name for one in found if not one.aside}
    aside, restored, deleted = list[Stored](), list[Stored](), list[Stored]()
    for one in found:
        if one.aside and one.name in here:
            continue  # put again since; what becomes of it is seen by the one in use
        if one.aside and one.name in needed:
            restored.append(one)
        elif one.written_s < before and (one.aside or not one.name):
            deleted.append(one)
        elif one.written_s < before and one.name not in needed:
            aside.append(one)
    if not dry:
        for one in restored:
            blobs.restore(one.name)
        for one in deleted:
            blobs.delete(one)
        for one in aside:
            blobs.set_aside(one.name)
    return Swept(
        blobs=sum(bool(one.name) for one in found),
        aside=len(aside),
        aside_bytes=sum(one.bytes for one in aside),
        restored=len(restored),
        deleted=len(deleted),
        deleted_bytes=sum(one.bytes for one in deleted),
    )


def _needed(database: Database, names: set[str]) -> set[str]:
    """Those of the names that stand anywhere in the database."""
    needed = set[str]()
    for text in _texts(database):
        needed.update(name for name in _HASH.findall(text) if name in names)
    return needed


def _texts(database: Database) -> Iterator[str]:
    """Every text in every table, whoever made it: a room that keeps blobs need not tell us."""
    tables = sa.MetaData()
    with database.read() as connection:
        tables.reflect(connection)
        for table in tables.sorted_tables:
            texts = [c for c in table.columns if isinstance(c.type, sa.String)]
            if texts:
                rows = connection.execution_options(yield_per=_PAGE).execute(sa.select(*texts))
                for row in rows:
                    yield from (text for text in row if text)
