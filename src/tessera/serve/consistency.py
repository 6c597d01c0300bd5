"""The tables against the audit log: a row that was changed behind the log's back is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import sqlalchemy as sa
from sqlalchemy import Connection

from tessera.serve import learning_schema, rollout_schema, schema
from tessera.serve.access import check_of
from tessera.serve.audit import place_of
from tessera.serve.database import Database
from tessera.serve.gates import canonical
from tessera.serve.learning_budgets import DEFAULT_CAPS
from tessera.serve.records import Event
from tessera.serve.rollout import BUCKETS

__all__ = ["differences"]

_PAGE = 1000
# A row and its event each looked at the clock, one right after the other.
_NEAR_S = 60.0
_CLOCKED = {"created_s", "revoked_s", "changed_s", "started_s", "ended_s", "received_s"}
_CLOCKED |= {"decided_s"}

_Columns = dict[str, Any]


def differences(database: Database) -> Iterator[str]:
    """What the tables say and the log does not: of a registry that nobody touched, nothing.

    The events are folded into the rows they must have left, all in one moment's picture, so that
    servers may go on meanwhile. Times are compared to within a minute. What is not in the log is
    not compared: revisions, how far the learning of an alias has read, what it has spent.

    Args:
        database: Its chain should be whole: see `Audit.verify`.

    Yields:
        A line for each difference, which names the event.

    Raises:
        StorageError: The database is away.

    Example:
        >>> import tempfile
        >>> from tessera.serve.blobs import Blobs
        >>> from tessera.serve.registry import Registry
        >>> place = tempfile.mkdtemp()
        >>> registry = Registry(f"sqlite:///{place}/r.db", Blobs(f"{place}/blobs"), base_hash="")
        >>> admin = registry.authenticate(registry.first_admin_key(None))
        >>> _ = registry.create_tenant("acme", by=admin)
        >>> registry.close()
        >>> database = Database(f"sqlite:///{place}/r.db")
        >>> list(differences(database))
        []
        >>> with database.write() as change:
        ...     _ = change.connection.execute(sa.update(schema.tenants).values(max_deltas=7))
        >>> list(differences(database))
        ['the tenant acme has max_deltas 7, the log says 1000 (event 2)']
        >>> database.close()
    """
    with database.read() as connection:
        log = _Log()
        answers = _Beside(connection, rollout_schema.answers, "the answer to {request}")
        feedback = _Beside(connection, rollout_schema.feedback, "the feedback on {request}")
        steps = _Beside(connection, learning_schema.steps, "a step in the learning of {alias}")
        for event in _events(connection, {*_FOLDS, *_STEPS, "feedback", "request"}):
            if event.kind in _FOLDS:
                _FOLDS[event.kind](log, event)
            if event.kind in _STEPS:
                yield from steps.take(event, {"alias": event.body["alias"]})
            elif event.kind == "feedback":
                row = _some(event.body, *_FEEDBACK) | {"received_s": event.time_s}
                yield from feedback.take(event, row)
            elif (place := place_of(event)) is not None:
                yield from answers.take(event, place)
        for each in (answers, feedback, steps):
            yield from each.end()
        for name in _TABLES:
            yield from _table(connection, name, log.rows[name])


# --- what the log says ---------------------------------------------------------------------------


@final
class _Log:
    """Table -> key -> (event, columns): the rows that the events so far must have left."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[tuple[Any, ...], tuple[int, _Columns]]] = {n: {} for n in _TABLES}

    def put(self, table: str, key: tuple[Any, ...], event: Event, row: _Columns) -> None:
        self.rows[table][key] = (event.seq, row)

    def change(self, table: str, key: tuple[Any, ...], event: Event, row: _Columns) -> None:
        _, old = self.rows[table].get(key, (0, {}))
        self.put(table, key, event, old | row)


def _tenant(log: _Log, event: Event) -> None:
    row = {"max_deltas": event.body["max_deltas"], "created_s": event.time_s}
    log.put("tenants", (event.tenant,), event, row)
    log.put("budgets", (event.tenant,), event, dict(DEFAULT_CAPS))


def _key(log: _Log, event: Event) -> None:
    body = event.body
    row: _Columns = {
        "tenant": event.tenant or None,
        "scopes": " ".join(body["scopes"]),
        "revoked_s": None,
    }
    row |= {"created_s": event.time_s} | _some(body, "check")
    log.put("keys", (body["key"],), event, row)


