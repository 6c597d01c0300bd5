"""/v1, the part that adapts: fits on shots that come with the request, and sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, final

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from tessera.errors import ConflictError, InputError
from tessera.serve.callers import By, owner_of
from tessera.serve.fitting import Fitted, Fitter, Order
from tessera.serve.fitting_log import settings_told, told
from tessera.serve.fitting_read import SCHEMA, Asked, read_asked
from tessera.serve.fitting_values import Adapted, Spent
from tessera.serve.records import DeltaRecord, Key, Session, alias_name, one_line
from tessera.serve.registry import Registry
from tessera.serve.sessions import session_length
from tessera.serve.settings import Limits
from tessera.serve.web import HttpError, headers_of

__all__ = ["add_adaptation"]

_SECONDS = {"type": "number", "minimum": 1, "description": "How long the session lasts."}
_FIT: dict[str, Any] = {
    "alias": {"type": "string", "description": "What is to point to the delta."},
    "generation": {"type": "integer", "minimum": 0},
    "reason": {"type": "string"},
    "session_s": _SECONDS,
}
_SESSION: dict[str, Any] = {
    "delta": {"type": "string", "description": "The hash of one that is held, in place of shots."},
    "ttl_s": _SECONDS,
}
_SMALL = 64 << 10


def _body(fields: dict[str, Any]) -> dict[str, Any]:
    """What OpenAPI says of a body with shots."""
    schema = {"type": "object", "properties": {**SCHEMA, **fields}, "additionalProperties": False}
    return {
        "requestBody": {
            "required": True,
            "description": "Shots as the Open Inference Protocol has inputs, JSON or binary behind "
            "it (Inference-Header-Content-Length), and how to fit: see the guide.",
            "content": {"application/json": {"schema": schema}},
        }
    }


_router = APIRouter(prefix="/v1")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SessionMade:
    """A session; `fit`: what its delta was fitted with, where it was."""

    session: Session
    fit: Adapted | None


@final
class _Adaptation:
    """What the functions below need."""

    def __init__(self, registry: Registry, fitter: Fitter, limits: Limits, keep: str) -> None:
        self.registry, self.fitter, self.limits, self._keep = registry, fitter, limits, keep

    async def read(self, request: Request, fields: Mapping[str, Any]) -> Asked:
        try:
            body = await request.body()
        except ClientDisconnect as error:
            raise HttpError(408, "the body did not come") from error
        length = headers_of(request.scope).get(b"inference-header-content-length")
        asked = await run_in_threadpool(read_asked, body, length, frozenset(fields), self.limits)
        settings_told(asked.settings)  # what the log could not take is not begun
        return asked

    async def fit(self, order: Order) -> Fitted:
        return await asyncio.wrap_future(self.fitter.submit(order))

    def log(self, order: Order, fitted: Fitted, by: Key, session: str | None = None) -> None:
        body = told(
            order,
            fitted,
            hash=fitted.delta.hash,
            blobs=self.registry.rollouts.blobs,
            keep=self._keep,
            machine=self.fitter.machine,
        )
        body |= {"by": by.id} if session is None else {"by": by.id, "session": session}
        self.registry.audit.append("delta.fit", order.tenant, body)


def _adaptation(request: Request) -> _Adaptation:
    found = request.app.state.adaptation
    assert isinstance(found, _Adaptation)
    return found


_Known = Annotated[_Adaptation, Depends(_adaptation)]


def add_adaptation(
    app: FastAPI, registry: Registry, fitter: Fitter, *, limits: Limits, keep: str = "inputs"
) -> None:
    """Put the routes below into the application of /v1.

    Args:
        app: See `management`.
        registry: Keeps what is fitted.
        fitter: Fits.
        limits: Of tensors in a body.
        keep: Whether the log keeps shots: see `Recorder`.
    """
    app.state.adaptation = _Adaptation(registry, fitter, limits, keep)
    app.include_router(_router)


def _is_small(request: Request) -> bool:
    length = request.headers.get("content-length", "")
    return length.isdecimal() and len(length) < 10 and int(length) <= _SMALL


def _order(owner: str, asked: Asked) -> Order:
    return Order(tenant=owner, inputs=asked.inputs, labels=asked.labels, settings=asked.settings)


@_router.post("/tenants/{tenant}/deltas:fit", status_code=201, openapi_extra=_body(_FIT))
async def fit(tenant: str, request: Request, by: By, server: _Known) -> Adapted:
    """Fit a delta to the shots in the body, and keep it."""
    owner = owner_of(by, tenant)
    with server.fitter.place(owner):
        asked = await server.read(request, _FIT)
        await run_in_threadpool(_check, server.registry, owner, asked.rest, by)
        order = _order(owner, asked)
        fitted = await server.fit(order)
        return await run_in_threadpool(_keep, server, order, asked.rest, fitted, by)


@_router.post("/tenants/{tenant}/sessions", status_code=201, openapi_extra=_body(_SESSION))
async def start(tenant: str, request: Request, by: By, server: _Known) -> SessionMade:
    """Begin a session: over a delta that the tenant holds, or over one fitted to shots."""
    owner = owner_of(by, tenant)
    with contextlib.ExitStack() as stack:
        # What is small may be read while a fit of this tenant's is under way.
        small = _is_small(request)
        if not small:
            stack.enter_context(server.fitter.place(owner))
        asked = await server.read(request, _SESSION)
        held, ttl_s = asked.rest.get("delta"), session_length(asked.rest.get("ttl_s"))
        if (held is None) == (not asked.inputs):
            raise InputError("a session needs a delta's hash, or inputs with shots: one of them")
        if held is not None:
            if type(held) is not str:
                raise InputError(f"delta must be a hash, it is {held!r:.40}")
            sessions = server.registry.sessions
            made = await run_in_threadpool(sessions.start, owner, held, ttl_s=ttl_s, by=by)
            return SessionMade(session=made, fit=None)
        if small:
            stack.enter_context(server.fitter.place(owner))
        await run_in_threadpool(server.registry.sessions.require_room, owner, by=by)
        order = _order(owner, asked)
        fitted = await server.fit(order)
        found = await run_in_threadpool(_start, server, order, fitted, by, ttl_s)
        return SessionMade(session=found[0], fit=found[1])


@_router.get("/tenants/{tenant}/sessions")
def sessions(tenant: str, by: By, server: _Known) -> list[Session]:
    """The sessions that are not over, the one that ends first at the front."""
    return server.registry.sessions.all(owner_of(by, tenant))


@_router.delete("/tenants/{tenant}/sessions/{id}", status_code=204)
def end(tenant: str, id: str, by: By, server: _Known) -> None:
    """End a session before its time."""
    server.registry.sessions.end(owner_of(by, tenant), id, by=by)


@_router.post("/tenants/{tenant}/sessions/{id}:keep", status_code=201)
def keep(tenant: str, id: str, by: By, server: _Known) -> DeltaRecord:
    """Let the tenant hold a session's delta; the session ends all the same."""
    owner, registry = owner_of(by, tenant), server.registry
    return registry.put_delta(owner, registry.sessions.delta(owner, id), by=by)


