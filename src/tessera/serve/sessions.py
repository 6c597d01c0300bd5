"""Sessions: deltas under a name that ends by itself, on time also after a restart."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import sqlalchemy as sa
from sqlalchemy import Connection

from tessera.arch import Delta
from tessera.errors import BusyError, InputError, UnknownNameError
from tessera.serve import access, holdings, schema
from tessera.serve.blobs import Blobs
from tessera.serve.ledger import Ledger
from tessera.serve.packing import pack, unpack
from tessera.serve.records import SYSTEM, Alias, Key, Session, content_hash
from tessera.serve.resolve import SESSION

__all__ = ["Sessions", "Ticks", "machine_ticks", "session_length"]

_MOST = 100  # of a tenant at a time
_LONGEST_S = 86_400.0
_KEPT_S = 3600.0  # how long one that has ended is kept where the log does not need it
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ticks:
    """A clock that never jumps, and which one it is.

    Attributes:
        now: Seconds since some moment, sleep included where the machine counts it.
        boot: Equal where two clocks count from the same moment: processes of one machine between
            two of its starts.
    """

    now: Callable[[], float]
    boot: str


def machine_ticks() -> Ticks:
    """The machine's time since its start; where it has no name (not Linux), the process's own.

    Example:
        >>> ticks = machine_ticks()
        >>> ticks.now() <= ticks.now(), len(ticks.boot) > 20
        (True, True)
    """
    try:
        boot = _BOOT.read_text(encoding="ascii").strip()[:64]
        clock = time.CLOCK_BOOTTIME
        time.clock_gettime(clock)
    except (OSError, AttributeError, UnicodeDecodeError):
        return Ticks(now=time.monotonic, boot=secrets.token_hex(16))
    return Ticks(now=lambda: time.clock_gettime(clock), boot=boot)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Live:
    session: Session
    alias: Alias
    ends: float  # by our ticks


@final
class Sessions:
    """The sessions of all tenants: in the database, and in memory for the hot path.

    How long one lasts is counted by a clock that does not jump (`Ticks`), so that setting the
    machine's clock neither prolongs nor ends it. A process that starts anew on the same boot of the
    machine goes on with the same count. After a new start of the machine, or on another one, what
    counts is the time of day at which it was to end, and never more than its full length.

    A session's own delta is kept apart from those the tenant holds: nothing but the session leads
    to it, so that it goes with the session.

    Args:
        ledger: The database.
        deltas: Those that tenants hold.
        blobs: Where the sessions' own are kept.
        base_hash: Of the model that is served.
        ticks: Counts how long they last.

    Attributes:
        after_end: Called with the hash of a session's own delta once it has ended.
        keep: Whether ended ones stay in the database, so that the log can compute answers again.
    """

    def __init__(
        self,
        ledger: Ledger,
        deltas: holdings.Holdings,
        blobs: Blobs,
        base_hash: str,
        *,
        ticks: Ticks,
    ) -> None:
        self._ledger, self._deltas, self._blobs = ledger, deltas, blobs
        self._base_hash = base_hash
        self._ticks = ticks
        self._live: dict[str, _Live] = {}  # by name
        self._known = -1
        self._sweeping = threading.Lock()
        self._purge_s = -math.inf
        self.after_end: Callable[[str], None] = lambda hash: None
        self.keep = True

    # --- the hot path ----------------------------------------------------------------------------

    def find(self, tenant: str, name: str) -> Alias | None:
        """The session as an alias; None: this tenant has none of that name, or it is over."""
        live = self._live.get(name)
        if live is None or live.session.tenant != tenant or self._ticks.now() >= live.ends:
            return None
        return live.alias

    # --- starting and ending ---------------------------------------------------------------------

    def start(
        self,
        tenant: str,
        delta: Delta | str,
        *,
        ttl_s: float,
        by: Key,
        about: Mapping[str, Any] | None = None,
    ) -> Session:
        """Begin a session.

        Args:
            tenant: Whose.
            delta: The session's own; or the hash of one that the tenant holds.
            ttl_s: How long, 1 to 86,400 s.
            by: An admin's, or one that may manage this tenant.
            about: For the log, plain JSON.

        Raises:
            InputError: `ttl_s` is out of range, or the hash is none.
            DeltaError: The delta is for another base, or not finite.
            UnknownNameError: No such tenant, or it is none of the key's business; no such delta.
            AccessError: `by` may not.
            BusyError: The tenant has 100 sessions; the error says when the next one ends.
        """
        length = session_length(ttl_s)
        own, blob = None, ""
        self.require_room(tenant, by=by)
        if isinstance(delta, Delta):
            own = self._deltas.own(delta)
            blob = self._blobs.put(pack(own))
        hash = content_hash(delta) if own is None else own.hash
        id = secrets.token_hex(16)
        with self._ledger.write() as change:
            access.require_tenant(change.connection, tenant, by)
            self._require_room(change.connection, tenant)
            if own is None:
                holdings.require(change.connection, tenant, hash, self._base_hash)
            now = float(self._ledger.clock())
            row: dict[str, Any] = {
                "id": id,
                "tenant": tenant,
                "delta": hash,
                "blob": blob,
                "ttl_s": length,
                "boot": self._ticks.boot,
                "ends_s": self._ticks.now() + length,
                "expires_s": now + length,
            }
            body = {"session": id} | {n: v for n, v in row.items() if n not in ("id", "tenant")}
            revision = self._ledger.note(
                change, "session.start", tenant, {**body, **(about or {})}, by
            )
            change.connection.execute(
                sa.insert(schema.sessions).values({**row, "revision": revision})
            )
            live = _live(row, ends=float(row["ends_s"]), started_s=now)
            change.then(lambda: self._live.update({live.session.name: live}))
        return live.session

    def require_room(self, tenant: str, *, by: Key) -> None:
        """Raise unless a session could begin.

        Raises:
            UnknownNameError: As `start`; so AccessError and BusyError.
        """
        self.sweep()
        with self._ledger.read() as connection:
            access.require_tenant(connection, tenant, by)
            self._require_room(connection, tenant)

    def end(self, tenant: str, id: str, *, by: Key) -> None:
        """End a session before its time.

        Raises:
            UnknownNameError: The tenant has none of that id; no such tenant.
            AccessError: `by` may not.
        """
        with self._ledger.read() as connection:
            access.require_tenant(connection, tenant, by)
        if self.find(tenant, SESSION + id) is None or not self._finish(id, "asked", by):
            raise _unknown(tenant, id)

    def get(self, tenant: str, id: str) -> Session:
        """One of a tenant's that is not over.

        Raises:
            UnknownNameError: It has none of that id.
        """
        live = self._live.get(SESSION + id)
        if live is None or self.find(tenant, SESSION + id) is None:
            raise _unknown(tenant, id)
        return live.session

    def delta(self, tenant: str, id: str) -> Delta:
        """What one of a tenant's computes with, from its file or the tenant's.

        Raises:
            UnknownNameError: It has none of that id, or it is over.
            MissingDataError: Its file is lost.
            CheckpointError: Its file is damaged.
        """
        hash = self.get(tenant, id).delta
        with self._ledger.read() as connection:
            wanted = sa.select(schema.sessions.c.blob).where(schema.sessions.c.id == id)
            blob = connection.execute(wanted).scalar()
        if blob:
            return unpack(self._blobs.get(blob), expect=hash)
        return self._deltas.load(hash, tenant)

    def all(self, tenant: str) -> list[Session]:
        """Those of a tenant that are not over, the one that ends first at the front."""
        now = self._ticks.now()
        found = [s for s in list(self._live.values()) if s.session.tenant == tenant]
        return [s.session for s in sorted(found, key=lambda s: s.ends) if now < s.ends]

    # --- what is done now and then ---------------------------------------------------------------

    def sweep(self) -> int:
        """End those that are over; how many.

        Raises:
            StorageError: The database is away; they answer no more all the same.
        """
        with self._sweeping:
            now = self._ticks.now()
            over = [s for s in list(self._live.values()) if now >= s.ends]
            for live in over:
                self._finish(live.session.id, "expired", SYSTEM)
            if not self.keep and now >= self._purge_s:
                self._purge_s = now + _KEPT_S
                self._purge()
            return len(over)

    def refresh(self) -> None:
        """Look for what other processes began and ended.

        Raises:
            StorageError: The database is away.
        """
        t = schema.sessions
        with self._ledger.database.alone(), self._ledger.read() as connection:
            revision = connection.execute(sa.select(schema.head.c.revision)).scalar_one()
            if revision == self._known:
                return
            # A database that went back was restored from a backup: nothing we know holds.
            after = self._known if self._known < revision else -1
            if after < 0:
                self._live.clear()
            for row in connection.execute(sa.select(t).where(t.c.revision > after)):
                name = SESSION + row.id
                if row.ended_s is not None:
                    self._live.pop(name, None)
                elif name not in self._live:
                    fields = dict(row._asdict())
                    began = row.expires_s - row.ttl_s
                    self._live[name] = _live(fields, ends=self._ends(row), started_s=began)
            self._known = revision

    def load(self, hash: str) -> Delta:
        """A session's own delta, of one that has ended too where it was kept.

        Raises:
            UnknownNameError: No session has one of that hash.
            MissingDataError: Its file is lost.
            CheckpointError: Its file is damaged.
        """
        t = schema.sessions
        wanted = sa.select(t.c.blob).where(t.c.delta == hash, t.c.blob != "").limit(1)
        with self._ledger.read() as connection:
            blob = connection.execute(wanted).scalar()
        if blob is None:
            raise UnknownNameError(f"the registry has no delta {hash}")
        return unpack(self._blobs.get(blob), expect=hash)

    def _ends(self, row: Any) -> float:
        """When a session is over by our ticks."""
        if row.boot == self._ticks.boot:
            return float(row.ends_s)
        left = row.expires_s - float(self._ledger.clock())
        return self._ticks.now() + float(min(max(left, 0.0), row.ttl_s))

    def _finish(self, id: str, why: str, by: Key) -> bool:
        """Mark one as ended, unless that was done; whether it was us."""
        t = schema.sessions
        with self._ledger.write() as change:
            wanted = sa.select(t).where(t.c.id == id, t.c.ended_s.is_(None))
            row = change.connection.execute(wanted).one_or_none()
            change.then(lambda: self._live.pop(SESSION + id, None) and None)
            if row is None:
                return False
            body = {"session": id, "delta": row.delta, "why": why}
            revision = self._ledger.note(change, "session.end", row.tenant, body, by)
            change.connection.execute(
                sa.update(t)
                .where(t.c.id == id)
                .values(ended_s=float(self._ledger.clock()), revision=revision)
            )
        if row.blob:
            self.after_end(row.delta)
        return True

    def _purge(self) -> None:
        """Forget those that ended a while ago; all processes have noticed by now."""
        t = schema.sessions
        before = float(self._ledger.clock()) - _KEPT_S
        with self._ledger.write() as change:
            change.connection.execute(sa.delete(t).where(t.c.ended_s < before))

    def _require_room(self, connection: Connection, tenant: str) -> None:
        t = schema.sessions
        held = sa.select(sa.func.count()).where(t.c.tenant == tenant, t.c.ended_s.is_(None))
        if connection.execute(held).scalar_one() >= _MOST:
            ends = [s.ends for s in list(self._live.values()) if s.session.tenant == tenant]
            wait = min(ends, default=0.0) - self._ticks.now()
            raise BusyError(
                f"{tenant} has {_MOST} sessions, and may have no more; end one",
                retry_after_s=max(1.0, wait),
            )


def session_length(ttl_s: object) -> float:
    """The value, if a session may last so many seconds.

    Raises:
        InputError: It may not.

    Example:
        >>> session_length(60)
        60.0
    """
    if not isinstance(ttl_s, bool) and isinstance(ttl_s, int | float) and 1 <= ttl_s <= _LONGEST_S:
        return float(ttl_s)
    raise InputError(
        f"ttl_s, how long a session lasts, is 1 to {_LONGEST_S:.0f} seconds; got {ttl_s!r:.40}"
    )


def _live(row: Mapping[str, Any], *, ends: float, started_s: float) -> _Live:
    name = SESSION + row["id"]
    session = Session(
        id=row["id"],
        name=name,
        tenant=row["tenant"],
        delta=row["delta"],
        expires_s=row["expires_s"],
    )
    alias = Alias(
        tenant=row["tenant"],
        name=name,
        generation=1,
        delta=row["delta"],
        changed_s=started_s,
        reason="session",
    )
    return _Live(session=session, alias=alias, ends=ends)


def _unknown(tenant: str, id: str) -> UnknownNameError:
    return UnknownNameError(f"{tenant} has no session {id[:64]!r}, or it has ended")
