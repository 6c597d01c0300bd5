"""Learning from feedback in the database: policies, how far each is, and what was done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import sqlalchemy as sa

from tessera.serve import access
from tessera.serve.blobs import Blobs
from tessera.serve.gates import canonical
from tessera.serve.learning_budgets import Budgets
from tessera.serve.learning_drift import Seen, detector_of
from tessera.serve.learning_examples import Spans, read_spans
from tessera.serve.learning_rounds import Rounds, at_alias, columns_of, policy_of, row_of, seen_in
from tessera.serve.learning_schema import learning
from tessera.serve.learning_steps import accuracy_of, newest, note, steps_of
from tessera.serve.learning_values import (
    AccuracyPoint,
    LearningPolicy,
    LearningState,
    LearningStep,
    Spending,
)
from tessera.serve.ledger import Ledger
from tessera.serve.records import Key
from tessera.serve.rollout_store import alias_in

__all__ = ["Learning"]

_TOLD = 20  # steps in a state
_LEASE_S = 120.0  # a round says more often than this that it is alive


@final
class Learning:
    """The learning of all tenants.

    Args:
        ledger: The database.
        lease_s: How long a round's turn lasts where nothing is heard of it.

    Attributes:
        budgets: What the rounds of a tenant may take.
        rounds: What is due, and what comes of it.
    """

    def __init__(self, ledger: Ledger, *, lease_s: float = _LEASE_S) -> None:
        self._ledger = ledger
        self.budgets = Budgets(ledger, lease_s)
        self.rounds = Rounds(ledger, self.budgets)

    # --- policies --------------------------------------------------------------------------------

    def set(self, policy: LearningPolicy, *, by: Key) -> LearningPolicy:
        """Let an alias learn, or otherwise than so far; what was seen of its feedback stays.

        Raises:
            UnknownNameError: No such tenant or alias.
            AccessError: `by` may not.
        """
        policy = LearningPolicy.parse(policy.tenant, policy.alias, policy.json())
        text = canonical(policy.json()).decode()
        with self._ledger.write() as change:
            connection = change.connection
            access.require_tenant(connection, policy.tenant, by)
            alias_in(connection, policy.tenant, policy.alias)
            at = at_alias(policy.tenant, policy.alias)
            done = connection.execute(sa.update(learning).where(at).values(policy=text, skipped=""))
            if not done.rowcount:
                row: dict[str, Any] = columns_of(Seen())
                row |= {"tenant": policy.tenant, "alias": policy.alias, "policy": text}
                row |= {"last_s": self.budgets.now_s(connection), "skipped": ""}
                connection.execute(sa.insert(learning).values(row))
            body = {"policy": policy.json(), "by": by.id}
            note(self._ledger, change, policy.tenant, policy.alias, "learn.policy", body)
        return policy

    def policy(self, tenant: str, alias: str) -> LearningPolicy:
        """That of an alias.

        Raises:
            UnknownNameError: It has none; no such tenant.
        """
        with self._ledger.read() as connection:
            access.find_tenant(connection, tenant)
            return policy_of(row_of(connection, tenant, alias))

    def policies(self, tenant: str | None = None) -> list[LearningPolicy]:
        """All that are in force, or a tenant's."""
        wanted = sa.select(learning).order_by(learning.c.tenant, learning.c.alias)
        if tenant is not None:
            wanted = wanted.where(learning.c.tenant == tenant)
        with self._ledger.read() as connection:
            return [policy_of(row) for row in connection.execute(wanted)]

    def end(self, tenant: str, alias: str, *, by: Key) -> None:
        """Let an alias learn no more; a round under way ends without moving it.

        Raises:
            UnknownNameError: It does not learn; no such tenant.
            AccessError: `by` may not.
        """
        with self._ledger.write() as change:
            access.require_tenant(change.connection, tenant, by)
            row_of(change.connection, tenant, alias)
            change.connection.execute(sa.delete(learning).where(at_alias(tenant, alias)))
            note(self._ledger, change, tenant, alias, "learn.policy", {"policy": None, "by": by.id})

    def spans(
        self, blobs: Blobs, policy: LearningPolicy, seen: Seen, padding: Mapping[str, int]
    ) -> Spans:
        """The examples of a round: see `read_spans`."""
        return read_spans(self._ledger, blobs, policy, seen, padding)

    # --- what there is to see --------------------------------------------------------------------

    def spending(self, tenant: str) -> Spending:
        """A tenant's budget, and what was spent of it.

        Raises:
            UnknownNameError: No such tenant.
        """
        return self.budgets.get(tenant)[0]

    def steps(self, tenant: str, alias: str, limit: int = 100) -> list[LearningStep]:
        """The last steps of an alias, the newest last."""
        return steps_of(self._ledger, tenant, alias, limit)

    def accuracy(self, tenant: str, alias: str, points: int) -> list[AccuracyPoint]:
        """The outcomes of the newest feedback on an alias's own answers, oldest first.

        Args:
            tenant: Whose.
            alias: Which.
            points: So many groups of equally many rows of feedback, at most.
        """
        return accuracy_of(self._ledger, tenant, alias, points)

    def newest(self, tenant: str, alias: str) -> tuple[int, int]:
        """Of an alias's last feedback and last step, the numbers in the log: 0, there is none.

        `accuracy` is what it was as long as these are.
        """
        return newest(self._ledger, tenant, alias)

    def state(self, tenant: str, alias: str) -> LearningState:
        """How far an alias is.

        Raises:
            UnknownNameError: It does not learn; no such tenant.
        """
        spending, busy = self.budgets.get(tenant)
        with self._ledger.read() as connection:
            row = row_of(connection, tenant, alias)
        detector = detector_of(seen_in(row))
        return LearningState(
            policy=policy_of(row),
            fresh=row.fresh,
            changed=row.changed,
            due=row.due,
            mean=detector.mean,
            width=detector.width,
            busy=busy,
            last_s=row.last_s,
            spending=spending,
            steps=self.steps(tenant, alias, _TOLD),
        )