# --- in a thread ---------------------------------------------------------------------------------


def _check(registry: Registry, owner: str, said: Mapping[str, Any], by: Key) -> None:
    """Refuse before the fit what could not be done after it."""
    registry.tenant(owner)
    if said.get("session_s") is not None:
        session_length(said["session_s"])
        registry.sessions.require_room(owner, by=by)
    alias, generation = said.get("alias"), said.get("generation", 0)
    if alias is None and {"generation", "reason"} & said.keys():
        raise InputError("generation and reason belong to an alias, and none is named")
    if alias is None:
        return
    if said.get("session_s") is not None:
        raise InputError("alias and session_s exclude each other: one stays, the other ends")
    alias_name(alias)
    one_line(said.get("reason", ""), "reason")
    if type(generation) is not int or not 0 <= generation < 1 << 31:
        raise InputError(f"generation must be a whole number >= 0, it is {generation!r:.40}")
    now = next((a.generation for a in registry.aliases(owner) if a.name == alias), 0)
    if now != generation:
        raise ConflictError(
            f"the alias {alias!r} is at generation {now}, and {generation} was expected; nothing "
            "was fitted. Read it again, then decide"
        )


def _keep(
    server: _Adaptation, order: Order, said: Mapping[str, Any], fitted: Fitted, by: Key
) -> Adapted:
    registry, owner = server.registry, order.tenant
    if said.get("session_s") is not None:
        return _start(server, order, fitted, by, said["session_s"])[1]
    record = registry.put_delta(owner, fitted.delta, by=by, parent=order.settings.parent)
    found = _adapted(record.hash, order, fitted)
    server.log(order, fitted, by)
    if said.get("alias") is None:
        return found
    try:
        alias = registry.set_alias(
            owner,
            said["alias"],
            record.hash,
            generation=said.get("generation", 0),
            by=by,
            reason=said.get("reason", ""),
        )
    except ConflictError as error:
        raise ConflictError(f"{error}. The delta is kept, as {record.hash}") from error
    return replace(found, alias={"name": alias.name, "generation": alias.generation})


def _start(
    server: _Adaptation, order: Order, fitted: Fitted, by: Key, ttl_s: float
) -> tuple[Session, Adapted]:
    hash = fitted.delta.hash
    made = server.registry.sessions.start(order.tenant, fitted.delta, ttl_s=ttl_s, by=by)
    server.log(order, fitted, by, made.id)
    found = _adapted(hash, order, fitted)
    return made, replace(found, session={"name": made.name, "expires_s": made.expires_s})


def _adapted(hash: str, order: Order, fitted: Fitted) -> Adapted:
    spent = fitted.spent
    return Adapted(
        hash=hash,
        kind=fitted.delta.kind,
        rows=len(next(iter(order.inputs.values()))),
        steps=fitted.steps,
        stopped_by=fitted.stopped_by,
        first_loss=fitted.losses[0],
        last_loss=fitted.losses[-1],
        spent=Spent(ms=spent.ms, joules=spent.joules, joules_source=spent.joules_source),
    )
