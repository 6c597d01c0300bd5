"""Gates in the database, their evidence among the blobs, and what is watched after a promotion."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, final

import sqlalchemy as sa
from sqlalchemy import Connection

from tessera.errors import CheckpointError, ConflictError, InputError, UnknownNameError
from tessera.serve import access, holdings, pointers, rollout_schema, schema
from tessera.serve.blobs import Blobs
from tessera.serve.gates import canonical, decide, decision_hash, is_regression, recompute
from tessera.serve.ledger import Ledger
from tessera.serve.records import SYSTEM, Alias, Key, alias_name, content_hash
from tessera.serve.rollout_store import alias_in
from tessera.serve.rollout_values import Gate, Watch

__all__ = ["Gates"]


@final
class Gates:
    """The gates of all tenants.

    Args:
        ledger: The database.
        blobs: Where evidence is kept.
        base_hash: Of the model that is served.
    """

    def __init__(self, ledger: Ledger, blobs: Blobs, base_hash: str) -> None:
        self._ledger, self._blobs, self._base_hash = ledger, blobs, base_hash
        self._looked: dict[tuple[str, str, int], int] = {}

    def prepare(self, tenant: str, name: str, candidate: str, *, by: Key) -> tuple[Alias, int]:
        """The alias as it is, and which look at this pair the next is.

        Raises:
            UnknownNameError: No such tenant, alias or delta.
            InputError: The candidate is in that place already.
            AccessError: `by` may not.
        """
        if candidate:
            content_hash(candidate)
        with self._ledger.read() as connection:
            access.require_tenant(connection, tenant, by)
            alias = alias_in(connection, tenant, name)
            if candidate:
                holdings.require(connection, tenant, candidate, self._base_hash)
            if candidate == alias.delta:
                raise InputError(
                    f"the alias {name!r} points to {candidate or 'the base'} already; a gate "
                    "compares it with another"
                )
            return alias, _looks(connection, alias, candidate) + 1

    def record(self, evidence: Mapping[str, Any], *, watch: Watch | None, by: Key) -> Gate:
        """Decide, and keep the evidence and the decision.

        Args:
            evidence: As `gates.decide` takes it, with tenant, alias, generation, incumbent and
                candidate.
            watch: What to watch for, should the candidate pass and be promoted next.
            by: An admin's, or one that may manage this tenant.

        Raises:
            ConflictError: Another gate on this pair was decided meanwhile, or the alias moved.
            StorageError: It could not be kept.
        """
        blob = canonical(evidence)
        decision = decide(json.loads(blob))
        id = self._blobs.put(blob)
        tenant = str(evidence["tenant"])
        with self._ledger.write() as change:
            access.require_tenant(change.connection, tenant, by)
            now = alias_in(change.connection, tenant, str(evidence["alias"]))
            looks = _looks(change.connection, now, str(evidence["candidate"]))
            moved = (now.generation, now.delta) != (evidence["generation"], evidence["incumbent"])
            if moved or looks + 1 != evidence["look"]:
                raise ConflictError(
                    f"the alias {now.name!r} was moved, or another gate decided, while this "
                    f"one was computed; it is at generation {now.generation}. Try again"
                )
            gate = Gate(
                id=id,
                tenant=tenant,
                alias=now.name,
                generation=now.generation,
                incumbent=now.delta,
                candidate=str(evidence["candidate"]),
                look=int(evidence["look"]),
                passed=decision["passed"],
                decision=decision,
                decided_s=float(self._ledger.clock()),
            )
            kept = watch if gate.passed else None
            self._keep(change.connection, gate, self._note(change, gate, kept, by))
            if kept is not None:
                self._set_watch(change.connection, gate, kept)
        return gate

    def promote(self, gate: Gate, *, by: Key) -> Alias:
        """Point the alias to the candidate, if it is still where the gate found it.

        Raises:
            ConflictError: It is not.
        """
        wanted = Alias(
            tenant=gate.tenant,
            name=gate.alias,
            generation=gate.generation,
            delta=gate.candidate,
            changed_s=0.0,
            reason=f"gate {gate.id}",
        )
        return pointers.set_alias(self._ledger, wanted, base_hash=self._base_hash, by=by)

    def all(self, tenant: str, alias: str) -> list[Gate]:
        """The last 100 of an alias, the newest first.

        Raises:
            UnknownNameError: No such tenant.
        """
        t = rollout_schema.gates
        wanted = sa.select(t).where(t.c.tenant == tenant, t.c.alias == alias_name(alias))
        with self._ledger.read() as connection:
            access.find_tenant(connection, tenant)
            rows = connection.execute(wanted.order_by(t.c.seq.desc()).limit(100))
            return [_gate(row) for row in rows]

    def get(self, tenant: str, alias: str, id: str) -> Gate:
        """One of an alias.

        Raises:
            UnknownNameError: It has none of that id.
        """
        t = rollout_schema.gates
        wanted = sa.select(t).where(
            t.c.tenant == tenant, t.c.alias == alias_name(alias), t.c.id == content_hash(id)
        )
        with self._ledger.read() as connection:
            access.find_tenant(connection, tenant)
            row = connection.execute(wanted).one_or_none()
        if row is None:
            raise UnknownNameError(f"the alias {alias!r} of {tenant} has no gate {id}")
        return _gate(row)

    def evidence(self, gate: Gate) -> dict[str, Any]:
        """What a gate was decided on; every byte is checked, and the decision made again.

        Raises:
            CheckpointError: It is damaged, or gives another decision.
            MissingDataError: It is lost.
        """
        blob = self._blobs.get(gate.id)
        if recompute(blob) != gate.decision:
            raise CheckpointError(
                f"the evidence of the gate {gate.id} gives another decision than was recorded; "
                "the registry was altered: compare it with a backup"
            )
        found: dict[str, Any] = json.loads(blob)
        return found

    # --- after a promotion -----------------------------------------------------------------------

    def watched(self, tenant: str, alias: str) -> tuple[int, str] | None:
        """(generation, delta) that is watched; None: nothing is."""
        row = self._watch(tenant, alias)
        return None if row is None else (int(row.generation), str(row.delta))

    def look(self, tenant: str, alias: str, outcomes: str) -> Alias | None:
        """Look at the live outcomes of what is watched, and roll it back if it regressed.

        The number of outcomes decides which looks there are, not when this is called, so that
        asking more often looks no more often, and a look that a crash took is made up for.

        Args:
            tenant: Whose.
            alias: Which.
            outcomes: Of the watched delta, in the order they came.

        Returns:
            The alias, rolled back; None: it stays.
        """
        row = self._watch(tenant, alias)
        if row is None or len(outcomes) < row.min_n:
            return None
        number = 1 + int(math.log2(len(outcomes) // row.min_n))
        key = (tenant, alias, int(row.generation))
        if self._looked.get(key) == number:
            return None
        n = row.min_n << (number - 1)
        right = outcomes[:n].count("1")
        if not is_regression(
            (row.correct, row.n),
            (right, n),
            margin=row.margin,
            confidence=row.confidence,
            look=number,
        ):
            self._looked[key] = number
            return None
        body = {"alias": alias, "generation": row.generation, "delta": row.delta, "look": number}
        body |= {"gate": row.gate, "before": [row.correct, row.n], "live": [right, n]}
        body |= {"margin": row.margin, "confidence": row.confidence}
        self._ledger.audit.append("watch.regressed", tenant, body)
        try:
            found = pointers.rollback(
                self._ledger,
                tenant,
                alias,
                generation=row.generation,
                base_hash=self._base_hash,
                by=SYSTEM,
            )
        except ConflictError:  # somebody moved it first, or it is the first it ever pointed to
            found = None
        self._looked[key] = number
        return found

    def until_look(self, tenant: str, alias: str, n: int) -> int:
        """How many outcomes have to follow the first `n` before `look` looks again."""
        row = self._watch(tenant, alias)
        if row is None:
            return 0
        least = int(row.min_n)
        return least * (1 << (n // least).bit_length()) - n

    def _watch(self, tenant: str, alias: str) -> Any:
        t, a = rollout_schema.watches, schema.aliases
        # Of an alias that has moved on nothing is watched.
        here = (a.c.tenant == t.c.tenant) & (a.c.name == t.c.alias)
        here &= (a.c.generation == t.c.generation) & (a.c.delta == t.c.delta)
        wanted = sa.select(t).join(a, here).where(t.c.tenant == tenant, t.c.alias == alias)
        with self._ledger.read() as connection:
            return connection.execute(wanted).one_or_none()

    def _set_watch(self, connection: Connection, gate: Gate, watch: Watch) -> None:
        t = rollout_schema.watches
        connection.execute(sa.delete(t).where(t.c.tenant == gate.tenant, t.c.alias == gate.alias))
        correct, n = gate.decision["overall"]["incumbent"]
        row = {
            "tenant": gate.tenant,
            "alias": gate.alias,
            "generation": gate.generation + 1,
            "delta": gate.candidate,
            "gate": gate.id,
            "correct": correct,
            "n": n,
            "min_n": watch.min_n,
            "margin": float(watch.margin),
            "confidence": float(watch.confidence),
        }
        connection.execute(sa.insert(t).values(row))

    def _note(self, change: Any, gate: Gate, watch: Watch | None, by: Key) -> int:
        body = {
            "alias": gate.alias,
            "generation": gate.generation,
            "incumbent": gate.incumbent,
            "candidate": gate.candidate,
            "look": gate.look,
            "evidence": gate.id,
            "outcomes": gate.decision["outcomes"],
            "overall": gate.decision["overall"],
            "reasons": _some(gate.decision["reasons"]),
            "decision": decision_hash(gate.decision),
            "watch": None if watch is None else asdict(watch),
            "by": by.id,
        }
        kind = "gate.passed" if gate.passed else "gate.refused"
        self._ledger.audit.record(change, kind, gate.tenant, body)
        return int(change.seq)

    def _keep(self, connection: Connection, gate: Gate, seq: int) -> None:
        row = {name: getattr(gate, name) for name in Gate.__dataclass_fields__}
        row |= {"seq": seq, "passed": int(gate.passed), "tested": int(gate.decision["tested"])}
        row["decision"] = canonical(gate.decision).decode()
        t = rollout_schema.gates
        # The same look at the same evidence, which was too little to test: the same gate.
        connection.execute(sa.delete(t).where(t.c.tenant == gate.tenant, t.c.id == gate.id))
        connection.execute(sa.insert(t).values(row))


def _looks(connection: Connection, alias: Alias, candidate: str) -> int:
    """How often this pair was tested on this alias; too few examples are no test."""
    t = rollout_schema.gates
    wanted = sa.select(sa.func.count()).where(
        t.c.tenant == alias.tenant,
        t.c.alias == alias.name,
        t.c.incumbent == alias.delta,
        t.c.candidate == candidate,
        t.c.tested == 1,
    )
    return int(connection.execute(wanted).scalar_one())


def _some(reasons: Sequence[str]) -> list[str]:
    return list(reasons[:20])


def _gate(row: Any) -> Gate:
    fields = {name: getattr(row, name) for name in Gate.__dataclass_fields__}
    fields |= {"passed": bool(row.passed), "decision": json.loads(row.decision)}
    return Gate(**fields)
