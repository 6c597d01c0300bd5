"""Deltas in the database and their files; what the methods of `Registry` of the same names do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import sqlalchemy as sa
import torch
from sqlalchemy import Connection

from tessera.arch import Delta
from tessera.errors import (
    BusyError,
    CheckpointError,
    DeltaError,
    MissingDataError,
    StorageError,
    UnknownNameError,
)
from tessera.serve import access, schema
from tessera.serve.blobs import Blobs
from tessera.serve.database import Change
from tessera.serve.ledger import Ledger
from tessera.serve.packing import pack, unpack
from tessera.serve.records import DeltaRecord, Key, content_hash

__all__ = ["Holdings", "require"]

_D = schema.deltas
# Said once: to put a statement together takes as long as to run it, and each attach runs one.
_FILES = (
    sa.select(_D.c.blob, _D.c.base_hash)
    .where(_D.c.hash == sa.bindparam("of"))
    .order_by(_D.c.created_s, _D.c.tenant)
)
_OWN_FILES = _FILES.where(_D.c.tenant == sa.bindparam("tenant"))


def require(connection: Connection, tenant: str, hash: str, base_hash: str) -> None:
    """Raise unless the tenant holds that delta, and for this base.

    Raises:
        UnknownNameError: It holds none of that hash.
        DeltaError: It was made for another base.
    """
    row = _find(connection, tenant, hash)
    if row is None:
        raise _unknown(tenant, hash)
    _require_base(hash, row.base_hash, base_hash)


@final
class Holdings:
    """The deltas that tenants hold.

    Args:
        ledger: The database.
        blobs: Their files.
        base_hash: Of the model that is served.
    """

    def __init__(self, ledger: Ledger, blobs: Blobs, base_hash: str) -> None:
        self._ledger = ledger
        self._blobs = blobs
        self._base_hash = base_hash

    def own(self, delta: Delta) -> Delta:
        """A delta as it is now, if it is one for this base."""
        own = replace(delta.snapshot(), base_hash=delta.base_hash or self._base_hash)
        _require_base("given", own.base_hash, self._base_hash)
        for name, tensor in own.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DeltaError(f"the delta's {name!r} is not finite: NaN or infinity in it")
        return own

    def put(self, tenant: str, delta: Delta, *, parent: str, by: Key) -> DeltaRecord:
        """Keep a delta as it is now."""
        own = self.own(delta)
        hash = own.hash
        if parent:
            content_hash(parent)
        with self._ledger.read() as connection:  # before anything is written
            row = self._check(connection, tenant, hash, parent, by)
        if row is not None and row.base_hash == self._base_hash and self._is_whole(row.blob):
            return _record(row)
        data = pack(own)
        new = {
            "tenant": tenant,
            "hash": hash,
            "blob": self._blobs.put(data),  # its file first: a record must never lead to none
            "kind": own.kind,
            "base_hash": own.base_hash,
            "bytes": len(data),
            "parent": parent,
        }
        with self._ledger.write() as change:
            row = self._check(change.connection, tenant, hash, parent, by)
            if row is not None and row.base_hash == self._base_hash and self._is_whole(row.blob):
                return _record(row)  # another thread was faster, or its file was mended
            return self._write(change, new, row, by)

    def _check(
        self, connection: Connection, tenant: str, hash: str, parent: str, by: Key
    ) -> Any | None:
        """The row where it is held already; raise where it may not be."""
        owner = access.require_tenant(connection, tenant, by)
        row = _find(connection, tenant, hash)
        if row is None:
            d = schema.deltas
            held = sa.select(sa.func.count()).where(d.c.tenant == tenant)
            if connection.execute(held).scalar_one() >= owner.max_deltas:
                raise BusyError(
                    f"{tenant} holds {owner.max_deltas} deltas, and may hold no more; ask for a "
                    "higher max_deltas",
                    retry_after_s=60.0,
                )
            if parent and _find(connection, tenant, parent) is None:
                raise _unknown(tenant, parent)
        return row

    def _write(self, change: Change, new: dict[str, Any], old: Any | None, by: Key) -> DeltaRecord:
        d = schema.deltas
        body = {name: new[name] for name in new.keys() - {"tenant"}}
        if old is None:
            row = {**new, "created_s": float(self._ledger.clock())}
            change.connection.execute(sa.insert(d).values(row))
            self._ledger.note(change, "delta.put", new["tenant"], body, by)
        else:  # its file was lost, or it is said to fit a base that it was not made for
            own = sa.and_(d.c.tenant == new["tenant"], d.c.hash == new["hash"])
            row = {name: new[name] for name in ("blob", "base_hash", "bytes")}
            change.connection.execute(sa.update(d).where(own).values(row))
            self._ledger.note(change, "delta.replaced", new["tenant"], body, by)
        return _record(_find(change.connection, new["tenant"], new["hash"]))

    def _is_whole(self, blob: str) -> bool:
        try:
            self._blobs.get(blob)
        except StorageError:
            raise
        except (MissingDataError, CheckpointError):
            return False
        return True

    def all(self, tenant: str) -> list[DeltaRecord]:
        """What a tenant holds, the oldest first."""
        d = schema.deltas
        wanted = sa.select(d).where(d.c.tenant == tenant).order_by(d.c.created_s, d.c.hash)
        with self._ledger.read() as connection:
            access.find_tenant(connection, tenant)
            return [_record(row) for row in connection.execute(wanted)]

    def get(self, tenant: str, hash: str) -> DeltaRecord:
        """One of a tenant's."""
        content_hash(hash)
        with self._ledger.read() as connection:
            access.find_tenant(connection, tenant)
            row = _find(connection, tenant, hash)
        if row is None:
            raise _unknown(tenant, hash)
        return _record(row)

    def load(self, hash: str, tenant: str | None) -> Delta:
        """The delta of that hash, from its file."""
        own = {"of": content_hash(hash)}
        with self._ledger.read() as connection:
            if tenant is None:
                rows = connection.execute(_FILES, own).all()
            else:
                rows = connection.execute(_OWN_FILES, {**own, "tenant": tenant}).all()
        if not rows:
            raise _unknown(tenant, hash)
        # Any of them computes the same: that is what the hash says.
        row = next((r for r in rows if r.base_hash == self._base_hash), rows[0])
        _require_base(hash, row.base_hash, self._base_hash)
        delta = unpack(self._blobs.get(row.blob), expect=hash)
        _require_base(hash, delta.base_hash, self._base_hash)
        return delta


def _find(connection: Connection, tenant: str, hash: str) -> Any | None:
    d = schema.deltas
    wanted = sa.select(d).where(d.c.tenant == tenant, d.c.hash == hash)
    return connection.execute(wanted).one_or_none()


def _record(row: Any) -> DeltaRecord:
    return DeltaRecord(
        hash=row.hash,
        tenant=row.tenant,
        kind=row.kind,
        base_hash=row.base_hash,
        bytes=row.bytes,
        created_s=row.created_s,
        parent=row.parent,
    )


def _unknown(tenant: str | None, hash: str) -> UnknownNameError:
    return UnknownNameError(f"{tenant or 'the registry'} has no delta {hash}")


def _require_base(what: str, made_for: str, served: str) -> None:
    if made_for != served:
        raise DeltaError(
            f"the delta {what} was made for the base {made_for or 'of no known hash'}, and this "
            f"server's is {served or 'of no known hash'}. Fit it to this one; or, where it is "
            "known to fit, send delta.of(model)"
        )
