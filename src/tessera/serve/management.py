"""/v1: tenants, keys, deltas and aliases, with an OpenAPI description.

The tenant of a request is the one of its key; the one in the path must be the same, or the key an
admin's. Functions that wait for a disk or a database run in a thread pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, final

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tessera.errors import AccessError, BusyError, InputError, TesseraError, UnknownNameError
from tessera.serve.callers import By, owner_of
from tessera.serve.ports import Managing
from tessera.serve.records import Alias, DeltaRecord, Key, Tenant, tenant_name
from tessera.serve.upload import delta_of
from tessera.serve.web import HttpError, describe, log_failure, status_of, want_scope

__all__ = ["management"]

_IN_MEMORY = 2
_FILES = 16
_FORM = {
    "requestBody": {
        "required": True,
        "description": "The files of a PEFT folder (adapter_config.json, "
        "adapter_model.safetensors), or one file that serve.pack made.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "minItems": 1,
                        },
                        "parent": {
                            "type": "string",
                            "description": "Hash of the delta it came from.",
                        },
                    },
                }
            }
        },
    }
}


@final
class Problem(BaseModel):
    """What an error's body says."""

    error: str
    type: str = "InputError"


_STRICT = ConfigDict(extra="forbid", strict=True)


@final
class NewTenant(BaseModel):
    """A tenant to be made."""

    model_config = _STRICT

    # Described here, checked by the registry, whose message says more than a pattern's.
    name: str = Field(json_schema_extra={"pattern": "^[a-z0-9][a-z0-9-]{0,62}$"})


@final
class NewKey(BaseModel):
    """A key to be made."""

    model_config = _STRICT

    scopes: list[str] = Field(
        max_length=8,
        json_schema_extra={
            "items": {"type": "string", "enum": ["infer", "manage", "admin"]},
            "minItems": 1,
        },
    )


@final
class NewAlias(BaseModel):
    """Where an alias is to point."""

    model_config = _STRICT

    delta: str = Field(description="A delta's hash; '' for the base alone.")
    generation: int = Field(
        ge=0, lt=1 << 31, description="The generation that was read; 0: there is none yet."
    )
    reason: str = ""


@final
class Rollback(BaseModel):
    """A way back."""

    model_config = _STRICT

    generation: int | None = Field(
        default=None, ge=0, lt=1 << 31, description="The generation that was read, if it matters."
    )
    reason: str = ""


@final
class KeyMade(BaseModel):
    """A new key; its secret is said this once."""

    key: Key
    secret: str


@final
class _Server:
    """What the functions below need."""

    def __init__(self, registry: Managing) -> None:
        self.registry = registry
        self.uploading: set[str] = set()  # tenants; only the loop's thread looks
        self.memory = asyncio.Semaphore(_IN_MEMORY)


def _server(request: Request) -> _Server:
    found = request.app.state.server
    assert isinstance(found, _Server)
    return found


_Known = Annotated[_Server, Depends(_server)]
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (400, 401, 403, 404, 408, 409, 413, 415, 429, 503)
}
_router = APIRouter(prefix="/v1", responses=_ERRORS)


