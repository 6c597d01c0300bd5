"""Whose round is due, and what comes of it: the part of learning that several processes share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import sqlalchemy as sa
from sqlalchemy import Connection

from tessera.errors import BusyError, InputError, UnknownNameError
from tessera.serve import rollout_schema
from tessera.serve.database import Change
from tessera.serve.learning_budgets import Budgets, Turn
from tessera.serve.learning_drift import Seen, after_change, follow, labels_in
from tessera.serve.learning_schema import learning
from tessera.serve.learning_steps import note, steps_of
from tessera.serve.learning_values import LearningPolicy, LearningStep, Spending
from tessera.serve.ledger import Ledger
from tessera.serve.records import Alias, alias_name
from tessera.serve.rollout_store import alias_in

__all__ = ["Rounds", "Task", "at_alias", "columns_of", "policy_of", "row_of", "seen_in"]

_PAGE = 500  # rows of feedback that are looked at in one transaction
_ROUND_MS = 10_000.0  # of a round whose policy does not say
_SEEN = tuple(Seen.__dataclass_fields__)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """A round that was begun, as things stood then.

    Attributes:
        policy: How.
        why: "drift", "schedule" or "asked".
        seen: The feedback it is about.
        alias: The alias, and what it points to.
        turn: What it may take.
    """

    policy: LearningPolicy
    why: str
    seen: Seen
    alias: Alias
    turn: Turn


@final
class Rounds:
    """The rounds of all tenants.

    Args:
        ledger: The database.
        budgets: What they may take.
    """

    def __init__(self, ledger: Ledger, budgets: Budgets) -> None:
        self._ledger, self.budgets = ledger, budgets

    # --- looking, about once a second ------------------------------------------------------------

    def behind(self) -> list[tuple[str, str]]:
        """(tenant, alias) of those with feedback that was not looked at."""
        t = rollout_schema.feedback
        newest = sa.select(sa.func.max(t.c.seq)).where(
            t.c.tenant == learning.c.tenant, t.c.alias == learning.c.alias
        )
        wanted = sa.select(learning.c.tenant, learning.c.alias).where(
            newest.scalar_subquery() > learning.c.at
        )
        with self._ledger.read() as connection:
            return [(row.tenant, row.alias) for row in connection.execute(wanted)]

    def look(self, tenant: str, alias: str) -> bool:
        """Look at the next feedback; whether there may be more.

        What is known is read and written in one transaction, so that however many processes look,
        each row is looked at once and in order.
        """
        t = rollout_schema.feedback
        with self._ledger.write() as change:
            connection = change.connection
            row = connection.execute(
                sa.select(learning).where(at_alias(tenant, alias))
            ).one_or_none()
            if row is None:
                return False
            wanted = sa.select(t).where(t.c.tenant == tenant, t.c.alias == alias, t.c.seq > row.at)
            rows = connection.execute(wanted.order_by(t.c.seq).limit(_PAGE)).all()
            if not rows:
                return False

            def since(generation: int, seq: int, width: int) -> tuple[int, int, str]:
                return _since(connection, (tenant, alias, generation), seq, width)

            seen, drifts = follow(seen_in(row), rows, since, least=policy_of(row).min_new)
            self._write(connection, tenant, alias, columns_of(seen))
            for body in drifts:
                note(self._ledger, change, tenant, alias, "learn.drift", body)
        return len(rows) == _PAGE

    def ready(self) -> list[tuple[str, str, str]]:
        """(tenant, alias, why) of those whose next round is due."""
        t = learning.c
        wanted = sa.select(learning).where(((t.change > 0) & (t.changed >= t.due)) | (t.fresh > 0))
        with self._ledger.read() as connection:
            now = self.budgets.now_s(connection)
            rows = connection.execute(wanted).all()
        return [(row.tenant, row.alias, why) for row in rows if (why := _why(row, now))]

    # --- rounds ----------------------------------------------------------------------------------

    def begin(self, tenant: str, alias: str, why: str) -> Task | None:
        """Take the turn of a round; in one process of all.

        Args:
            tenant: Whose.
            alias: Which.
            why: As `ready` says, or "asked".

        Returns:
            None: it is no longer due, another has the turn, or nothing is left of the budget.

        Raises:
            UnknownNameError: It does not learn.
            BusyError: Of one that was asked for: the same as None.
        """
        with self._ledger.write() as change:
            row = row_of(change.connection, tenant, alias)
            if why != "asked" and _why(row, self.budgets.now_s(change.connection)) != why:
                return None
            policy, at = policy_of(row), alias_in(change.connection, tenant, alias)
            caps = policy.fit.budget
            turn = self.budgets.take(
                change, tenant, ms=caps.get("ms", _ROUND_MS), joules=caps.get("joules")
            )
            if isinstance(turn, Turn):
                return Task(policy=policy, why=why, seen=seen_in(row), alias=at, turn=turn)
            if isinstance(turn, Spending) and why != "asked":
                body = {"reason": _exhausted(turn), "why": why}
                self._skip(change, row, body)
        if why == "asked":
            if turn is None:
                raise BusyError(f"a round of {tenant}'s is under way; one is at a time")
            raise BusyError(_exhausted(turn), retry_after_s=60.0)
        return None

    def keep(self, task: Task) -> bool:
        """Say that a round is alive; False: its turn was lost, or the alias learns no more."""
        with self._ledger.write() as change:
            known = change.connection.execute(
                sa.select(learning.c.alias).where(at_alias(task.alias.tenant, task.alias.name))
            )
            return known.one_or_none() is not None and self.budgets.keep(change, task.turn)

    def fitted(self, task: Task, body: Mapping[str, Any]) -> None:
        """Put a fit into the log."""
        told = {**body, "why": task.why, "from": task.seen.at}
        with self._ledger.write() as change:
            note(self._ledger, change, task.alias.tenant, task.alias.name, "learn.fit", told)

    def drop(self, task: Task, spent: tuple[float, float]) -> None:
        """Give a round up, as if it had not begun; what it spent is spent."""
        with self._ledger.write() as change:
            self.budgets.give_back(change, task.turn, spent)

    def finish(
        self,
        task: Task,
        kind: str,
        body: Mapping[str, Any],
        spent: tuple[float, float],
        *,
        moved: Alias | None = None,
        wait: int = 0,
    ) -> LearningStep:
        """End a round.

        Args:
            task: Which.
            kind: "learn.gate" or "learn.skip".
            body: Of its event.
            spent: Milliseconds and joules.
            moved: The alias, where it was moved.
            wait: Of a round on drift: how many more labelled examples the next one waits for; 0: as
                many as there are, so that trying again gets rarer.
        """
        tenant, alias = task.alias.tenant, task.alias.name
        told = {**body, "why": task.why}
        with self._ledger.write() as change:
            connection = change.connection
            held = self.budgets.give_back(change, task.turn, spent)
            row = connection.execute(
                sa.select(learning).where(at_alias(tenant, alias))
            ).one_or_none()
            step: LearningStep | None
            if kind != "learn.skip" or row is None or task.why == "asked":
                step = note(self._ledger, change, tenant, alias, kind, told)
            else:
                step = self._skip(change, row, told)
            if row is not None and held:
                new: dict[str, Any] = {"last_s": self.budgets.now_s(connection)}
                new["fresh"] = max(0, row.fresh - task.seen.fresh)
                if kind != "learn.skip":
                    new["skipped"] = ""
                if moved is not None:
                    new |= {"generation": moved.generation, "detector": ""}
                    new |= {"change": 0, "changed": 0, "due": 0}
                elif row.change and row.change == task.seen.change:
                    new["due"] = task.seen.changed + (wait or task.seen.changed)
                self._write(connection, tenant, alias, new)
        return step or steps_of(self._ledger, tenant, alias, 1)[-1]

    # ---------------------------------------------------------------------------------------------

    def _skip(self, change: Change, row: Any, body: dict[str, Any]) -> LearningStep | None:
        """Say why a round is not run; None: it was said the last time."""
        if row.skipped == body["reason"]:
            return None
        self._write(change.connection, row.tenant, row.alias, {"skipped": body["reason"]})
        return note(self._ledger, change, row.tenant, row.alias, "learn.skip", body)

    def _write(
        self, connection: Connection, tenant: str, alias: str, new: Mapping[str, Any]
    ) -> None:
        connection.execute(sa.update(learning).where(at_alias(tenant, alias)).values(dict(new)))


def row_of(connection: Connection, tenant: str, alias: str) -> Any:
    """The row of an alias.

    Raises:
        UnknownNameError: It does not learn.
    """
    wanted = sa.select(learning).where(at_alias(tenant, alias_name(alias)))
    row = connection.execute(wanted).one_or_none()
    if row is None:
        raise UnknownNameError(f"the alias {alias!r} of {tenant} does not learn; give it a policy")
    return row


def policy_of(row: Any) -> LearningPolicy:
    """The policy in a row."""
    return LearningPolicy.parse(row.tenant, row.alias, json.loads(row.policy))


def columns_of(seen: Seen) -> dict[str, Any]:
    """What was seen, as columns."""
    return {name: getattr(seen, name) for name in _SEEN}


def seen_in(row: Any) -> Seen:
    """What was seen, in a row."""
    return Seen(**{name: getattr(row, name) for name in _SEEN})


def at_alias(tenant: str, alias: str) -> sa.ColumnElement[bool]:
    """That a row is this alias's."""
    return (learning.c.tenant == tenant) & (learning.c.alias == alias)


