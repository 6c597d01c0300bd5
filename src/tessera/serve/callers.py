"""Who asks /v1, and of whose things: what its parts share."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from tessera.serve.records import Key
from tessera.serve.web import authenticate, headers_of, tenant_for, want_scope

__all__ = ["By", "owner_of"]


def _caller(request: Request) -> Key:
    return authenticate(request.app.state.registry.view(), headers_of(request.scope))


# The key that asks, as an argument of a function that answers.
By = Annotated[Key, Depends(_caller)]


def owner_of(by: Key, tenant: str, scope: str = "manage") -> str:
    """The tenant a request is about, if its key may do this to it.

    Raises:
        UnknownNameError: It is another's, which is to say one that there is not.
        AccessError: The key has not the scope.

    Example:
        >>> owner_of(Key(id="k1", tenant="acme", scopes=frozenset({"manage"})), "acme")
        'acme'
    """
    owner = tenant_for(by, tenant)
    want_scope(by, scope)
    return owner
