"""Feedback: what became of an answer, kept beside the answer it belongs to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import sqlalchemy as sa
from sqlalchemy import Connection

from tessera.errors import ConflictError, InputError, UnknownNameError
from tessera.serve import access, rollout_schema, schema
from tessera.serve.gates import canonical
from tessera.serve.ledger import Ledger
from tessera.serve.records import Event, Key
from tessera.serve.rollout_values import Feedback, slice_value

__all__ = ["Journal", "Said"]

_MOST_ROWS = 4096
_MOST_SLICES = 16
_MOST_SAID = 64 << 10


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Said:
    """Feedback as it was sent, checked: at least one of label, correct and metric.

    Attributes:
        request: The id of the request it is about.
        label: The right class, or that of each row of the request.
        correct: Whether the answer was right, or of each row.
        metric: Any measure of it.
        slices: Feature -> value.

    Example:
        >>> Said.parse({"request": "r-1", "correct": True}).outcomes()
        '1'
    """

    request: str
    label: tuple[int, ...] = ()
    correct: tuple[bool, ...] = ()
    metric: float | None = None
    slices: Mapping[str, str]

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> Said:
        """Read feedback.

        Raises:
            InputError: It is none.
        """
        request = said.get("request")
        if (
            not isinstance(request, str)
            or not 1 <= len(request) <= 128
            or not (request.isascii() and request.isprintable())
        ):
            raise InputError(f"feedback names the request it is about; got {request!r:.60}")
        label = _each(said.get("label"), int, "label")
        correct = _each(said.get("correct"), bool, "correct")
        metric = said.get("metric")
        if metric is not None and (
            isinstance(metric, bool)
            or not isinstance(metric, int | float)
            or not math.isfinite(metric)
        ):
            raise InputError(f"the metric of feedback is a finite number; got {metric!r:.60}")
        if not label and not correct and metric is None:
            raise InputError("feedback says at least one of label, correct and metric")
        if label and correct:
            raise InputError("feedback says label or correct, not both; they could disagree")
        return cls(
            request=request,
            label=tuple(label),
            correct=tuple(correct),
            metric=None if metric is None else float(metric),
            slices=_slices(said.get("slices") or {}),
        )

    def outcomes(self) -> str:
        """A 1 or 0 a row, where it says so itself."""
        return "".join("01"[c] for c in self.correct)

    def text(self) -> str:
        """Canonical JSON."""
        said = {
            "request": self.request,
            "label": list(self.label),
            "correct": list(self.correct),
            "metric": self.metric,
            "slices": dict(self.slices),
        }
        found = canonical(said).decode()
        if len(found) > _MOST_SAID:
            raise InputError(f"feedback takes up to {_MOST_SAID} bytes, got {len(found)}")
        return found


@final
class Journal:
    """The feedback of all tenants, in the registry's database.

    Args:
        ledger: The database.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def answer(self, tenant: str, request: str) -> Event | None:
        """The event of the answer to a request; where an id was used again, of the last."""
        t, a = rollout_schema.answers, schema.audit
        wanted = (
            sa.select(a)
            .join(t, (t.c.seq == a.c.seq) & (t.c.tenant == a.c.tenant))
            .where(t.c.tenant == tenant, t.c.request == request)
            .order_by(t.c.seq.desc())
            .limit(1)
        )
        with self._ledger.read() as connection:
            row = connection.execute(wanted).one_or_none()
        if row is None:
            return None
        body = json.loads(row.body)
        fields = {**row._mapping, "body": body}
        # The index is not in the chain of hashes; the event is.
        return Event(**fields) if body.get("request") == request else None

    def find(self, tenant: str, said: Said) -> Feedback | None:
        """The same feedback, if it was given before.

        Raises:
            ConflictError: Another was given for this request.
        """
        with self._ledger.read() as connection:
            return _same(connection, tenant, said)

    def add(self, tenant: str, said: Said, outcomes: str, answer: Event, *, by: Key) -> Feedback:
        """Keep feedback; it is on the disk when this returns. The same again is no harm.

        Args:
            tenant: Whose.
            said: What was sent.
            outcomes: A 1 or 0 a row of the request, or "".
            answer: See `answer`.
            by: An admin's, or one of this tenant.

        Raises:
            ConflictError: Another was given for this request.
            UnknownNameError: No such tenant, or it is none of the key's business.
            AccessError: `by` was revoked.
        """
        t, text, body = rollout_schema.feedback, said.text(), answer.body
        with self._ledger.write() as change:
            access.require_tenant(change.connection, tenant, by, scope="infer")
            before = _same(change.connection, tenant, said)
            if before is not None:
                return before
            row = {
                "tenant": tenant,
                "request": said.request,
                "answered": answer.seq,
                "alias": str(body["alias"]),
                "generation": int(body["generation"]),
                "delta": str(body["delta"]),
                "experiment": str(body.get("experiment", "")),
                "arm": str(body.get("arm", "")),
                "outcomes": outcomes,
            }
            noted = {k: v for k, v in row.items() if k != "tenant"} | {"said": text, "by": by.id}
            self._ledger.audit.record(change, "feedback", tenant, noted)
            row |= {
                "seq": change.seq,
                "said": text,
                "received_s": float(self._ledger.clock()),
            }
            change.connection.execute(sa.insert(t).values(row))
            found = _same(change.connection, tenant, said)
        assert found is not None
        return found

    def examples(self, tenant: str, experiment: str) -> list[list[Any]]:
        """The outcomes of an experiment, as `gates` takes them, in the order they came."""
        t = rollout_schema.feedback
        wanted = (
            sa.select(t)
            .where(t.c.tenant == tenant, t.c.experiment == experiment, t.c.outcomes != "")
            .order_by(t.c.seq)
        )
        found: list[list[Any]] = []
        with self._ledger.read() as connection:
            for row in connection.execute(wanted):
                slices = json.loads(row.said)["slices"]
                for at, outcome in enumerate(row.outcomes):
                    id = row.request if len(row.outcomes) == 1 else f"{row.request}#{at}"
                    right = int(outcome)
                    pair = [None, right] if row.arm == "candidate" else [right, None]
                    found.append([id, slices, *pair])
        return found

    def counts(self, tenant: str, experiment: str) -> dict[str, list[int]]:
        """Arm -> [right, all], of an experiment's feedback."""
        t = rollout_schema.feedback
        right = sa.func.sum(sa.func.length(sa.func.replace(t.c.outcomes, "0", "")))
        wanted = (
            sa.select(t.c.arm, right, sa.func.sum(sa.func.length(t.c.outcomes)))
            .where(t.c.tenant == tenant, t.c.experiment == experiment)
            .group_by(t.c.arm)
        )
        found = {"incumbent": [0, 0], "candidate": [0, 0]}
        with self._ledger.read() as connection:
            for arm, k, n in connection.execute(wanted):
                found[arm] = [int(k or 0), int(n or 0)]
        return found

    def live(self, tenant: str, alias: str, generation: int, delta: str) -> str:
        """The outcomes of a delta's answers at one generation of an alias, in order."""
        t = rollout_schema.feedback
        wanted = (
            sa.select(t.c.outcomes)
            .where(
                t.c.tenant == tenant,
                t.c.alias == alias,
                t.c.generation == generation,
                t.c.delta == delta,
            )
            .order_by(t.c.seq)
        )
        with self._ledger.read() as connection:
            return "".join(connection.execute(wanted).scalars())


