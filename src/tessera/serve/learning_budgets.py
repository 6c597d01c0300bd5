"""What a tenant's background fits may take in a window of time, and whose turn a round is."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, final

import sqlalchemy as sa
from sqlalchemy import Connection

from tessera.errors import InputError
from tessera.serve import access
from tessera.serve.database import Change
from tessera.serve.learning_schema import budgets
from tessera.serve.learning_values import Spending, is_amount
from tessera.serve.ledger import Ledger
from tessera.serve.records import Key

__all__ = ["DEFAULT_CAPS", "Budgets", "Turn"]

# Where no admin has said another.
DEFAULT_CAPS: dict[str, Any] = {"cap_ms": 600_000.0, "cap_joules": None, "window_s": 86_400.0}
_LONGEST_S = 366 * 86_400.0


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """A round's turn, and what was set aside for it.

    Attributes:
        tenant: Whose round it is.
        holder: Of the turn; nobody else has this name.
        ms: Milliseconds.
        joules: Energy; None: no cap.
        aside: How many joules were set aside: none, where the tenant has no cap of them.
    """

    tenant: str
    holder: str
    ms: float
    joules: float | None
    aside: float


@final
class Budgets:
    """The budgets of all tenants, and the turns: one round of a tenant at a time.

    A turn is a lease by the database's clock, so that processes on several machines agree, and one
    that dies holds up nobody for longer than that. What a round may take is set aside before it
    begins; a process that dies in between has spent it.

    Args:
        ledger: The database.
        lease_s: How long a turn lasts without being prolonged.
    """

    def __init__(self, ledger: Ledger, lease_s: float) -> None:
        self._ledger, self._lease_s = ledger, lease_s

    def now_s(self, connection: Connection) -> float:
        """Seconds since 1970, by the clock that all processes on this database share."""
        if self._ledger.database.is_sqlite:  # they are on one machine
            return float(self._ledger.clock())
        wanted = sa.select(sa.extract("epoch", sa.func.clock_timestamp()))
        return float(connection.execute(wanted).scalar_one())

    def get(self, tenant: str) -> tuple[Spending, bool]:
        """A tenant's budget, and whether it is a round's turn.

        Raises:
            UnknownNameError: No such tenant.
        """
        with self._ledger.read() as connection:
            access.find_tenant(connection, tenant)
            row, now = self._row(connection, tenant), self.now_s(connection)
        return _spending(tenant, row), self._is_held(row, now)

    def set(
        self, tenant: str, *, ms: float, joules: float | None, window_s: float, by: Key
    ) -> Spending:
        """Set a tenant's budget; what was spent in this window stays spent.

        Args:
            tenant: Whose.
            ms: Milliseconds of fits in a window, > 0.
            joules: The same in energy; None: no cap.
            window_s: How long a window is, 1 s to a year.
            by: An admin's.

        Raises:
            InputError: A number is out of range.
            UnknownNameError: No such tenant.
            AccessError: `by` is no admin's.
        """
        if not is_amount(ms):
            raise InputError(f"ms is a number > 0, got {ms!r:.40}")
        if joules is not None and not is_amount(joules):
            raise InputError(f"joules is a number > 0, or null for no cap; got {joules!r:.40}")
        if not is_amount(window_s) or not 1 <= window_s <= _LONGEST_S:
            raise InputError(f"window_s is 1 to {_LONGEST_S:.0f} seconds, got {window_s!r:.40}")
        caps = {"cap_ms": float(ms), "cap_joules": joules, "window_s": float(window_s)}
        with self._ledger.write() as change:
            access.require_admin(change.connection, by)
            access.find_tenant(change.connection, tenant)
            row = self._row(change.connection, tenant) | caps
            self._write(change.connection, tenant, row)
            body = {"ms": ms, "joules": joules, "window_s": window_s, "by": by.id}
            self._ledger.audit.record(change, "learn.budget", tenant, body)
        return _spending(tenant, row)

    # --- in a change -----------------------------------------------------------------------------

    def take(
        self, change: Change, tenant: str, *, ms: float, joules: float | None
    ) -> Turn | Spending | None:
        """Take the turn and set aside what a round wants, as far as it is there.

        Returns:
            The turn; None: another round has it; the `Spending`: nothing is left of the budget.
        """
        row = self._row(change.connection, tenant)
        now = self.now_s(change.connection)
        if self._is_held(row, now):
            return None
        spent = _spending(tenant, row)
        left = spent.left_joules
        # A fit that is told of less than a millisecond takes no step.
        if spent.left_ms < 1 or (left is not None and left <= 0):
            return spent
        caps = [cap for cap in (joules, left) if cap is not None]
        turn = Turn(
            tenant=tenant,
            holder=secrets.token_hex(16),
            ms=min(ms, spent.left_ms),
            joules=min(caps, default=None),
            aside=0.0 if left is None else min(caps),
        )
        row |= {"holder": turn.holder, "until_s": now + self._lease_s}
        row |= {"ms": row["ms"] + turn.ms, "joules": row["joules"] + turn.aside}
        self._write(change.connection, tenant, row)
        return turn

    def keep(self, change: Change, turn: Turn) -> bool:
        """Prolong a turn; False: it was lost."""
        row = self._row(change.connection, turn.tenant)
        if row["holder"] != turn.holder:
            return False
        row["until_s"] = self.now_s(change.connection) + self._lease_s
        self._write(change.connection, turn.tenant, row)
        return True

    def give_back(self, change: Change, turn: Turn, spent: tuple[float, float]) -> bool:
        """End a turn, and charge what it took in place of what was set aside; False: it was lost.

        Args:
            change: The transaction.
            turn: Which.
            spent: Milliseconds and joules.
        """
        row = self._row(change.connection, turn.tenant)
        row["ms"] = max(0.0, row["ms"] - turn.ms + spent[0])
        row["joules"] = max(0.0, row["joules"] - turn.aside + spent[1])
        held = bool(row["holder"] == turn.holder)
        if held:
            row |= {"holder": "", "until_s": 0.0}
        self._write(change.connection, turn.tenant, row)
        return held

    # ---------------------------------------------------------------------------------------------

    def _is_held(self, row: dict[str, Any], now: float) -> bool:
        # More than a whole lease is left only where the clock was put back: that holds up nobody.
        return bool(row["holder"]) and 0 < row["until_s"] - now <= self._lease_s

    def _row(self, connection: Connection, tenant: str) -> dict[str, Any]:
        """The budget as it is now: a window that is over has begun anew."""
        found = connection.execute(
            sa.select(budgets).where(budgets.c.tenant == tenant)
        ).one_or_none()
        now = self.now_s(connection)
        if found is None:
            nothing = {"ms": 0.0, "joules": 0.0, "since_s": now, "holder": "", "until_s": 0.0}
            return {"tenant": tenant, **DEFAULT_CAPS, **nothing}
        row = dict(found._asdict())
        if now - row["since_s"] >= row["window_s"]:
            row |= {"ms": 0.0, "joules": 0.0, "since_s": now}
        row["since_s"] = min(row["since_s"], now)  # a clock that was put back makes none longer
        return row

    def _write(self, connection: Connection, tenant: str, row: dict[str, Any]) -> None:
        done = connection.execute(
            sa.update(budgets).where(budgets.c.tenant == tenant).values(row)
        ).rowcount
        if not done:
            connection.execute(sa.insert(budgets).values(row))


def _spending(tenant: str, row: dict[str, Any]) -> Spending:
    return Spending(
        tenant=tenant,
        ms=row["ms"],
        joules=row["joules"],
        cap_ms=row["cap_ms"],
        cap_joules=row["cap_joules"],
        window_s=row["window_s"],
        since_s=row["since_s"],
    )
