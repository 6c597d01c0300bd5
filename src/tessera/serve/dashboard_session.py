"""Who has signed in to the dashboard: cookies and form tokens, signed by this process."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import final

from tessera.errors import BusyError

__all__ = ["Session", "Sessions", "Throttle"]

_MOST_TOKEN = 1024


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Session:
    """Somebody who has signed in.

    Attributes:
        id: Random.
        key: The id of the key; whether that is still in force is asked anew for each page.
        until_s: On the clock of `Sessions`.
    """

    id: str
    key: str
    until_s: float


@final
class Throttle:
    """How often a wrong key may be tried: so often from an address, so often from all together.

    Wrong ones alone count, for `window_s`; who has had as many as are allowed is refused whatever
    the next one is, so that waiting is the only way on. Of IPv6 an address is its network of 64
    bits, of which one customer has all.

    Args:
        each: From one address.
        all: From all; so many addresses are remembered at most.
        window_s: For how long one counts.
        clock: Seconds that only go forward.

    Example:
        >>> throttle = Throttle(each=1, all=2)
        >>> throttle.enter("192.0.2.1")  # and it was wrong: `right` is not called
        >>> throttle.enter("192.0.2.1")
        Traceback (most recent call last):
        tessera.errors.BusyError: too many wrong keys were tried; wait a minute
    """

    def __init__(
        self,
        *,
        each: int = 10,
        all: int = 100,
        window_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._each, self._all, self._window_s, self._clock = each, all, window_s, clock
        self._tries: deque[tuple[float, str]] = deque()
        self._lock = threading.Lock()

    def enter(self, address: str) -> None:
        """Count a try before its key is looked at, so that many at once are counted too.

        Raises:
            BusyError: There were too many; it was not counted.
        """
        network, now = _network(address), self._clock()
        with self._lock:
            while self._tries and self._tries[0][0] <= now - self._window_s:
                self._tries.popleft()
            own = [at for at, who in self._tries if who == network]
            first = None
            if len(own) >= self._each:
                first = own[0]
            elif len(self._tries) >= self._all:
                first = self._tries[0][0]
            if first is not None:
                wait_s = first + self._window_s - now
                raise BusyError(
                    "too many wrong keys were tried; wait a minute", retry_after_s=wait_s
                )
            self._tries.append((now, network))

    def right(self, address: str) -> None:
        """The key was right: its try, the address's last, does not count."""
        network = _network(address)
        with self._lock:
            for at in range(len(self._tries) - 1, -1, -1):
                if self._tries[at][1] == network:
                    del self._tries[at]
                    return


def _network(address: str) -> str:
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:  # a socket that has none: all of those share one
        return ""
    if isinstance(found, IPv6Address):
        return str(found.ipv4_mapped or int(found) >> 64)
    return str(found)


@final
class Sessions:
    """Signs sessions and forms with a secret that is made here and dies with the process.

    A restart signs everybody out; so does `end`, though the cookie may still be around.

    Args:
        last_s: How long a session lasts.
        clock: Seconds that only go forward.

    Example:
        >>> sessions = Sessions(60.0)
        >>> token = sessions.begin("k1")
        >>> sessions.find(token).key, sessions.find(token[:-1] + "!")
        ('k1', None)
        >>> sessions.end(sessions.find(token))
        >>> sessions.find(token) is None
        True
    """

    def __init__(self, last_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.last_s = last_s
        self._clock = clock
        # No seed may repeat these draws: who can draw them again is signed in.
        self._secret = secrets.token_bytes(32)
        self._ended: dict[str, float] = {}
        self._said: dict[str, str] = {}
        self._lock = threading.Lock()

    def begin(self, key: str) -> str:
        """The cookie of a new session."""
        content = [secrets.token_hex(16), key, self._clock() + self.last_s]
        text = base64.urlsafe_b64encode(json.dumps(content).encode()).decode()
        return f"{text}.{self._sign('session', text)}"

    def find(self, token: str) -> Session | None:
        """The session of a cookie; None for what is not signed here, over, or ended."""
        text, _, signature = token.partition(".")
        if len(token) > _MOST_TOKEN or not self._signed("session", text, signature):
            return None
        try:
            id, key, until_s = json.loads(base64.urlsafe_b64decode(text))
        except (binascii.Error, ValueError):  # signed, so it is ours: this does not happen
            return None
        if self._clock() >= until_s or id in self._ended:
            return None
        return Session(id=id, key=key, until_s=until_s)

    def end(self, session: Session) -> None:
        """Let its cookie count no more."""
        now = self._clock()
        with self._lock:
            self._ended = {i: s for i, s in self._ended.items() if s > now}
            self._ended[session.id] = session.until_s
            self._said.pop(session.id, None)

    def form_token(self, id: str) -> str:
        """What the forms of a session (or of a sign-in page) carry, which no other site knows.

        Example:
            >>> sessions = Sessions(60.0)
            >>> sessions.check_form("s", sessions.form_token("s")), sessions.check_form("s", "")
            (True, False)
        """
        return self._sign("form", id)

    def check_form(self, id: str, token: str) -> bool:
        """Whether a form's token is the one of this session."""
        return self._signed("form", id, token)

    def say(self, session: Session, words: str) -> None:
        """Something for the session's next page."""
        with self._lock:
            while len(self._said) >= 1000:  # pages that were never fetched
                self._said.pop(next(iter(self._said)))
            self._said[session.id] = words

    def said(self, session: Session) -> str:
        """What was said last, once."""
        with self._lock:
            return self._said.pop(session.id, "")

    def _sign(self, what: str, text: str) -> str:
        content = f"{what}\0{text}".encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, content, hashlib.sha256).hexdigest()

    def _signed(self, what: str, text: str, signature: str) -> bool:
        given = signature.encode("utf-8", "surrogatepass")
        return hmac.compare_digest(self._sign(what, text).encode(), given)