def management(registry: Managing, *, version: str) -> FastAPI:
    """The application of /v1; the sizes of what it is sent are bounded around it.

    Args:
        registry: What it manages.
        version: Of the server.
    """
    app = FastAPI(
        title="Tessera",
        version=version,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    app.state.server, app.state.registry = _Server(registry), registry
    app.include_router(_router)
    for kind in (TesseraError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _problem)
    described = app.openapi

    def without_422() -> dict[str, Any]:
        # FastAPI describes an answer to malformed requests that `_problem` replaces by 400.
        found = described()
        for methods in found["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        return found

    # FastAPI's documented way to change what it says of itself.
    app.openapi = without_422  # type: ignore[method-assign]
    return app


def _problem(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        cause = error.__cause__
        if isinstance(cause, TesseraError):  # FastAPI says of it only that it could not parse
            error = cause
        else:
            headers = [(k.encode(), v.encode()) for k, v in (error.headers or {}).items()]
            error = HttpError(error.status_code, str(error.detail), headers=headers)
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        error = InputError(f"{where[:200]}: {first['msg']}")
    id = str(request.scope.get("tessera.id", ""))
    if status_of(error) != 500:  # of those the application around this one is told
        log_failure(error, id)
    status, body, pairs = describe(error, id)
    answer = Response(body, status, media_type="application/json")
    answer.raw_headers += pairs
    return answer


@_router.get("/key")
def own_key(by: By) -> Key:
    """The key that asks."""
    return by


@_router.post("/tenants", status_code=201)
def create_tenant(body: NewTenant, by: By, server: _Known) -> Tenant:
    """Make a tenant. Needs an admin's key."""
    want_scope(by, "admin")
    return server.registry.create_tenant(tenant_name(body.name), by=by)


@_router.get("/tenants")
def tenants(by: By, server: _Known) -> list[Tenant]:
    """All tenants; with a tenant's key, itself."""
    return [t for t in server.registry.tenants() if by.is_admin or t.name == by.tenant]


@_router.post("/tenants/{tenant}/keys", status_code=201)
def create_key(tenant: str, body: NewKey, by: By, server: _Known) -> KeyMade:
    """Make a key; its secret is said this once."""
    return _create_key(server, owner_of(by, tenant), body, by)


@_router.get("/tenants/{tenant}/keys")
def keys(tenant: str, by: By, server: _Known) -> list[Key]:
    """The keys of a tenant that are in force; their secrets are kept nowhere."""
    return list(server.registry.keys(owner_of(by, tenant)))


@_router.delete("/tenants/{tenant}/keys/{id}", status_code=204)
def revoke_key(tenant: str, id: str, by: By, server: _Known) -> None:
    """Put a key out of force."""
    _revoke_key(server, owner_of(by, tenant), id, by)


@_router.post("/keys", status_code=201)
def create_own_key(body: NewKey, by: By, server: _Known) -> KeyMade:
    """Make a key like the one that asks: an admin's, with the scope admin, or its tenant's."""
    return _create_key(server, _own(by), body, by)


@_router.get("/keys")
def own_keys(by: By, server: _Known) -> list[Key]:
    """The keys in force: the admins', where an admin's asks, or its tenant's."""
    return list(server.registry.keys(_own(by)))


@_router.delete("/keys/{id}", status_code=204)
def revoke_own_key(id: str, by: By, server: _Known) -> None:
    """Put one of those out of force; not the last admin's."""
    _revoke_key(server, _own(by), id, by)


def _own(by: Key) -> str | None:
    """Whose keys are the key's own kind; None: the admins'."""
    want_scope(by, "manage")
    return by.tenant


def _create_key(server: _Server, owner: str | None, body: NewKey, by: Key) -> KeyMade:
    if owner is not None and "admin" in body.scopes:
        raise AccessError("a tenant's key has the scopes infer and manage, and never admin")
    key, secret = server.registry.create_key(owner, frozenset(body.scopes), by=by)
    return KeyMade(key=key, secret=secret)


def _revoke_key(server: _Server, owner: str | None, id: str, by: Key) -> None:
    keys = server.registry.view().keys.values()
    if not any(k.id == id and k.tenant == owner for k in keys):
        whose = "the admins have" if owner is None else f"tenant {owner!r} has"
        raise UnknownNameError(f"{whose} no key {id[:80]!r} in force")
    server.registry.revoke_key(id, by=by)


@_router.post("/tenants/{tenant}/deltas", status_code=201, openapi_extra=_FORM)
async def upload(tenant: str, request: Request, by: By, server: _Known) -> DeltaRecord:
    """Upload a delta; the same one again is the same record."""
    owner = owner_of(by, tenant)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HttpError(415, "a delta is uploaded as multipart/form-data")
    # One at a time of a tenant, so that slow ones keep nobody else from it.
    if owner in server.uploading:
        raise BusyError(f"an upload of {owner}'s is under way; one is taken at a time")
    server.uploading.add(owner)
    try:
        async with request.form(max_files=_FILES, max_fields=4) as form, server.memory:
            parent = form.get("parent", "")
            if not isinstance(parent, str):
                raise InputError("the field parent must be text, it is a file")
            files = await _files(form)
            return await run_in_threadpool(_put, server.registry, owner, files, by, parent)
    finally:
        server.uploading.discard(owner)


async def _files(form: FormData) -> list[tuple[str, bytes]]:
    unknown = {k for k, v in form.multi_items() if not isinstance(v, UploadFile)} - {"parent"}
    if unknown:
        raise InputError(f"the upload has a field {min(unknown)[:60]!r} that is no file")
    return [
        (v.filename or "", await v.read())
        for _, v in form.multi_items()
        if isinstance(v, UploadFile)
    ]


def _put(
    registry: Managing, tenant: str, files: Sequence[tuple[str, bytes]], by: Key, parent: str
) -> DeltaRecord:
    return registry.put_delta(tenant, delta_of(files), by=by, parent=parent)


@_router.get("/tenants/{tenant}/deltas")
def deltas(tenant: str, by: By, server: _Known) -> list[DeltaRecord]:
    """The deltas of a tenant."""
    return list(server.registry.deltas(owner_of(by, tenant)))


@_router.get("/tenants/{tenant}/deltas/{hash}")
def delta(tenant: str, hash: str, by: By, server: _Known) -> DeltaRecord:
    """One of them."""
    return server.registry.delta(owner_of(by, tenant), hash)


@_router.get("/tenants/{tenant}/aliases")
def aliases(tenant: str, by: By, server: _Known) -> list[Alias]:
    """The aliases of a tenant: the models it can ask."""
    return list(server.registry.aliases(owner_of(by, tenant)))


@_router.get("/tenants/{tenant}/aliases/{name}")
def alias(tenant: str, name: str, by: By, server: _Known) -> Alias:
    """One of them."""
    return server.registry.alias(owner_of(by, tenant), name)


@_router.put("/tenants/{tenant}/aliases/{name}")
def set_alias(tenant: str, name: str, body: NewAlias, by: By, server: _Known) -> Alias:
    """Point an alias to a delta, if its generation is still the one that was read."""
    return server.registry.set_alias(
        owner_of(by, tenant),
        name,
        body.delta,
        generation=body.generation,
        by=by,
        reason=body.reason,
    )


@_router.post("/tenants/{tenant}/aliases/{name}:rollback")
def rollback(tenant: str, name: str, by: By, server: _Known, body: Rollback | None = None) -> Alias:
    """Point an alias to the delta it had before, as a new generation."""
    said = body or Rollback()
    return server.registry.rollback(
        owner_of(by, tenant), name, generation=said.generation, by=by, reason=said.reason
    )


@_router.get("/tenants/{tenant}/aliases/{name}/history")
def history(tenant: str, name: str, by: By, server: _Known) -> list[Alias]:
    """All generations of an alias."""
    return list(server.registry.history(owner_of(by, tenant), name))
