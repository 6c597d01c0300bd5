"""The audit log as the dashboard shows it: events as words, and whether the chain holds."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, final

from tessera.errors import BusyError, CheckpointError
from tessera.serve.records import Event

__all__ = ["DULL", "Chain", "Logged", "Verdict", "pretty", "summary"]

_HASH = re.compile("[0-9a-f]{64}")
_MOST_SUMMARY = 160
# Of an event's body, what says little in a line.
DULL = (
    *("base_hash", "blob", "boot", "by", "check", "decision", "ends_s", "evidence", "expires_s"),
    *("id", "inputs", "outcomes", "overall", "pid", "plan", "policy", "salt"),
)


class Logged(Protocol):
    """What is asked of an audit log: `Audit`."""

    def head(self) -> tuple[int, str]:
        """The last one's number and hash."""

    def verify(self, expect: tuple[int, str] | None = None) -> int:
        """Hash all of it again."""


def summary(event: Event, leave_out: Collection[str] = ()) -> str:
    """The body of an event in a line: what is plain in it.

    Example:
        >>> body = {"alias": "clf", "passed": False, "delta": "ab" * 32, "gain": 0.123456, "on": {}}
        >>> summary(Event(seq=1, previous="", hash="", time_s=0.0, kind="k", tenant="", body=body))
        'alias clf, passed no, delta abababababab…, gain 0.1235'
    """
    parts = []
    for name, value in event.body.items():
        words = "" if name in leave_out else _plain(value)
        if words:
            parts.append(f"{name} {words}")
    line = ", ".join(parts)
    return line if len(line) <= _MOST_SUMMARY else line[: _MOST_SUMMARY - 1] + "…"


def _plain(value: object) -> str:
    """A value in words; "": it is none that has a few."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if isinstance(value, list):
        return "; ".join(v for v in map(_plain, value[:3]) if v)
    if isinstance(value, str | int):
        return _HASH.sub(lambda found: found[0][:12] + "…", str(value)[:1000])
    return ""


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
