"""The audit log as the dashboard shows it: the newest first, a page at a time, checked or not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Protocol, final

from tessera.errors import BusyError, CheckpointError
from tessera.serve.records import Event

__all__ = ["Chain", "LogPage", "Logged", "Verdict", "log_page", "pretty", "summary"]

_BLOCK = 1000
_MOST_SUMMARY = 160


class Logged(Protocol):
    """What is asked of an audit log: `Audit`."""

    def read(self, *, after_seq: int = 0) -> Iterator[Event]:
        """The events after one, in order."""

    def head(self) -> tuple[int, str]:
        """The last one's number and hash."""

    def verify(self, expect: tuple[int, str] | None = None) -> int:
        """Hash all of it again."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogPage:
    """Some events.

    Attributes:
        events: The newest first.
        first: Number of the oldest event that was looked at; 0: there are none.
        last: Of the newest.
        more: Whether there are older ones than `first`.
    """

    events: tuple[Event, ...]
    first: int
    last: int
    more: bool


def log_page(
    audit: Logged,
    *,
    before: int | None = None,
    wanted: Callable[[Event], bool] | None = None,
    limit: int = 50,
    most: int = 20_000,
) -> LogPage:
    """Events before one, the newest first.

    Args:
        audit: The log.
        before: Only those with a lower number; None: from the end.
        wanted: Only those.
        limit: How many to find.
        most: How many to look at: a page costs no more than that, however long the log is.

    Raises:
        CheckpointError: An event cannot be read.
        StorageError: The database is away.
    """
    end = audit.head()[0]
    last = end if before is None else max(0, min(end, before - 1))
    found: list[Event] = []
    upto, lowest = last, max(0, last - most)
    while upto > lowest and len(found) < limit:
        after = max(lowest, upto - (_BLOCK if wanted else limit))
        for event in reversed(_between(audit, after, upto)):
            if wanted is None or wanted(event):
                found.append(event)
                if len(found) == limit:
                    after = event.seq - 1
                    break
        upto = after
    return LogPage(events=tuple(found), first=min(upto + 1, last), last=last, more=upto > 0)


def _between(audit: Logged, after: int, upto: int) -> list[Event]:
    events = []
    try:
        for event in audit.read(after_seq=after):
            if event.seq > upto:
                break
            events.append(event)
    except ValueError as error:  # what should be JSON is not
        if isinstance(error, json.JSONDecodeError):
            raise CheckpointError(
                f"an event between {after + 1} and {upto} of the audit log cannot be read: the "
                "log was altered; compare it with a backup"
            ) from error
        raise
    return events


def summary(
    event: Event, leave_out: Collection[str] = ("base_hash", "blob", "boot", "by", "plan")
) -> str:
    """The body of an event in a line.

    Example:
        >>> body = {"alias": "clf", "generation": 3, "delta": "ab" * 32, "by": "k1"}
        >>> summary(Event(seq=1, previous="", hash="", time_s=0.0, kind="k", tenant="", body=body))
        'alias clf, generation 3, delta abababababab…'
    """
    parts = []
    for name, value in event.body.items():
        if name in leave_out or value in (None, "", [], {}):
            continue
        words = value if isinstance(value, str) else json.dumps(value)
        if len(words) == 64 and not set(words) - set("0123456789abcdef"):
            words = words[:12] + "…"
        parts.append(f"{name} {words[:_MOST_SUMMARY]}")
    line = ", ".join(parts)
    return line if len(line) <= _MOST_SUMMARY else line[: _MOST_SUMMARY - 1] + "…"


def pretty(event: Event) -> str:
    """The whole of an event, as JSON to be read.

    Example:
        >>> event = Event(
        ...     seq=1, previous="0", hash="1", time_s=0.0, kind="k", tenant="", body={"n": 1}
        ... )
        >>> '"n": 1' in pretty(event), '"previous": "0"' in pretty(event)
        (True, True)
    """
    whole = {
        "seq": event.seq,
        "kind": event.kind,
        "tenant": event.tenant,
        "time_s": event.time_s,
        "body": event.body,
        "previous": event.previous,
        "hash": event.hash,
    }
    return json.dumps(whole, indent=2, ensure_ascii=False)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdict:
    """What checking the chain said.

    Attributes:
        whole: Whether it held.
        seq: The last event it was checked to.
        words: What did not fit; "" if it held.
        at_s: When that was, seconds since 1970.
    """

    whole: bool
    seq: int
    words: str
    at_s: float


@final
class Chain:
    """Checks the chain when asked to: it takes a while, so nobody else's page does it.

    What was the head at one check must be in the chain at the next, so a log that was rewritten
    in between, and fits in itself, is found too.

    Args:
        audit: The log.
        clock: Seconds since 1970.
    """

    def __init__(self, audit: Logged, clock: Callable[[], float]) -> None:
        self._audit, self._clock = audit, clock
        self._checking = threading.Lock()
        self._known: tuple[int, str] | None = None
        self.verdict: Verdict | None = None

    def check(self) -> Verdict:
        """Hash the whole log again.

        Raises:
            BusyError: That is being done already.
            StorageError: The database is away.
        """
        if not self._checking.acquire(blocking=False):
            raise BusyError("the chain is being checked already; wait for that")
        try:
            head = self._audit.head()
            try:
                count = self._audit.verify(self._known or head)
            except CheckpointError as error:
                found = Verdict(whole=False, seq=head[0], words=str(error), at_s=self._clock())
            else:
                self._known = head
                found = Verdict(whole=True, seq=count, words="", at_s=self._clock())
            self.verdict = found
            return found
        finally:
            self._checking.release()
