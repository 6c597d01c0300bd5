"""Tenants and keys in the database; what the methods of `Registry` of the same names do."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from tessera.errors import AccessError, BusyError, ConflictError, InputError, UnknownNameError
from tessera.serve import access, schema
from tessera.serve.database import Change
from tessera.serve.ledger import Ledger
from tessera.serve.picture import as_key
from tessera.serve.records import SYSTEM, Key, Tenant, tenant_name

__all__ = ["create_key", "create_tenant", "first_admin_key", "keys", "revoke_key", "tenants"]

_MOST_KEYS = 100  # in force, of a tenant
_MOST_DELTAS = 10**9
_ID = re.compile("[0-9a-z-]{1,64}")
_GIVEN = "env-"  # begins the id of an admin's key whose secret the operator chose


def create_tenant(ledger: Ledger, name: str, max_deltas: int, by: Key) -> Tenant:
    """Make a namespace."""
    tenant_name(name)
    if type(max_deltas) is not int or not 0 <= max_deltas <= _MOST_DELTAS:
        raise InputError(f"max_deltas is 0 to {_MOST_DELTAS}, got {str(max_deltas)[:40]}")
    t = schema.tenants
    with ledger.write() as change:
        access.require_admin(change.connection, by)
        if change.connection.execute(sa.select(t.c.name).where(t.c.name == name)).first():
            raise ConflictError(f"there is a tenant {name!r} already")
        tenant = Tenant(name=name, created_s=float(ledger.clock()), max_deltas=max_deltas)
        row = {"name": name, "created_s": tenant.created_s, "max_deltas": max_deltas}
        change.connection.execute(sa.insert(t).values(row))
        ledger.note(change, "tenant.created", name, {"max_deltas": max_deltas}, by)
    return tenant


def tenants(ledger: Ledger) -> list[Tenant]:
    """All of them, by name."""
    t = schema.tenants
    with ledger.read() as connection:
        rows = connection.execute(sa.select(t).order_by(t.c.name)).all()
    return [Tenant(name=r.name, created_s=r.created_s, max_deltas=r.max_deltas) for r in rows]


def create_key(
    ledger: Ledger, tenant: str | None, scopes: Collection[str], by: Key
) -> tuple[Key, str]:
    """Make a key and its secret."""
    secret = access.new_secret()
    wanted = access.check_scopes(tenant, scopes)
    t = schema.keys
    with ledger.write() as change:
        if tenant is None:
            access.require_admin(change.connection, by)
        else:
            access.require_tenant(change.connection, tenant, by)
            held = sa.select(sa.func.count()).where(t.c.tenant == tenant, t.c.revoked_s.is_(None))
            if change.connection.execute(held).scalar_one() >= _MOST_KEYS:
                raise BusyError(
                    f"{tenant} has {_MOST_KEYS} keys, and may have no more; revoke one",
                    retry_after_s=60.0,
                )
        key = Key(id=access.new_id(), tenant=tenant, scopes=wanted)
        _add(ledger, change, key, access.digest(secret), by)
    return key, secret


def keys(ledger: Ledger, tenant: str | None) -> list[Key]:
    """The keys in force of a tenant, of the admins where it is None."""
    t = schema.keys
    wanted = sa.select(t).where(t.c.tenant == tenant, t.c.revoked_s.is_(None))
    with ledger.read() as connection:
        if tenant is not None:
            access.find_tenant(connection, tenant)
        return [as_key(row) for row in connection.execute(wanted.order_by(t.c.revision))]


def revoke_key(ledger: Ledger, id: str, by: Key) -> None:
    """Put a key out of force."""
    t = schema.keys
    unknown = UnknownNameError(f"there is no key {str(id)[:80]!r}")
    if not isinstance(id, str) or not _ID.fullmatch(id):  # PostgreSQL keeps no NUL
        raise unknown
    with ledger.write() as change:
        row = change.connection.execute(sa.select(t).where(t.c.id == id)).one_or_none()
        if row is None or (not by.is_admin and row.tenant != by.tenant):
            raise unknown
        if row.tenant is None:
            access.require_admin(change.connection, by)
        else:
            access.require_tenant(change.connection, row.tenant, by)
        if row.revoked_s is not None:
            return
        if row.tenant is None and len(_admins(change.connection)) == 1:
            raise ConflictError(
                f"{id} is the last admin's key; make another first, or nobody gets in"
            )
        _revoke(ledger, change, row, by)


def first_admin_key(ledger: Ledger, secret: str | None) -> str | None:
    """Make sure that there is an admin's key; the secret, where one was made up."""
    if secret is not None:
        _take(ledger, access.given_secret(secret))
        return None
    fresh = access.new_secret()
    with ledger.write() as change:
        if _admins(change.connection):
            return None
        key = Key(id=access.new_id(), tenant=None, scopes=frozenset({"admin"}))
        _add(ledger, change, key, access.digest(fresh), SYSTEM)
    return fresh


def _take(ledger: Ledger, secret: str) -> None:
    """Put the operator's secret in force, and those chosen before it out."""
    own = access.digest(secret)
    t = schema.keys
    with ledger.write() as change:
        row = change.connection.execute(sa.select(t).where(t.c.digest == own.hex())).one_or_none()
        if row is not None and (row.tenant is not None or row.revoked_s is not None):
            raise AccessError(
                f"the admin key that was given is that of the key {row.id}, which "
                + ("was revoked" if row.revoked_s is not None else f"is one of {row.tenant}")
                + ". Choose a new one"
            )
        for old in _admins(change.connection):
            if old.id.startswith(_GIVEN) and old.digest != own.hex():
                _revoke(ledger, change, old, SYSTEM)
        if row is None:
            key = Key(id=_GIVEN + access.new_id(), tenant=None, scopes=frozenset({"admin"}))
            _add(ledger, change, key, own, SYSTEM)


def _admins(connection: Connection) -> list[Any]:
    t = schema.keys
    wanted = sa.select(t).where(t.c.tenant.is_(None), t.c.revoked_s.is_(None))
    return list(connection.execute(wanted).all())


def _add(ledger: Ledger, change: Change, key: Key, digest: bytes, by: Key) -> None:
    scopes = sorted(key.scopes)
    revision = ledger.note(
        change,
        "key.created",
        key.tenant,
        {"key": key.id, "scopes": scopes, "check": access.check_of(key.id, digest.hex())},
        by,
        keys={digest: key},
    )
    row = {
        "id": key.id,
        "tenant": key.tenant,
        "scopes": " ".join(scopes),
        "digest": digest.hex(),
        "created_s": float(ledger.clock()),
        "revision": revision,
    }
    change.connection.execute(sa.insert(schema.keys).values(row))


def _revoke(ledger: Ledger, change: Change, row: Any, by: Key) -> None:
    t = schema.keys
    revision = ledger.note(
        change,
        "key.revoked",
        row.tenant,
        {"key": row.id},
        by,
        keys={bytes.fromhex(row.digest): None},
    )
    change.connection.execute(
        sa.update(t)
        .where(t.c.id == row.id)
        .values(revoked_s=float(ledger.clock()), revision=revision)
    )
