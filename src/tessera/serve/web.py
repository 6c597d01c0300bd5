"""What both faces of the server share: errors as answers, credentials, bodies with bounds."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import final

import orjson
from starlette.types import Message, Receive, Scope, Send

from tessera.errors import (
    AccessError,
    BusyError,
    CheckpointError,
    ConflictError,
    InputError,
    MissingDataError,
    TesseraError,
    UnknownNameError,
)
from tessera.serve.records import Key, View, tenant_name

__all__ = [
    "Disconnected",
    "HttpError",
    "Room",
    "Unauthorized",
    "Unavailable",
    "authenticate",
    "bounded",
    "check_head",
    "describe",
    "headers_of",
    "linger",
    "log_failure",
    "read_body",
    "request_id",
    "respond",
    "status_of",
    "tenant_for",
    "want_scope",
]

Headers = Mapping[bytes, bytes]

_LOG = logging.getLogger("tessera.serve")
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_PIECE_BYTES = 256 << 10
_LINGER_BYTES = 8 << 20
_LINGER_S = 1.0


@final
class HttpError(InputError):
    """A fault of a request that HTTP has its own number for.

    Attributes:
        status: That number.
        headers: That go with it.
    """

    def __init__(
        self, status: int, message: str, *, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = tuple(headers)


@final
class Unauthorized(AccessError):
    """No key, or none that is known: 401, where one without the scope is 403."""


@final
class Unavailable(BusyError):
    """What is asked for cannot be done just now: 503, where a queue that is full is 429."""


@final
class Disconnected(Exception):
    """The client has gone: there is nobody to answer."""


_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (Unauthorized, 401),
    (AccessError, 403),
    (UnknownNameError, 404),
    (ConflictError, 409),
    (Unavailable, 503),
    (BusyError, 429),
    # A blob or a database that fails is no fault of the request.
    (CheckpointError, 503),
    (MissingDataError, 503),
    (TesseraError, 400),
)


def status_of(error: BaseException) -> int:
    """HTTP's number for an error; 500 for what is none of ours.

    Example:
        >>> status_of(InputError("?")), status_of(BusyError("full")), status_of(KeyError("k"))
        (400, 429, 500)
    """
    if isinstance(error, HttpError):
        return error.status
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def describe(error: BaseException, id: str) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    """Status, body and headers of the answer to a request that failed.

    The body is ``{"error": message, "type": class}``. Where the server failed, or its storage, only
    the request's id is said, under which the log has the rest: that names folders and hosts.

    Example:
        >>> describe(UnknownNameError("no such model"), "r-1")
        (404, b'{"error":"no such model","type":"UnknownNameError"}', [])
    """
    status, headers = status_of(error), []
    if isinstance(error, HttpError):
        headers = list(error.headers)
    elif isinstance(error, BusyError):
        # Whole seconds is what the header has; never 0, which would be at once.
        headers = [(b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s)))]
    elif isinstance(error, Unauthorized):
        headers = [(b"www-authenticate", b"Bearer")]
    kind: type[BaseException] = type(error)
    message = str(error)
    if status == 500:
        kind, message = TesseraError, f"the server failed; its log has request {id}"
    elif isinstance(error, HttpError | Unauthorized | Unavailable):
        kind = type(error).__bases__[0]  # that clients know
    elif status == 503:
        message = f"the server's storage failed; its log has request {id}"
        headers = [(b"retry-after", b"5")]
    # It may quote a client's text that is no Unicode: half of a surrogate pair, as JSON can say.
    words = message.encode("utf-8", "backslashreplace").decode()
    return status, orjson.dumps({"error": words, "type": kind.__name__}), headers


def log_failure(error: BaseException, id: str) -> None:
    """Say in the log what the client is not told.

    Example:
        >>> log_failure(InputError("the client is told of that"), "r-1")
    """
    status = status_of(error)
    if status == 500:
        _LOG.error("request %s failed", id, exc_info=error, extra={"request": id})
    elif status > 500:
        said = (id, type(error).__name__, error)
        _LOG.warning("request %s failed: %s: %s", *said, extra={"request": id})


def headers_of(scope: Scope) -> Headers:
    """The headers of a request by name, the last of each."""
    return dict(scope["headers"])


def request_id(headers: Headers) -> str:
    """The id the client gave the request, if it is a plain word; else a new one.

    Example:
        >>> request_id({b"x-request-id": b"r-17"}), len(request_id({}))
        ('r-17', 32)
    """
    given = headers.get(b"x-request-id", b"")
    return given.decode() if _ID.fullmatch(given) else secrets.token_hex(16)


# --- who asks --------------------------------------------------------------------------------


def authenticate(view: View, headers: Headers) -> Key:
    """The key of a request: ``Authorization: Bearer ...`` or ``X-API-Key``.

    The secret is looked up by its sha256: how long that takes says nothing about secrets.

    Raises:
        Unauthorized: There is none, or it is not in force.
    """
    scheme, _, secret = headers.get(b"authorization", b"").partition(b" ")
    other = headers.get(b"x-api-key", b"")
    if scheme and scheme.lower() != b"bearer":
        raise Unauthorized("a key travels as 'Authorization: Bearer KEY' or as 'X-API-Key: KEY'")
    secret = secret.strip() or other
    if not secret:
        raise Unauthorized("this needs a key: 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
    found = view.keys.get(hashlib.sha256(secret).digest())
    if found is None or (other and other != secret):
        raise Unauthorized("the key is not known, or no longer in force")
    return found


def want_scope(key: Key, scope: str) -> None:
    """Raise unless the key has the scope; an admin's has every one.

    Raises:
        AccessError: It has not.
    """
    if scope not in key.scopes and not key.is_admin:
        raise AccessError(f"this needs a key with the scope {scope!r}, yours has {_scopes(key)}")


def _scopes(key: Key) -> str:
    return ", ".join(sorted(key.scopes)) or "none"


def tenant_for(key: Key, named: str | None) -> str:
    """Whose resources a request is about: the key's own tenant, or the one an admin names.

    Args:
        key: The credential; it decides.
        named: In the path, or in the header X-Tessera-Tenant; None: not at all.

    Raises:
        UnknownNameError: Another's tenant, which is to say one that there is not.
        InputError: An admin named none.
    """
    if key.tenant is None:
        if named is None:
            raise InputError(
                "an admin's key says whom it acts for with the header X-Tessera-Tenant"
            )
        return tenant_name(named)
    if named is not None and named != key.tenant:
        raise UnknownNameError(f"there is no tenant {named[:64]!r}")
    return key.tenant


# --- bodies ----------------------------------------------------------------------------------


@final
class Room:
    """The bytes that the bodies of all requests may take together.

    Example:
        >>> room = Room(10)
        >>> room.take(8)
        >>> room.give(8)
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0

    def take(self, size: int) -> None:
        """Raise BusyError where there is no room."""
        if self.used + size > self._limit:
            raise BusyError(
                f"the requests under way hold {self.used} bytes, and {self._limit} may be held"
            )
        self.used += size

    def give(self, size: int) -> None:
        """Hand back what was taken."""
        self.used -= size