def _same(connection: Connection, tenant: str, said: Said) -> Feedback | None:
    t = rollout_schema.feedback
    wanted = sa.select(t).where(t.c.tenant == tenant, t.c.request == said.request)
    row = connection.execute(wanted).one_or_none()
    if row is None:
        return None
    if row.said != said.text():
        raise ConflictError(
            f"other feedback was given for the request {said.request}: {row.said:.200}; it stands"
        )
    names = [f for f in Feedback.__dataclass_fields__ if f != "slices"]
    return Feedback(
        **{name: getattr(row, name) for name in names}, slices=json.loads(row.said)["slices"]
    )


def no_answer(tenant: str, request: str) -> UnknownNameError:
    """That there is no answer to give feedback on."""
    return UnknownNameError(
        f"the log has no answer of {tenant}'s to a request {request!r}. Its id is in the answer's "
        "X-Request-Id; a server that keeps nothing (--keep nothing) takes no feedback"
    )


def _each(value: object, kind: type, what: str) -> Sequence[Any]:
    """A value, or one of each row, as a list."""
    if value is None:
        return []
    values: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    if not 1 <= len(values) <= _MOST_ROWS or not all(type(v) is kind for v in values):
        raise InputError(
            f"the {what} of feedback is {kind.__name__}, or 1 to {_MOST_ROWS} of them, one a row "
            f"of the request; got {value!r:.80}"
        )
    if kind is int and not all(0 <= v < 1 << 31 for v in values):
        raise InputError(f"a label is the number of a class, from 0; got {value!r:.80}")
    return values


def _slices(said: object) -> dict[str, str]:
    if not isinstance(said, Mapping) or len(said) > _MOST_SLICES:
        raise InputError(f"slices are up to {_MOST_SLICES} features and their values")
    return {name: slice_value(name, value) for name, value in said.items()}
