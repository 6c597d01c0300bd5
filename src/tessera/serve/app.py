"""The HTTP face of the server: an ASGI application.

/v2 is answered on raw requests (`inference`), /v1 by FastAPI (`management`), /metrics here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import final

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Message, Receive, Scope, Send

from tessera.errors import InputError
from tessera.serve.inference import Inference
from tessera.serve.logs import log_request
from tessera.serve.management import management
from tessera.serve.meters import Meters
from tessera.serve.ports import Answering, Call, Managing, Recording, only
from tessera.serve.records import alias_name, tenant_name
from tessera.serve.resolve import Ways
from tessera.serve.settings import AppSettings
from tessera.serve.web import (
    Disconnected,
    Room,
    authenticate,
    bounded,
    describe,
    headers_of,
    linger,
    log_failure,
    request_id,
    respond,
    want_scope,
)

__all__ = ["App", "make_app"]

_LOG = logging.getLogger("tessera.serve")
_LOOPBACK = ("127.0.0.1", "::1")
_FORWARDED = (b"x-forwarded-for", b"forwarded", b"x-real-ip")
_GONE = 499  # nobody was answered; nginx's number for it
_STILL_TO_COME = (413, 415)


@final
class App:
    """An ASGI application; `make_app` makes it.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from tessera.serve.service import Service, ServiceSettings
        >>> folder = tempfile.mkdtemp()
        >>> where = ServiceSettings(db=f"sqlite:///{folder}/registry.db", blobs=f"{folder}/blobs")
        >>> with Service(nn.Linear(2, 1), where) as service:
        ...     service.app.under_way
        0

    Attributes:
        management: FastAPI's part of it, to which pages can be added.
        meters: What /metrics shows.
    """

    def __init__(
        self,
        registry: Managing,
        engine: Answering,
        settings: AppSettings,
        recorder: Recording | None,
        ways: Ways | None = None,
    ) -> None:
        self._registry, self._settings = registry, settings
        version = _version()
        self.meters = Meters(settings.tenant_labels)
        self.management: FastAPI = management(registry, version=version)
        self._inference = Inference(
            registry, engine, settings, Room(settings.buffered_bytes), version, recorder, ways
        )
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        headers = headers_of(scope)
        call = Call(request_id(headers), scope["method"], scope["path"], headers)
        self._under_way += 1
        self.meters.under_way.inc()
        try:
            await self._route(call, scope, receive, send)
        except Disconnected:
            call.status = _GONE
        except Exception as error:
            await self._failed(call, error, receive, send)
        finally:
            self._under_way -= 1
            self.meters.under_way.dec()
            status = call.status or _GONE
            self.meters.done(call.route, call.tenant, status, time.monotonic() - call.began_s)
            log_request(call, status=status)

    async def _route(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        if call.path == "/v2" or call.path.startswith("/v2/"):
            await self._inference.handle(call, receive, send)
        elif call.path == "/metrics":
            await self._metrics(call, scope, send)
        else:
            await self._manage(call, scope, receive, send)

    async def _manage(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        call.route = "management"
        settings = self._settings
        form = call.headers.get(b"content-type", b"").startswith(b"multipart/")
        limit = settings.upload_bytes if form else settings.management_bytes
        if call.path.endswith((":fit", ":gate", "/sessions")):
            limit = settings.fit_bytes
            if call.path.endswith(":fit"):
                call.route = "fit"
        within_s = settings.body_timeout_s
        counted = bounded(receive, call.headers, limit=limit, within_s=within_s)
        scope["tessera.id"] = call.id

        async def told() -> Message:
            message = await counted()
            call.received += len(message.get("body", b""))
            return message

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", call.id.encode())]
            call.sent += len(message.get("body", b""))
            async with asyncio.timeout(settings.send_timeout_s):
                await send(message)

        try:
            await self.management(scope, told, noting)
        finally:
            self._name(call, scope)

    def _name(self, call: Call, scope: Scope) -> None:
        """What FastAPI found in the path, for the log."""
        page = scope.get("tessera.page", "")
        call.pattern = page or str(getattr(scope.get("route"), "path", ""))
        found = scope.get("path_params", {})
        with contextlib.suppress(InputError):  # whatever stood in the place of a name
            call.about = tenant_name(found.get("tenant"))
            if 200 <= call.status < 300 or call.status == 429:  # it was a key that may ask for it
                call.tenant = call.about
            call.alias = alias_name(found.get("alias", found.get("name")))

    async def _metrics(self, call: Call, scope: Scope, send: Send) -> None:
        call.route = "metrics"
        only(call, "GET")
        here = (scope.get("client") or ("",))[0] in _LOOPBACK
        forwarded = any(name in call.headers for name in _FORWARDED)
        if not (self._settings.metrics_on_loopback and here and not forwarded):
            want_scope(authenticate(self._registry.view(), call.headers), "admin")
        call.status = 200
        kind = [
            (b"content-type", CONTENT_TYPE_LATEST.encode()),
            (b"x-request-id", call.id.encode()),
        ]
        page = self.meters.page()
        call.sent = len(page)
        await respond(send, 200, page, kind, within_s=self._settings.send_timeout_s)

    async def _failed(self, call: Call, error: Exception, receive: Receive, send: Send) -> None:
        if call.status:  # an answer is under way, or FastAPI has given one
            words, extra = "request %s failed while it was answered", {"request": call.id}
            _LOG.error(words, call.id, exc_info=error, extra=extra)
            if isinstance(error, TimeoutError):
                raise error  # so that the connection of a client that does not read is closed
            return
        call.status, body, headers = describe(error, call.id)
        call.sent = len(body)
        log_failure(error, call.id)
        if call.status in _STILL_TO_COME:
            await linger(receive)
        headers += [(b"content-type", b"application/json"), (b"x-request-id", call.id.encode())]
        within_s = self._settings.send_timeout_s
        await respond(send, call.status, body, headers, within_s=within_s)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                self.drain()
                await send({"type": "lifespan.shutdown.complete"})
                return

    def drain(self) -> None:
        """Take no more requests for inference: not ready, 503. Those under way are answered."""
        self._inference.draining = True

    def close(self) -> None:
        """Stop what goes on beside the answers."""
        self._inference.shadows.close()

    @property
    def under_way(self) -> int:
        """Requests that are being answered."""
        return self._under_way


def make_app(
    registry: Managing,
    engine: Answering,
    *,
    settings: AppSettings | None = None,
    recorder: Recording | None = None,
    ways: Ways | None = None,
) -> App:
    """The server as an ASGI application.

    Args:
        registry: Tenants, keys, deltas and aliases.
        engine: Computes; whoever made it closes it.
        settings: Bounds; by default `AppSettings()`.
        recorder: Told of each answer, on the event loop, before it is sent.
        ways: What besides aliases a model's name may stand for: sessions.

    Returns:
        What uvicorn, or any other ASGI server, runs.

    Example:
        >>> import asyncio, httpx, tempfile, torch
        >>> from tessera.serve.blobs import Blobs
        >>> from tessera.serve.engine import Engine
        >>> from tessera.serve.registry import Registry
        >>> place = tempfile.mkdtemp()
        >>> registry = Registry(f"sqlite:///{place}/r.db", Blobs(f"{place}/b"), base_hash="")
        >>> engine = Engine(torch.nn.Linear(2, 1), registry.load)
        >>> transport = httpx.ASGITransport(make_app(registry, engine))
        >>> async def ask(path):
        ...     async with httpx.AsyncClient(transport=transport, base_url="http://x") as web:
        ...         return (await web.get(path)).json()
        >>> asyncio.run(ask("/v2/health/ready"))
        {'ready': True}
        >>> engine.close()
        >>> registry.close()
    """
    return App(registry, engine, settings or AppSettings(), recorder, ways)


def _version() -> str:
    try:
        return installed("tessera-lifelong")
    except PackageNotFoundError:
        return "0"
