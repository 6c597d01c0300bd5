"""Experiments in the database, and in memory for the hot path."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, final

import sqlalchemy as sa
from sqlalchemy import Connection

from tessera.errors import ConflictError, InputError, UnknownNameError
from tessera.serve import access, holdings, rollout_schema, schema
from tessera.serve.database import Change
from tessera.serve.ledger import Ledger
from tessera.serve.picture import as_alias
from tessera.serve.records import Alias, Key, alias_name, one_line
from tessera.serve.rollout import BUCKETS, Experiment, check_experiment, checked_share

__all__ = ["Experiments", "alias_in"]

_FIELDS = tuple(Experiment.__dataclass_fields__)


def alias_in(connection: Connection, tenant: str, name: str) -> Alias:
    """The alias, in a transaction.

    Raises:
        UnknownNameError: The tenant has none of that name.
    """
    a = schema.aliases
    wanted = sa.select(a).where(a.c.tenant == tenant, a.c.name == alias_name(name))
    row = connection.execute(wanted).one_or_none()
    if row is None:
        raise UnknownNameError(f"{tenant} has no alias {name!r}")
    return as_alias(row)


@final
class Experiments:
    """The experiments of all tenants, one an alias.

    Args:
        ledger: The database.
        base_hash: Of the model that is served.
    """

    def __init__(self, ledger: Ledger, base_hash: str) -> None:
        self._ledger, self._base_hash = ledger, base_hash
        self._running: Mapping[tuple[str, str], Experiment] = {}
        self._known = -1

    def running(self) -> Mapping[tuple[str, str], Experiment]:
        """(tenant, alias) -> its experiment, from memory; those that were ended by a swap too."""
        return self._running

    def refresh(self) -> None:
        """Look for what other processes began and ended.

        Raises:
            StorageError: The database is away.
        """
        t = rollout_schema.experiments
        with self._ledger.database.alone(), self._ledger.read() as connection:
            revision = connection.execute(sa.select(schema.head.c.revision)).scalar_one()
            if revision == self._known:
                return
            # A database that went back was restored from a backup: nothing we know holds.
            after = self._known if self._known < revision else -1
            found = dict(self._running) if after >= 0 else {}
            for row in connection.execute(sa.select(t).where(t.c.revision > after)):
                found.pop((row.tenant, row.alias), None)
                if row.ended_s is None:
                    found[row.tenant, row.alias] = _experiment(row)
            self._running, self._known = found, revision

    def start(
        self,
        tenant: str,
        alias: str,
        candidate: str,
        *,
        share: float,
        mode: str = "split",
        salt: str = "",
        by: Key,
    ) -> Experiment:
        """Begin an experiment, or change the share or mode of the one with this candidate.

        A change keeps the salt: who had the candidate keeps it as long as the share grows.

        Args:
            tenant: Whose.
            alias: Beside what it points to now.
            candidate: A delta that the tenant holds; "": the base alone.
            share: 0 to 1 of the keys, in steps of 1/10,000.
            mode: "split" or "shadow".
            salt: Deals the keys; "": a new one. The same salt, the same deal.
            by: An admin's, or one that may manage this tenant.

        Raises:
            ConflictError: One with another candidate, or salt, is running.
            InputError: The candidate is what the alias points to already; no such share or mode.
            UnknownNameError: No such tenant, alias or delta.
            DeltaError: The candidate is for another base.
            AccessError: `by` may not.
        """
        parts = checked_share(share)
        check_experiment(alias, candidate, mode, salt)
        with self._ledger.write() as change:
            access.require_tenant(change.connection, tenant, by)
            now = alias_in(change.connection, tenant, alias)
            if candidate:
                holdings.require(change.connection, tenant, candidate, self._base_hash)
            if candidate == now.delta:
                raise InputError(
                    f"the alias {alias!r} points to {candidate or 'the base'} already; there is "
                    "nothing to compare"
                )
            old = self._find(change.connection, tenant, alias)
            if old is not None and not old.holds(now):
                old = None
            if old is not None and (old.candidate != candidate or salt not in ("", old.salt)):
                raise ConflictError(
                    f"the experiment {old.id} with {old.candidate or 'the base'} is running on "
                    f"{alias!r}; end it first"
                )
            id = old.id if old else secrets.token_hex(8)
            new = Experiment(
                id=id,
                tenant=tenant,
                alias=alias,
                generation=now.generation,
                incumbent=now.delta,
                candidate=candidate,
                mode=mode,
                share=parts,
                salt=old.salt if old else salt or id,
                started_s=old.started_s if old else float(self._ledger.clock()),
            )
            self._write(change, new, began=old is None, by=by)
        return new

    def end(self, tenant: str, alias: str, *, by: Key, reason: str = "") -> Experiment:
        """End an experiment: everybody gets what the alias points to.

        Args:
            tenant: Whose.
            alias: Of which alias.
            by: An admin's, or one that may manage this tenant.
            reason: For the log, in a line.

        Raises:
            InputError: The reason can be none.
            UnknownNameError: No such tenant, or no experiment on this alias.
            AccessError: `by` may not.
        """
        t = rollout_schema.experiments
        one_line(reason, "a reason")
        with self._ledger.write() as change:
            access.require_tenant(change.connection, tenant, by)
            old = self._find(change.connection, tenant, alias_name(alias))
            if old is None:
                raise _none(tenant, alias)
            body = {"alias": alias, "experiment": old.id, "reason": reason}
            revision = self._ledger.note(change, "experiment.ended", tenant, body, by)
            change.connection.execute(
                sa.update(t)
                .where(t.c.tenant == tenant, t.c.alias == alias)
                .values(ended_s=float(self._ledger.clock()), revision=revision)
            )
            change.then(lambda: self._show(tenant, alias, None))
        return old

    def get(self, tenant: str, alias: str) -> Experiment:
        """The experiment of an alias, as the database has it.

        Raises:
            UnknownNameError: No such tenant, or no experiment on this alias.
        """
        with self._ledger.read() as connection:
            access.find_tenant(connection, tenant)
            found = self._find(connection, tenant, alias_name(alias))
        if found is None:
            raise _none(tenant, alias)
        return found

    def in_force(self, tenant: str, alias: str) -> Experiment:
        """The experiment of an alias, if it is about the alias as it is.

        Raises:
            UnknownNameError: There is none.
            ConflictError: The alias was moved since it began, which ended it.
        """
        found = self.get(tenant, alias)
        with self._ledger.read() as connection:
            now = alias_in(connection, tenant, alias)
        if not found.holds(now):
            raise ConflictError(
                f"the alias {alias!r} was moved since the experiment {found.id} began, which ended "
                "it; begin another, or name the candidate and send shots"
            )
        return found

    def began(self, tenant: str, alias: str) -> int:
        """The number of the event that began it; 0: there is none."""
        t = rollout_schema.experiments
        wanted = sa.select(t.c.seq).where(t.c.tenant == tenant, t.c.alias == alias)
        with self._ledger.read() as connection:
            return int(connection.execute(wanted).scalar() or 0)

    def _find(self, connection: Connection, tenant: str, alias: str) -> Experiment | None:
        t = rollout_schema.experiments
        wanted = sa.select(t).where(t.c.tenant == tenant, t.c.alias == alias, t.c.ended_s.is_(None))
        row = connection.execute(wanted).one_or_none()
        return None if row is None else _experiment(row)

    def _write(self, change: Change, new: Experiment, *, began: bool, by: Key) -> None:
        t = rollout_schema.experiments
        row: dict[str, Any] = {name: getattr(new, name) for name in _FIELDS}
        body = {k: v for k, v in row.items() if k not in ("tenant", "started_s")}
        body["share"] = new.share / BUCKETS
        kind = "experiment.started" if began else "experiment.changed"
        row["revision"] = self._ledger.note(change, kind, new.tenant, body, by)
        row["ended_s"] = None
        at = (t.c.tenant == new.tenant) & (t.c.alias == new.alias)
        if began:
            row["seq"] = change.seq
            change.connection.execute(sa.delete(t).where(at))
            change.connection.execute(sa.insert(t).values(row))
        else:
            change.connection.execute(sa.update(t).where(at).values(row))
        change.then(lambda: self._show(new.tenant, new.alias, new))

    def _show(self, tenant: str, alias: str, new: Experiment | None) -> None:
        # Replaced as a whole: the hot path reads it without a lock.
        found = {k: v for k, v in self._running.items() if k != (tenant, alias)}
        if new is not None:
            found[tenant, alias] = new
        self._running = found


def _experiment(row: Any) -> Experiment:
    return Experiment(**{name: getattr(row, name) for name in _FIELDS})


def _none(tenant: str, alias: str) -> UnknownNameError:
    return UnknownNameError(f"no experiment is running on the alias {alias!r} of {tenant}")
