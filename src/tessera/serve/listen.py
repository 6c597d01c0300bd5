"""uvicorn, with the bounds it does not have itself."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tessera.serve.app import App

__all__ = ["HEAD_BYTES", "HEAD_S", "Server"]

HEAD_S = 10.0
HEAD_BYTES = 64 << 10
_CONNECTIONS = 1000
_DRAIN_S = 30


class _Guarded(HttpToolsProtocol):
    """One connection: its request's head comes whole within `HEAD_S`, and in `HEAD_BYTES`.

    httptools takes a head of any length, at any pace.
    """

    _timer: asyncio.TimerHandle | None = None
    _head = 0

    # uvicorn narrows the argument as well, and is not checked.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        # Beyond `limit_concurrency` uvicorn answers 503, and keeps the connection.
        most = self.limit_concurrency
        if most is not None and len(self.connections) > 2 * most:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._head = 0
        if self._timer is None:  # not the first request of the connection
            self._wait()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._fits(len(url)):
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._fits(len(name) + len(value)):
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop()
        if self._fits(0):
            super().on_headers_complete()

    def _fits(self, more: int) -> bool:
        self._head += more
        if self._head > HEAD_BYTES:
            self.transport.abort()
        return self._head <= HEAD_BYTES

    def _wait(self) -> None:
        self._timer = self.loop.call_later(HEAD_S, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        self.transport.abort()


@final
class Server(uvicorn.Server):
    """The application on a port.

    Connections are bounded in number; a request's head in size and time. On SIGTERM or SIGINT it
    takes no more requests, answers those under way, and returns.

    Args:
        app: What `make_app` made.
        host: Address.
        port: 0: a free one.
        connections: At most, at once; more get 503.
        drain_s: How long requests under way may take once it is to stop.

    Example:
        >>> from tessera.serve.app import make_app
        >>> server = Server(make_app(registry=None, engine=None), port=0)
        >>> server.started  # server.run() would, and return when it is told to stop
        False
    """

    def __init__(
        self,
        app: App,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        connections: int = _CONNECTIONS,
        drain_s: int = _DRAIN_S,
    ) -> None:
        self._app = app
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=_Guarded,
                ws="none",
                lifespan="on",
                access_log=False,  # ours says whose it was, and no path: see `logs`
                log_config=None,
                log_level="warning",
                server_header=False,
                proxy_headers=False,  # whose they are is the deployment's to say
                limit_concurrency=connections,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=drain_s,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; requests under way are answered first."""
        self._app.drain()
        await super().shutdown(sockets)

    @property
    def port(self) -> int:
        """The one it listens on, once `started`."""
        found: Any = self.servers[0].sockets[0].getsockname()
        return int(found[1])