def check_head(headers: Headers, limit: int) -> None:
    """Refuse a body by what the headers say of it.

    Raises:
        HttpError: 415, it is compressed: a small one may be huge. 413, it is too large.
    """
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding.lower() != b"identity":
        raise HttpError(415, "compressed bodies are not taken; send it without Content-Encoding")
    length = headers.get(b"content-length", b"")
    if length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise _too_large(limit)


def _too_large(limit: int) -> HttpError:
    # What is still to come would be read as the next request.
    return HttpError(
        413, f"the body may have at most {limit} bytes here", headers=[(b"connection", b"close")]
    )


async def read_body(
    receive: Receive, headers: Headers, *, limit: int, within_s: float, room: Room
) -> bytearray:
    """The body of a request; its size is taken from `room`, which the caller gives back.

    Raises:
        HttpError: 413, 415; 408 where it does not come in time.
        BusyError: There is no room for it now.
        Disconnected: The client went.
    """
    check_head(headers, limit)
    body = bytearray()
    try:
        async with asyncio.timeout(within_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                piece = message.get("body", b"")
                if len(body) + len(piece) > limit:
                    raise _too_large(limit)
                room.take(len(piece))
                body += piece
                if not message.get("more_body", False):
                    return body
    except TimeoutError as error:
        room.give(len(body))
        raise HttpError(
            408,
            f"the body did not come within {within_s:g} s",
            headers=[(b"connection", b"close")],
        ) from error
    except BaseException:
        room.give(len(body))
        raise


def bounded(receive: Receive, headers: Headers, *, limit: int, within_s: float) -> Receive:
    """`receive` for a framework that reads the body itself: with a bound of size and time.

    It raises as `read_body` does.
    """
    check_head(headers, limit)
    seen = 0
    whole = False
    until = asyncio.get_running_loop().time() + within_s

    async def counted() -> Message:
        nonlocal seen, whole
        if whole:  # now it waits for a disconnect, however long
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError as error:
            raise HttpError(408, f"the body did not come within {within_s:g} s") from error
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        whole = not message.get("more_body", False)
        return message

    return counted


async def linger(receive: Receive) -> None:
    """Read on a little and drop it, so that a client still sending sees the answer.

    Closing at once would reset the connection, and the answer with it.
    """
    left = _LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))


async def respond(
    send: Send,
    status: int,
    body: bytes,
    headers: list[tuple[bytes, bytes]],
    *,
    within_s: float,
) -> None:
    """Send an answer, in pieces if it is large, so that a slow reader is noticed.

    Raises:
        TimeoutError: A piece was not taken in time.
    """
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if len(body) <= _PIECE_BYTES:
        await send({"type": "http.response.body", "body": body})
        return
    view = memoryview(body)
    for begin in range(0, len(body), _PIECE_BYTES):
        async with asyncio.timeout(within_s):
            await send(
                {
                    "type": "http.response.body",
                    "body": bytes(view[begin : begin + _PIECE_BYTES]),
                    "more_body": begin + _PIECE_BYTES < len(body),
                }
            )
