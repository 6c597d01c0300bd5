"""The files of deltas that tenants and sessions refer to, each byte of which can be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import sqlalchemy as sa

from tessera.errors import CheckpointError, DeltaError, MissingDataError, StorageError
from tessera.serve import schema
from tessera.serve.blobs import Blobs
from tessera.serve.database import Database
from tessera.serve.packing import unpack

__all__ = ["DeltaFile", "delta_files", "problem_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaFile:
    """A file of a delta.

    Attributes:
        what: Whose delta it is, in words.
        hash: Of the delta.
        blob: Of the file.
    """

    what: str
    hash: str
    blob: str


def delta_files(database: Database, tenant: str | None = None) -> list[DeltaFile]:
    """The files that tenants and sessions refer to.

    Args:
        database: Of the registry.
        tenant: Only of this one.

    Raises:
        StorageError: The database is away.

    Example:
        >>> import tempfile
        >>> database = Database(f"sqlite:///{tempfile.mkdtemp()}/r.db")
        >>> delta_files(database)
        []
        >>> database.close()
    """
    d, s = schema.deltas, schema.sessions
    held = sa.select(d.c.tenant, d.c.hash, d.c.blob).order_by(d.c.tenant, d.c.created_s)
    own = sa.select(s.c.tenant, s.c.delta, s.c.blob, s.c.id).where(s.c.blob != "")
    if tenant is not None:
        held, own = held.where(d.c.tenant == tenant), own.where(s.c.tenant == tenant)
    with database.read() as connection:
        found = [
            DeltaFile(what=f"the delta {hash} of {owner}", hash=hash, blob=blob)
            for owner, hash, blob in connection.execute(held)
        ]
        found += [
            DeltaFile(what=f"the delta of the session {id} of {owner}", hash=hash, blob=blob)
            for owner, hash, blob, id in connection.execute(own)
        ]
    return found


def problem_of(file: DeltaFile, blobs: Blobs) -> str:
    """What is wrong with a file, every byte looked at; "": nothing.

    Raises:
        StorageError: The blobs are away.

    Example:
        >>> import tempfile
        >>> lost = DeltaFile(what="a delta", hash="ab" * 32, blob="cd" * 32)
        >>> problem_of(lost, Blobs(tempfile.mkdtemp()))[:27]
        'a delta: there is no blob c'
    """
    try:
        unpack(blobs.get(file.blob), expect=file.hash)
    except StorageError:
        raise
    except (CheckpointError, DeltaError, MissingDataError) as error:
        return f"{file.what}: {error}"
    return ""
