"""The server's log: a line for each request and for what the server has to say, as text or JSON.

A line never has the path a client sent, its query, its headers or its inputs: keys travel there.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO, final

import orjson

from tessera.errors import InputError
from tessera.serve.ports import Call

__all__ = ["FORMATS", "log_request", "set_up"]

FORMATS = ("text", "json")
_REQUESTS = logging.getLogger("tessera.requests")
_MOST = 8 << 10  # characters of a message; of a traceback eight times as many
_PREFIX = 12  # of a delta's hash, as on the dashboard


def set_up(form: str | None = None, *, requests: bool = True, stream: TextIO | None = None) -> None:
    """Send what this process logs to one place, in one form: for a command, not for a library.

    Args:
        form: "text" or "json"; None: text on a terminal, else JSON.
        requests: Whether there is a line for each request.
        stream: By default stderr.

    Raises:
        InputError: No such form.

    Example:
        >>> set_up("yaml")
        Traceback (most recent call last):
        tessera.errors.InputError: the log is written as text or json, got 'yaml'
    """
    stream = stream or sys.stderr
    form = form or ("text" if stream.isatty() else "json")
    if form not in FORMATS:
        raise InputError(f"the log is written as {' or '.join(FORMATS)}, got {form[:40]!r}")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tessera").setLevel(logging.INFO)
    _REQUESTS.setLevel(logging.INFO if requests else logging.CRITICAL)
    logging.captureWarnings(True)


def log_request(call: Call, *, status: int) -> None:
    """The line of a request that was answered; nothing where nobody has asked for such lines.

    Args:
        call: The request.
        status: HTTP's number of the answer.

    Example:
        >>> log_request(Call("r-1", "GET", "/", {}), status=200)  # `set_up` was not called
    """
    if _REQUESTS.isEnabledFor(logging.INFO):
        level = logging.ERROR if status >= 500 else logging.INFO
        _REQUESTS.log(level, "request", extra={"call": _said(call, status)})


def _said(call: Call, status: int) -> dict[str, Any]:
    said = {
        "request": call.id,
        "method": call.method if call.method.isalpha() else "",
        "route": call.pattern or call.route,
        "status": status,
        "ms": round(1e3 * (time.monotonic() - call.began_s), 3),
        "tenant": call.about or call.tenant,
        "alias": call.alias,
        "delta": call.delta[:_PREFIX],
        "rows": call.rows or "",
        "received": call.received,
        "sent": call.sent,
    }
    return {name: value for name, value in said.items() if value != ""}


@final
class _Json(logging.Formatter):
    """An object a line: time, level, logger, message; then what is known besides."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _unicode(record.getMessage()[:_MOST]),
            **getattr(record, "call", {}),
        }
        trace, id = _trace(record), getattr(record, "request", None)
        if id is not None:
            said["request"] = id
        if trace:
            said["trace"] = _unicode(trace)
        return orjson.dumps(said, default=str).decode()


@final
class _Text(logging.Formatter):
    """The same for people: a line, and below it the traceback, if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        message = _line(record.getMessage()[:_MOST])
        words = [_time(record), f"{record.levelname:<7}", message]
        words += [f"{name}={value}" for name, value in getattr(record, "call", {}).items()]
        trace = _trace(record)
        # Set in, so that no text which an error quotes can look like a line of the log.
        return "\n    ".join([" ".join(words), *map(_line, trace.split("\n") if trace else ())])


def _time(record: logging.LogRecord) -> str:
    when = datetime.fromtimestamp(record.created, UTC)
    return f"{when:%Y-%m-%dT%H:%M:%S}.{when.microsecond // 1000:03d}Z"


def _trace(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    return "".join(traceback.format_exception(record.exc_info[1]))[-8 * _MOST :].rstrip()


def _unicode(text: str) -> str:
    """The text with halves of surrogate pairs, which UTF-8 cannot have, written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _line(text: str) -> str:
    """The text with what would begin another line, or move the cursor, written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
