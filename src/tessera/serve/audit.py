"""The audit log: events in a chain of hashes, so that a change of any of them shows."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

import sqlalchemy as sa

from tessera.errors import CheckpointError, InputError
from tessera.serve import schema
from tessera.serve.database import Change, Database
from tessera.serve.records import Event, tenant_name
from tessera.serve.rollout_schema import answers

__all__ = ["GENESIS", "Audit", "place_of"]

GENESIS = "0" * 64  # what the first event follows
_KIND = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
_MOST_BODY_BYTES = 1 << 20
_PAGE = 1000

_Entry = tuple[str, str | None, dict[str, Any]]


@final
class Audit:
    """An append-only log in a database, one chain for all processes that share it.

    Event n is hashed with the hash of event n - 1: ``hash = sha256(json([seq, previous, time_s,
    kind, tenant, body]))``, the JSON canonical (sorted keys, no blanks, ASCII). Whoever alters,
    removes or inserts an event has to rewrite all that follow, and the head; against that, keep
    `head()` somewhere else and hand it to `verify`.

    Args:
        database: Where it is kept.
        clock: Seconds since 1970.

    Example:
        >>> import tempfile
        >>> database = Database(f"sqlite:///{tempfile.mkdtemp()}/registry.db")
        >>> audit = Audit(database, clock=lambda: 1.5)
        >>> audit.append("gate.passed", "acme", {"n": 40}).seq
        1
        >>> [event.body for event in audit.read(tenant="acme")], audit.verify()
        ([{'n': 40}], 1)
        >>> database.close()
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self.told: Callable[[Event], None] | None = None  # of each event, once it is written

    def append(self, kind: str, tenant: str | None, body: dict[str, Any]) -> Event:
        """Add one event; it is on the disk when this returns.

        Args:
            kind: 1 to 64 of ``a-z 0-9 . _ -``, a letter first.
            tenant: Whose it is; None or "": the server's own.
            body: Plain values, as JSON has them; up to 1 MiB.

        Raises:
            InputError: It is no such event; nothing was written.
            StorageError: The database is away or full.
        """
        return self.extend([(kind, tenant, body)])[0]

    def extend(self, entries: Iterable[_Entry]) -> list[Event]:
        """Add many in one transaction: all of them or none.

        Raises:
            InputError: One of them is no event; nothing was written.
            StorageError: The database is away or full.
        """
        checked = [_check(*entry) for entry in entries]
        if not checked:
            return []
        with self._database.write() as change:
            return self._add(change, checked)

    def record(self, change: Change, kind: str, tenant: str | None, body: dict[str, Any]) -> Event:
        """Add one in somebody's transaction, so that it is there if and only if the rest is."""
        return self._add(change, [_check(kind, tenant, body)])[0]

    def _add(self, change: Change, checked: Sequence[tuple[str, str, str]]) -> list[Event]:
        time_s = float(self._clock())
        events, rows = [], []
        for kind, tenant, body in checked:
            seq, previous = change.seq + 1, change.hash
            own = _hash(seq, previous, time_s, kind, tenant, body)
            rows.append(
                {
                    "seq": seq,
                    "previous": previous,
                    "hash": own,
                    "time_s": time_s,
                    "kind": kind,
                    "tenant": tenant,
                    "body": body,
                }
            )
            events.append(
                Event(
                    seq=seq,
                    previous=previous,
                    hash=own,
                    time_s=time_s,
                    kind=kind,
                    tenant=tenant,
                    body=json.loads(body),
                )
            )
            change.seq, change.hash = seq, own
        change.connection.execute(sa.insert(schema.audit), rows)
        places = [place_of(event) for event in events]
        if any(places):
            change.connection.execute(sa.insert(answers), [p for p in places if p])
        change.then(lambda: self._tell(events))
        return events

    def _tell(self, events: Sequence[Event]) -> None:
        if self.told is not None:
            for event in events:
                self.told(event)

    def read(
        self,
        *,
        since_s: float | None = None,
        tenant: str | None = None,
        kinds: Iterable[str] | None = None,
        after_seq: int = 0,
    ) -> Iterator[Event]:
        """The events, in order; the hashes are not checked, see `verify`.

        Args:
            since_s: Only those that say they happened at this time or later.
            tenant: Only this tenant's; "": the server's own.
            kinds: Only these.
            after_seq: Only those after this one.

        Raises:
            InputError: No such tenant's name, kind, time or number.
            StorageError: The database is away.
        """
        t = schema.audit
        if type(after_seq) is not int or not 0 <= after_seq < 1 << 63:
            raise InputError(f"after_seq= is the number of an event, got {str(after_seq)[:40]!r}")
        wanted = sa.select(t).order_by(t.c.seq).limit(_PAGE)
        if since_s is not None:
            if not math.isfinite(since_s):
                raise InputError(f"since_s= is in seconds since 1970, got {since_s}")
            wanted = wanted.where(t.c.time_s >= since_s)
        if tenant is not None:
            wanted = wanted.where(t.c.tenant == (tenant and tenant_name(tenant)))
        if kinds is not None:
            wanted = wanted.where(t.c.kind.in_([_check_kind(kind) for kind in kinds]))
        return self._pages(wanted, after_seq)

    def _pages(self, wanted: sa.Select[Any], after_seq: int) -> Iterator[Event]:
        # Page by page: a reader who stops halfway must not keep a transaction open.
        while True:
            with self._database.read() as connection:
                rows = connection.execute(wanted.where(schema.audit.c.seq > after_seq)).all()
            yield from (_event(row) for row in rows)
            if len(rows) < _PAGE:
                return
            after_seq = rows[-1].seq

    def verify(self, expect: tuple[int, str] | None = None) -> int:
        """Hash the whole chain again.

        Args:
            expect: What `head()` said earlier: that event must be in the chain.

        Returns:
            How many events there are.

        Raises:
            CheckpointError: The chain is broken; the message names the first event that does not
                fit.
            StorageError: The database is away.
        """
        t = schema.audit
        seq, previous = 0, GENESIS
        seen = {0: GENESIS}
        with self._database.read() as connection:
            head = connection.execute(sa.select(schema.head)).one()
            rows = connection.execution_options(yield_per=_PAGE).execute(
                sa.select(t).order_by(t.c.seq)
            )
            for row in rows:
                seq += 1
                problem = _problem(row, seq, previous)
                if problem:
                    raise _broken(seq, problem)
                previous = row.hash
                if expect is not None and seq == expect[0]:
                    seen[seq] = previous
        if seq != head.seq or previous != head.hash:
            raise _broken(
                min(seq, head.seq) + 1, f"the chain ends at {seq}, its head says {head.seq}"
            )
        if expect is not None and seen.get(expect[0]) != expect[1]:
            raise _broken(expect[0], "it is not the one that was the head then")
        return seq

    def head(self) -> tuple[int, str]:
        """(seq, hash) of the last event; (0, 64 zeros) if there is none."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(schema.head)).one()
        return row.seq, row.hash


def _hash(seq: int, previous: str, time_s: float, kind: str, tenant: str, body: str) -> str:
    # The canonical JSON of the list, without parsing the body, which is canonical already.
    head = json.dumps([seq, previous, time_s, kind, tenant], separators=(",", ":"))
    return hashlib.sha256(f"{head[:-1]},{body}]".encode()).hexdigest()


def place_of(event: Event) -> dict[str, Any] | None:
    """Where the answer to a request is, to find it by the request's id; None: no answer is told."""
    request = event.body.get("request") if event.kind == "request" and event.tenant else None
    if not isinstance(request, str) or not 0 < len(request) <= 128 or not request.isprintable():
        return None
    return {"tenant": event.tenant, "request": request, "seq": event.seq}