def _revoked(log: _Log, event: Event) -> None:
    log.change("keys", (event.body["key"],), event, {"revoked_s": event.time_s})


def _delta(log: _Log, event: Event) -> None:
    row = _some(event.body, "blob", "kind", "base_hash", "bytes", "parent")
    key = (event.tenant, event.body["hash"])
    log.put("deltas", key, event, row | {"created_s": event.time_s})


def _replaced(log: _Log, event: Event) -> None:
    row = _some(event.body, "blob", "base_hash", "bytes")
    log.change("deltas", (event.tenant, event.body["hash"]), event, row)


def _alias(log: _Log, event: Event) -> None:
    body, key = event.body, (event.tenant, event.body["alias"])
    row = _some(body, "delta", "reason") | {"changed_s": event.time_s}
    log.put("aliases", key, event, row | {"generation": body["generation"]})
    once = row | {"restored": body["restored"] or 0}
    log.put("alias_history", (*key, body["generation"]), event, once)


def _session(log: _Log, event: Event) -> None:
    row = _some(event.body, "delta", "blob", "ttl_s", "boot", "ends_s", "expires_s")
    row |= {"tenant": event.tenant, "ended_s": None}
    log.put("sessions", (event.body["session"],), event, row)


def _ended(log: _Log, event: Event) -> None:
    log.change("sessions", (event.body["session"],), event, {"ended_s": event.time_s})


def _experiment(log: _Log, event: Event) -> None:
    body = event.body
    row = _some(body, "id", "generation", "incumbent", "candidate", "mode", "salt")
    row |= {"share": round(body["share"] * BUCKETS), "ended_s": None}
    if event.kind == "experiment.started":
        row |= {"seq": event.seq, "started_s": event.time_s}
    log.change("experiments", (event.tenant, body["alias"]), event, row)


def _experiment_ended(log: _Log, event: Event) -> None:
    key = (event.tenant, event.body["alias"])
    log.change("experiments", key, event, {"ended_s": event.time_s})


def _gate(log: _Log, event: Event) -> None:
    body, passed = event.body, event.kind == "gate.passed"
    row = _some(body, "alias", "generation", "incumbent", "candidate", "look", "decision")
    row |= {"seq": event.seq, "passed": int(passed), "decided_s": event.time_s}
    log.put("gates", (event.tenant, body["evidence"]), event, row)
    if watch := body.get("watch"):
        correct, n = body["overall"]["incumbent"]
        seen = {"generation": body["generation"] + 1, "delta": body["candidate"]}
        seen |= {"gate": body["evidence"], "correct": correct, "n": n}
        log.put("watches", (event.tenant, body["alias"]), event, seen | watch)


def _policy(log: _Log, event: Event) -> None:
    body, key = event.body, (event.tenant, event.body["alias"])
    if body["policy"] is None:
        log.rows["learning"].pop(key, None)
    else:
        log.put("learning", key, event, {"policy": canonical(body["policy"]).decode()})


def _budget(log: _Log, event: Event) -> None:
    body = event.body
    row = {"cap_ms": body["ms"], "cap_joules": body["joules"], "window_s": body["window_s"]}
    log.put("budgets", (event.tenant,), event, row)


def _some(body: Mapping[str, Any], *names: str) -> _Columns:
    """What an event says of these; an older Tessera's may say less."""
    return {name: body[name] for name in names if name in body}


_FOLDS: Mapping[str, Callable[[_Log, Event], None]] = {
    "tenant.created": _tenant,
    "key.created": _key,
    "key.revoked": _revoked,
    "delta.put": _delta,
    "delta.replaced": _replaced,
    "alias.set": _alias,
    "alias.rolled_back": _alias,
    "session.start": _session,
    "session.end": _ended,
    "experiment.started": _experiment,
    "experiment.changed": _experiment,
    "experiment.ended": _experiment_ended,
    "gate.passed": _gate,
    "gate.refused": _gate,
    "learn.policy": _policy,
    "learn.budget": _budget,
}
_STEPS = {"learn.policy", "learn.drift", "learn.fit", "learn.gate", "learn.skip"}
_FEEDBACK = (
    *("request", "answered", "alias", "generation", "delta", "experiment", "arm"),
    *("outcomes", "said"),
)


# --- what the tables say -------------------------------------------------------------------------

