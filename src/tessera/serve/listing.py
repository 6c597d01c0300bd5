"""What the registry holds, a page at a time: however much it is, a page costs the same."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, final

import sqlalchemy as sa

from tessera.errors import CheckpointError
from tessera.serve import access, schema
from tessera.serve.ledger import Ledger
from tessera.serve.picture import as_alias
from tessera.serve.records import Alias, DeltaRecord, Event, Tenant, alias_name

__all__ = ["Listing", "LogPage"]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogPage:
    """Some events.

    Attributes:
        events: The newest first.
        first: Number of the oldest event that was looked at; 0: there are none.
        last: Of the newest.
        more: Whether there are older ones than `first`.
    """

    events: tuple[Event, ...]
    first: int
    last: int
    more: bool


@final
class Listing:
    """Reads tenants, deltas, histories and events in pages.

    Args:
        ledger: The database.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def totals(self) -> tuple[int, int]:
        """How many tenants there are, and how many deltas they hold together."""
        counts = [
            sa.select(sa.func.count()).select_from(t) for t in (schema.tenants, schema.deltas)
        ]
        with self._ledger.read() as connection:
            tenants, deltas = (int(connection.execute(c).scalar_one()) for c in counts)
        return tenants, deltas

    def tenants(self, *, after: str = "", part: str = "", limit: int) -> list[Tenant]:
        """Tenants by name.

        Args:
            after: Those whose name comes after this one.
            part: Those whose name has this in it.
            limit: So many at most.
        """
        t = schema.tenants
        wanted = sa.select(t).where(t.c.name > after).order_by(t.c.name).limit(limit)
        if part:
            wanted = wanted.where(t.c.name.contains(part, autoescape=True))
        with self._ledger.read() as connection:
            rows = connection.execute(wanted).all()
        return [Tenant(name=r.name, created_s=r.created_s, max_deltas=r.max_deltas) for r in rows]

    def held(self, tenants: Collection[str]) -> dict[str, int]:
        """How many deltas each of these tenants holds."""
        d = schema.deltas
        wanted = sa.select(d.c.tenant, sa.func.count()).where(d.c.tenant.in_(tenants))
        with self._ledger.read() as connection:
            rows = connection.execute(wanted.group_by(d.c.tenant)).all()
        return dict.fromkeys(tenants, 0) | {name: int(n) for name, n in rows}

    def deltas(self, tenant: str, *, skip: int = 0, limit: int) -> list[DeltaRecord]:
        """What a tenant holds, the newest first.

        Raises:
            UnknownNameError: No such tenant.
        """
        d = schema.deltas
        wanted = sa.select(d).where(d.c.tenant == tenant).offset(skip).limit(limit)
        with self._ledger.read() as connection:
            access.find_tenant(connection, tenant)
            rows = connection.execute(wanted.order_by(d.c.created_s.desc(), d.c.hash.desc())).all()
        return [_delta(row) for row in rows]

    def kinds(self, tenant: str, hashes: Collection[str]) -> dict[str, str]:
        """The kinds of those of these deltas that a tenant holds."""
        d = schema.deltas
        wanted = sa.select(d.c.hash, d.c.kind).where(d.c.tenant == tenant, d.c.hash.in_(hashes))
        with self._ledger.read() as connection:
            return {hash: str(kind) for hash, kind in connection.execute(wanted)}

    def aliases(self, tenant: str, *, after: str = "", limit: int) -> tuple[list[Alias], int]:
        """(aliases by name, how many there are in all)."""
        a = schema.aliases
        own = a.c.tenant == tenant
        wanted = sa.select(a).where(own, a.c.name > after).order_by(a.c.name).limit(limit)
        with self._ledger.read() as connection:
            access.find_tenant(connection, tenant)
            rows = connection.execute(wanted).all()
            count = connection.execute(sa.select(sa.func.count()).where(own)).scalar_one()
        return [as_alias(row) for row in rows], int(count)

    def pointing(self, tenant: str, hashes: Collection[str], *, limit: int) -> list[Alias]:
        """The aliases of a tenant that point to one of these deltas, by name."""
        a = schema.aliases
        wanted = sa.select(a).where(a.c.tenant == tenant, a.c.delta.in_(hashes))
        with self._ledger.read() as connection:
            rows = connection.execute(wanted.order_by(a.c.name).limit(limit)).all()
        return [as_alias(row) for row in rows]

    def history(
        self, tenant: str, alias: str, *, before: int | None = None, limit: int
    ) -> list[Alias]:
        """The generations of an alias, the newest first.

        Args:
            tenant: Whose.
            alias: Which.
            before: Only generations below this one; None: from the last.
            limit: So many at most.
        """
        h = schema.alias_history
        wanted = sa.select(h).where(h.c.tenant == tenant, h.c.name == alias_name(alias))
        if before is not None:
            wanted = wanted.where(h.c.generation < before)
        with self._ledger.read() as connection:
            rows = connection.execute(wanted.order_by(h.c.generation.desc()).limit(limit)).all()
        return [as_alias(row) for row in rows]

    def before(self, tenant: str, alias: str) -> Alias | None:
        """The generation a rollback would go back to; None: there is nothing before."""
        h = schema.alias_history
        own = (h.c.tenant == tenant) & (h.c.name == alias_name(alias))
        last = sa.select(h).where(own).order_by(h.c.generation.desc()).limit(1)
        with self._ledger.read() as connection:

            def source(row: Any) -> Any:
                """The generation that first pointed there: a way back is no version of its own."""
                if not row.restored:
                    return row
                wanted = sa.select(h).where(own, h.c.generation == row.restored)
                return connection.execute(wanted).one()

            now = connection.execute(last).one_or_none()
            shown = source(now) if now else None
            if shown is None or shown.generation == 1:
                return None
            older = sa.select(h).where(own, h.c.generation == shown.generation - 1)
            return as_alias(source(connection.execute(older).one()))

    def events(
        self,
        *,
        before: int | None = None,
        tenant: str = "",
        alias: str = "",
        kind: str = "",
        but: Collection[str] = (),
        limit: int = 50,
        most: int = 200_000,
    ) -> LogPage:
        """Events of the log, the newest first.

        Args:
            before: Only those with a lower number; None: from the end.
            tenant: Only this tenant's.
            alias: Only those about an alias of this name.
            kind: Only these: "gate.passed", or all whose first part it is, "gate".
            but: Kinds that are left out.
            limit: How many to find.
            most: How many to look at: a page costs no more than that, however long the log is.

        Raises:
            CheckpointError: An event cannot be read.
        """
        t = schema.audit
        with self._ledger.read() as connection:
            end = int(connection.execute(sa.select(schema.head.c.seq)).scalar_one())
            last = end if before is None else max(0, min(end, before - 1))
            lowest = max(0, last - most)
            wanted = sa.select(t).where(t.c.seq > lowest, t.c.seq <= last)
            if tenant:
                wanted = wanted.where(t.c.tenant == tenant)
            if kind:
                family = t.c.kind.startswith(f"{kind}.", autoescape=True)
                wanted = wanted.where((t.c.kind == kind) | family)
            if but:
                wanted = wanted.where(t.c.kind.not_in(but))
            if alias:
                # The body is canonical JSON, so that this is in each that is about the alias.
                said = f'"alias":{json.dumps(alias)}'
                wanted = wanted.where(t.c.body.contains(said, autoescape=True))
            rows = connection.execute(wanted.order_by(t.c.seq.desc()).limit(limit)).all()
        events = [_event(row._asdict()) for row in rows]
        first = rows[-1].seq if len(rows) == limit else min(lowest + 1, last)
        return LogPage(
            events=tuple(e for e in events if not alias or e.body.get("alias") == alias),
            first=int(first),
            last=last,
            more=first > 1,
        )


def _delta(row: Any) -> DeltaRecord:
    return DeltaRecord(**{name: getattr(row, name) for name in DeltaRecord.__dataclass_fields__})


def _event(row: Mapping[str, Any]) -> Event:
    try:
        return Event(**{**row, "body": json.loads(row["body"])})
    except ValueError as error:  # what should be JSON is not
        raise CheckpointError(
            f"the event {row['seq']} of the audit log cannot be read: the log was altered; compare "
            "it with a backup"
        ) from error