def _problem(row: Any, seq: int, previous: str) -> str | None:
    if row.seq != seq:
        return f"the next in the log is event {row.seq}"
    if row.previous != previous:
        return "it does not follow the one before"
    if row.hash != _hash(seq, previous, row.time_s, row.kind, row.tenant, row.body):
        return "its content is not what was hashed"
    return None


def _broken(seq: int, problem: str) -> CheckpointError:
    return CheckpointError(
        f"the audit chain is broken at event {seq}: {problem}. The log was altered from there on; "
        "compare it with a backup"
    )


def _event(row: Any) -> Event:
    return Event(
        seq=row.seq,
        previous=row.previous,
        hash=row.hash,
        time_s=row.time_s,
        kind=row.kind,
        tenant=row.tenant,
        body=json.loads(row.body),
    )


def _check(kind: str, tenant: str | None, body: dict[str, Any]) -> tuple[str, str, str]:
    """The columns of an event: kind, tenant, body as canonical JSON."""
    _check_kind(kind)
    owner = tenant_name(tenant) if tenant else ""
    if not isinstance(body, dict):
        raise InputError(f"the body of an event is a dict, got {type(body).__name__}")
    try:
        _require_text_keys(body)
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"the body of a {kind} event must be plain values, as JSON has them ({error})"
        ) from error
    if len(text) > _MOST_BODY_BYTES:
        raise InputError(
            f"the body of a {kind} event may take {_MOST_BODY_BYTES} bytes as JSON, got "
            f"{len(text)}; log its hash, and keep the content as a blob"
        )
    return kind, owner, text


def _check_kind(kind: object) -> str:
    if isinstance(kind, str) and _KIND.fullmatch(kind):
        return kind
    raise InputError(
        "the kind of an event is 1 to 64 of a-z, 0-9, '.', '_' and '-', a letter first; got "
        f"{str(kind)[:80]!r}"
    )


def _require_text_keys(value: Any) -> None:
    """Raise where JSON would turn a key that is no text into text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a mapping has the key {key!r}")
            _require_text_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _require_text_keys(inner)