# Name -> table, the columns of its key, and what to call a row.
_TABLES: Mapping[str, tuple[sa.Table, tuple[str, ...], str]] = {
    "tenants": (schema.tenants, ("name",), "the tenant {name}"),
    "keys": (schema.keys, ("id",), "the key {id}"),
    "deltas": (schema.deltas, ("tenant", "hash"), "the delta {hash} of {tenant}"),
    "aliases": (schema.aliases, ("tenant", "name"), "the alias {name} of {tenant}"),
    "alias_history": (
        schema.alias_history,
        ("tenant", "name", "generation"),
        "generation {generation} of the alias {name} of {tenant}",
    ),
    "sessions": (schema.sessions, ("id",), "the session {id}"),
    "experiments": (
        rollout_schema.experiments,
        ("tenant", "alias"),
        "the experiment on {alias} of {tenant}",
    ),
    "gates": (rollout_schema.gates, ("tenant", "id"), "the gate {id} of {tenant}"),
    "watches": (rollout_schema.watches, ("tenant", "alias"), "the watch of {alias} of {tenant}"),
    "learning": (
        learning_schema.learning,
        ("tenant", "alias"),
        "the learning of {alias} of {tenant}",
    ),
    "budgets": (learning_schema.budgets, ("tenant",), "the budget of {tenant}"),
}


def _table(
    connection: Connection, name: str, said: dict[tuple[Any, ...], tuple[int, _Columns]]
) -> Iterator[str]:
    table, keys, words = _TABLES[name]
    for row in _rows(connection, sa.select(table)):
        found = _hashed(name, row)
        told = said.pop(tuple(found[k] for k in keys), None)
        if told is None:
            yield f"{words.format(**found)} is not in the log"
        else:
            yield from _compared(words.format(**found), told[0], told[1], found)
    for key, (seq, row) in said.items():
        # Sessions that have ended are deleted at some time; a budget is written when it is used.
        ended = name == "sessions" and row.get("ended_s") is not None
        if not ended and not (name == "budgets" and row == DEFAULT_CAPS):
            what = words.format(**dict(zip(keys, key, strict=True)))
            yield f"{what} is gone, the log has it (event {seq})"


def _hashed(name: str, row: _Columns) -> _Columns:
    """A row, with hashes of what the log has only hashes of."""
    if name == "keys":
        return row | {"check": check_of(row["id"], row["digest"])}
    if name == "gates":
        return row | {"decision": hashlib.sha256(row["decision"].encode()).hexdigest()}
    return row


def _compared(what: str, seq: int, said: _Columns, found: _Columns) -> Iterator[str]:
    for column, value in said.items():
        other = found[column]
        near = column in _CLOCKED and value is not None and other is not None
        if abs(value - other) > _NEAR_S if near else value != other:
            yield f"{what} has {column} {other!r:.80}, the log says {value!r:.80} (event {seq})"


@final
class _Beside:
    """A table with a row for each event of a kind, walked beside the log: there may be millions."""

    def __init__(self, connection: Connection, table: sa.Table, words: str) -> None:
        self._rows = _rows(connection, sa.select(table).order_by(table.c.seq))
        self._words = f"{words} of {{tenant}}"
        self._row = next(self._rows, None)

    def take(self, event: Event, said: _Columns) -> Iterator[str]:
        yield from self._unknown(event.seq)
        said = said | {"tenant": event.tenant}
        if self._row is None or self._row["seq"] > event.seq:
            yield f"{self._words.format(**said)} is gone, the log has it (event {event.seq})"
            return
        yield from _compared(self._words.format(**said), event.seq, said, self._row)
        self._row = next(self._rows, None)

    def end(self) -> Iterator[str]:
        yield from self._unknown(None)

    def _unknown(self, before: int | None) -> Iterator[str]:
        while self._row is not None and (before is None or self._row["seq"] < before):
            yield f"{self._words.format(**self._row)} is not in the log"
            self._row = next(self._rows, None)


def _events(connection: Connection, kinds: set[str]) -> Iterator[Event]:
    t = schema.audit
    for row in _rows(connection, sa.select(t).where(t.c.kind.in_(kinds)).order_by(t.c.seq)):
        yield Event(**{**row, "body": json.loads(row["body"])})


def _rows(connection: Connection, wanted: sa.Select[Any]) -> Iterator[_Columns]:
    for row in connection.execution_options(yield_per=_PAGE).execute(wanted):
        yield dict(row._mapping)
