"""Aliases in the database; what the methods of `Registry` of the same names do."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from tessera.errors import BusyError, ConflictError, InputError, UnknownNameError
from tessera.serve import access, holdings, schema
from tessera.serve.database import Change
from tessera.serve.ledger import Ledger
from tessera.serve.picture import as_alias
from tessera.serve.records import Alias, Key, alias_name, content_hash, one_line

__all__ = ["alias", "aliases", "history", "rollback", "set_alias"]

_MOST_ALIASES = 1000  # of a tenant


def set_alias(ledger: Ledger, wanted: Alias, *, base_hash: str, by: Key) -> Alias:
    """Point an alias to a delta; `wanted.generation` is the one that was read."""
    alias_name(wanted.name)
    one_line(wanted.reason, "a reason")
    if type(wanted.generation) is not int or wanted.generation < 0:
        raise InputError(
            "generation= is the number that was read, 0 for a new alias; got "
            f"{str(wanted.generation)[:40]!r}"
        )
    if wanted.delta != "":
        content_hash(wanted.delta)
    with ledger.write() as change:
        access.require_tenant(change.connection, wanted.tenant, by)
        now = _find(change.connection, wanted.tenant, wanted.name)
        _require_generation(now, wanted.name, wanted.generation)
        if now is None:
            _require_room(change.connection, wanted.tenant)
        if wanted.delta:
            holdings.require(change.connection, wanted.tenant, wanted.delta, base_hash)
        return _point(ledger, change, wanted, before=now, restored=0, by=by)


def rollback(
    ledger: Ledger,
    tenant: str,
    name: str,
    *,
    generation: int | None,
    base_hash: str,
    by: Key,
    reason: str = "",
) -> Alias:
    """Point an alias to what it pointed to before."""
    alias_name(name)
    one_line(reason, "a reason")
    h = schema.alias_history
    with ledger.write() as change:
        access.require_tenant(change.connection, tenant, by)
        now = _find(change.connection, tenant, name)
        if now is None:
            raise _unknown(tenant, name)
        if generation is not None:
            _require_generation(now, name, generation)
        own = sa.select(h).where(h.c.tenant == tenant, h.c.name == name)

        def source(number: int) -> int:
            """The generation that first pointed there: a way back is no version of its own."""
            row = change.connection.execute(own.where(h.c.generation == number)).one()
            return int(row.restored or number)

        shown = source(now.generation)
        if shown == 1:
            raise ConflictError(
                f"the alias {name!r} of {tenant} is at the first it ever pointed to; there is "
                "nothing before"
            )
        target = source(shown - 1)
        old = change.connection.execute(own.where(h.c.generation == target)).one()
        if old.delta:
            holdings.require(change.connection, tenant, old.delta, base_hash)
        wanted = Alias(
            tenant=tenant,
            name=name,
            generation=now.generation,
            delta=old.delta,
            changed_s=0.0,
            reason=f"rollback to generation {target}" + (reason and f": {reason}"),
        )
        return _point(ledger, change, wanted, before=now, restored=target, by=by)


def aliases(ledger: Ledger, tenant: str) -> list[Alias]:
    """Those of a tenant, by name."""
    a = schema.aliases
    with ledger.read() as connection:
        access.find_tenant(connection, tenant)
        rows = connection.execute(sa.select(a).where(a.c.tenant == tenant).order_by(a.c.name))
        return [as_alias(row) for row in rows]


def alias(ledger: Ledger, tenant: str, name: str) -> Alias:
    """One of a tenant's."""
    alias_name(name)
    with ledger.read() as connection:
        access.find_tenant(connection, tenant)
        found = _find(connection, tenant, name)
    if found is None:
        raise _unknown(tenant, name)
    return found


def history(ledger: Ledger, tenant: str, name: str) -> list[Alias]:
    """All its generations, the oldest first."""
    alias_name(name)
    h = schema.alias_history
    wanted = sa.select(h).where(h.c.tenant == tenant, h.c.name == name).order_by(h.c.generation)
    with ledger.read() as connection:
        access.find_tenant(connection, tenant)
        found = [as_alias(row) for row in connection.execute(wanted)]
    if not found:
        raise _unknown(tenant, name)
    return found


def _point(
    ledger: Ledger, change: Change, wanted: Alias, *, before: Alias | None, restored: int, by: Key
) -> Alias:
    """One generation on: the alias, its history, its event."""
    a, h = schema.aliases, schema.alias_history
    new = Alias(
        tenant=wanted.tenant,
        name=wanted.name,
        generation=wanted.generation + 1,
        delta=wanted.delta,
        changed_s=float(ledger.clock()),
        reason=wanted.reason,
    )
    revision = ledger.note(
        change,
        "alias.rolled_back" if restored else "alias.set",
        new.tenant,
        {
            "alias": new.name,
            "generation": new.generation,
            "delta": new.delta,
            "before": before.delta if before else None,
            "reason": new.reason,
            "restored": restored or None,
        },
        by,
        alias=new,
    )
    row = {
        "generation": new.generation,
        "delta": new.delta,
        "changed_s": new.changed_s,
        "reason": new.reason,
    }
    at = {"tenant": new.tenant, "name": new.name}
    if before is None:
        change.connection.execute(sa.insert(a).values({**at, **row, "revision": revision}))
    else:
        change.connection.execute(
            sa.update(a)
            .where(a.c.tenant == new.tenant, a.c.name == new.name)
            .values({**row, "revision": revision})
        )
    change.connection.execute(sa.insert(h).values({**at, **row, "restored": restored}))
    return new


def _find(connection: Connection, tenant: str, name: str) -> Alias | None:
    a = schema.aliases
    wanted = sa.select(a).where(a.c.tenant == tenant, a.c.name == name)
    row = connection.execute(wanted).one_or_none()
    return None if row is None else as_alias(row)


def _require_generation(now: Alias | None, name: str, read: int) -> None:
    if now is None and read:
        raise ConflictError(
            f"there is no alias {name!r} yet, and generation {read} was expected; a new one has 0"
        )
    if now is not None and now.generation != read:
        raise ConflictError(
            f"the alias {name!r} is at generation {now.generation}, delta {now.delta or 'none'} "
            f"({now.reason or 'no reason given'}); {read} was expected. Read it again, then decide"
        )


def _require_room(connection: Connection, tenant: str) -> None:
    a = schema.aliases
    held = sa.select(sa.func.count()).where(a.c.tenant == tenant)
    if connection.execute(held).scalar_one() >= _MOST_ALIASES:
        raise BusyError(
            f"{tenant} has {_MOST_ALIASES} aliases, and may have no more", retry_after_s=60.0
        )


def _unknown(tenant: str, name: str) -> UnknownNameError:
    return UnknownNameError(f"{tenant} has no alias {name!r}")