def _why(row: Any, now: float) -> str:
    """Why a round is due; "": it is not, or a newer Tessera wrote the policy and knows."""
    try:
        policy = policy_of(row)
    except InputError:
        return ""
    if policy.on != "schedule" and row.change and row.changed >= row.due:
        return "drift"
    # Of a clock that was put back the schedule waits for nothing.
    waited = not 0 <= now - row.last_s < policy.every_s
    if policy.on != "drift" and waited and row.fresh >= policy.min_new:
        return "schedule"
    return ""


def _since(
    connection: Connection, whose: tuple[str, str, int], seq: int, width: int
) -> tuple[int, int, str]:
    """See `learning_drift.follow`."""
    t = rollout_schema.feedback
    tenant, alias, generation = whose
    wanted = (
        sa.select(t.c.seq, t.c.arm, t.c.outcomes, t.c.said, t.c.generation)
        .where(t.c.tenant == tenant, t.c.alias == alias, t.c.seq <= seq, t.c.outcomes != "")
        .order_by(t.c.seq.desc())
        .limit(width + _PAGE)
    )
    rows = connection.execute(wanted).all()  # the newest first
    own = [
        row.outcomes if row.arm != "candidate" and row.generation == generation else ""
        for row in rows
    ]
    window = "".join(reversed(own))[-width:]
    left = after = after_change(window)
    first, labels = seq, 0
    for row, outcomes in zip(rows, own, strict=True):
        if left <= 0:
            break
        first, labels, left = row.seq, labels + labels_in(row), left - len(outcomes)
    return first, labels, window[-after:]


def _exhausted(spent: Spending) -> str:
    if spent.left_ms < 1:
        return f"the budget of {spent.cap_ms:g} ms in {spent.window_s:g} s is spent"
    return f"the budget of {spent.cap_joules:g} joules in {spent.window_s:g} s is spent"
