"""What learning did, as the log has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from tessera.serve import rollout_schema, schema
from tessera.serve.database import Change
from tessera.serve.learning_schema import steps
from tessera.serve.learning_values import AccuracyPoint, LearningStep
from tessera.serve.ledger import Ledger

__all__ = ["accuracy_of", "newest", "note", "steps_of"]

_MOST_POINTS = 1000
_MOST_CHARTED = 20_000  # rows of feedback


def note(
    ledger: Ledger, change: Change, tenant: str, alias: str, kind: str, body: Mapping[str, Any]
) -> LearningStep:
    """Put a step of an alias into the log, in somebody's transaction."""
    event = ledger.audit.record(change, kind, tenant, {**body, "alias": alias})
    row = {"tenant": tenant, "alias": alias, "seq": event.seq}
    change.connection.execute(sa.insert(steps).values(row))
    return _step(event.seq, event.time_s, kind, event.body)


def steps_of(ledger: Ledger, tenant: str, alias: str, limit: int) -> list[LearningStep]:
    """The last steps of an alias, the newest last."""
    a = schema.audit
    wanted = (
        sa.select(a)
        .join(steps, (steps.c.seq == a.c.seq) & (steps.c.tenant == a.c.tenant))
        .where(steps.c.tenant == tenant, steps.c.alias == alias)
        .order_by(steps.c.seq.desc())
        .limit(limit)
    )
    with ledger.read() as connection:
        rows = connection.execute(wanted).all()
    return [_step(row.seq, row.time_s, row.kind, json.loads(row.body)) for row in rows[::-1]]


def accuracy_of(ledger: Ledger, tenant: str, alias: str, points: int) -> list[AccuracyPoint]:
    """See `Learning.accuracy`."""
    t = rollout_schema.feedback
    points = max(1, min(points, _MOST_POINTS))
    last = (
        sa.select(t.c.seq, t.c.outcomes, t.c.received_s)
        .where(t.c.tenant == tenant, t.c.alias == alias)
        .where(t.c.outcomes != "", t.c.arm != "candidate")
        .order_by(t.c.seq.desc())
        .limit(_MOST_CHARTED)
        .subquery()
    ).c
    group = sa.func.ntile(points).over(order_by=last.seq).label("group")
    rows = sa.select(group, last.seq, last.outcomes, last.received_s).subquery().c
    # Counted where they are: a page asks every few seconds, and there may be many.
    wanted = (
        sa.select(
            sa.func.min(rows.seq).label("first"),
            sa.func.max(rows.seq).label("last"),
            sa.func.max(rows.received_s).label("time_s"),
            sa.func.sum(sa.func.length(rows.outcomes)).label("n"),
            sa.func.sum(sa.func.length(sa.func.replace(rows.outcomes, "0", ""))).label("right"),
        )
        .group_by(rows.group)
        .order_by(rows.group)
    )
    with ledger.read() as connection:
        found = connection.execute(wanted).all()
    told = steps_of(ledger, tenant, alias, 1000)
    drifts = [step.body["at"] for step in told if step.kind == "learn.drift"]
    return [
        AccuracyPoint(
            time_s=row.time_s,
            n=int(row.n),
            accuracy=int(row.right) / int(row.n),
            drift=any(row.first <= at <= row.last for at in drifts),
        )
        for row in found
    ]


def newest(ledger: Ledger, tenant: str, alias: str) -> tuple[int, int]:
    """The numbers of an alias's last feedback and last step; 0: there is none."""
    tables = rollout_schema.feedback, steps
    with ledger.read() as connection:
        found = [
            connection.execute(
                sa.select(sa.func.max(t.c.seq)).where(t.c.tenant == tenant, t.c.alias == alias)
            ).scalar()
            for t in tables
        ]
    return int(found[0] or 0), int(found[1] or 0)


def _step(seq: int, time_s: float, kind: str, body: Mapping[str, Any]) -> LearningStep:
    delta = str(body.get("candidate", body.get("delta", "")))
    return LearningStep(
        seq=seq, time_s=time_s, kind=kind, delta=delta, text=_text(kind, body), body=body
    )


def _text(kind: str, body: Mapping[str, Any]) -> str:
    """A step in a line."""
    if kind == "learn.policy":
        policy = body["policy"]
        return "learning ended" if policy is None else f"learns on {policy['on']}"
    if kind == "learn.drift":
        fell = f"{body['before']:.3f} to {body['now']:.3f}"
        return f"accuracy fell from {fell}, by the last {body['width']} outcomes"
    if kind == "learn.fit":
        old = (body.get("rehearsal") or {}).get("rows", 0)
        loss = f"loss {body['first_loss']:.3g} to {body['last_loss']:.3g}"
        return (
            f"fitted to {body['rows']} new and {old} older examples in {body['ms']:.0f} ms, {loss}"
        )
    if kind == "learn.gate":
        arms = body["overall"]
        right = " to ".join("/".join(map(str, arms[a])) for a in ("incumbent", "candidate"))
        if not body["passed"]:
            return f"refused, {right} right: {body['reasons'][0]}"
        moved = body["generation"]
        return f"passed, {right} right; " + (
            "left for a person to promote" if moved is None else f"promoted, generation {moved}"
        )
    return str(body["reason"])
