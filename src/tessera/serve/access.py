"""Secrets and what they allow."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping

import sqlalchemy as sa
from sqlalchemy import Connection

from tessera.errors import AccessError, InputError, UnknownNameError
from tessera.serve import schema
from tessera.serve.records import SCOPES, SYSTEM, Key, Tenant, tenant_name

__all__ = [
    "check_of",
    "check_scopes",
    "digest",
    "find_key",
    "find_tenant",
    "given_secret",
    "new_id",
    "new_secret",
    "require_admin",
    "require_tenant",
]

_PREFIX = "tsr_"  # so that scanners of repositories can know one
_FEWEST, _MOST = 20, 256


def new_secret() -> str:
    """256 bits nobody can guess, as "tsr_" and 43 characters.

    The one draw of Tessera's that no seed repeats: a secret that could be drawn again is none.

    Example:
        >>> len(new_secret()), new_secret() == new_secret()
        (47, False)
    """
    return _PREFIX + secrets.token_urlsafe(32)


def new_id() -> str:
    """A key's public name; unlike a counter it does not tell how many keys there are.

    Example:
        >>> len(new_id())
        16
    """
    return secrets.token_hex(8)


def digest(secret: str) -> bytes:
    """What is kept of a secret.

    One of ours has 256 bits, so no slow hash is needed: there is no list of likely ones to try.

    Example:
        >>> digest("tsr_x").hex()[:8]
        '433801c2'
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def check_of(id: str, digest: str) -> str:
    """What the audit log has of a key's digest: whether it is still that one can be told from it.

    Args:
        id: Of the key.
        digest: Of its secret, in hex.

    Example:
        >>> check_of("k1", digest("tsr_x").hex())[:8]
        'd9adc56c'
    """
    return hashlib.sha256(f"{id}:{digest}".encode()).hexdigest()


def given_secret(secret: str) -> str:
    """A secret that an operator chose, if it can be one.

    Raises:
        InputError: It is too short or too long, or has characters that no header carries.

    Example:
        >>> given_secret("correct-horse-battery-staple")[:7]
        'correct'
    """
    fits = _FEWEST <= len(secret) <= _MOST
    if fits and secret.isascii() and secret.isprintable() and " " not in secret:
        return secret
    raise InputError(
        f"an admin key is {_FEWEST} to {_MOST} printable ASCII characters without blanks, got "
        f"{len(secret)} characters. Make one with: "
        "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
    )


def find_key(keys: Mapping[bytes, Key], secret: str) -> Key:
    """The key of a secret, in a time that tells nothing of the secrets that are kept.

    Nothing compares secrets character by character: what is looked up is the sha256 of the guess,
    which a guesser cannot steer, in a table that compares a keyed 64-bit hash of it first. How
    long that takes says whether a whole digest was hit, as the answer does.

    Raises:
        AccessError: There is none in force.
    """
    key = keys.get(digest(secret)) if len(secret) <= _MOST else None
    if key is None:
        raise AccessError(
            "the key is unknown or revoked. Send one as 'Authorization: Bearer KEY' or "
            "'X-API-Key: KEY'"
        )
    return key


def check_scopes(tenant: str | None, scopes: Collection[str]) -> frozenset[str]:
    """The scopes, if a key of this tenant (None: an admin's) may have them.

    Raises:
        InputError: It may not.

    Example:
        >>> sorted(check_scopes("acme", ["manage", "infer"]))
        ['infer', 'manage']
    """
    if isinstance(scopes, str) or not all(isinstance(scope, str) for scope in scopes):
        raise InputError("the scopes of a key are a list of text")
    found = frozenset(scopes)
    if tenant is None and found == {"admin"}:
        return found
    if tenant is not None and found and found <= SCOPES - {"admin"}:
        return found
    raise InputError(
        "a tenant's key has the scopes infer, manage or both; an admin's, of no tenant, has admin; "
        f"got {sorted(s[:40] for s in found)[:5]}"
    )


def require_admin(connection: Connection, by: Key) -> None:
    """Raise unless an admin's key that is still in force acts.

    Raises:
        AccessError: It is another's, or was revoked.
    """
    _require_in_force(connection, by)
    if not by.is_admin:
        raise AccessError(f"this needs an admin's key; {by.id} is one of {by.tenant}")


def require_tenant(
    connection: Connection, tenant: str, by: Key, *, scope: str = "manage"
) -> Tenant:
    """The tenant, if the key may manage it, or whatever `scope` says.

    Raises:
        UnknownNameError: There is no such tenant, or it is none of the key's business.
        AccessError: The key was revoked, or may not manage.
    """
    _require_in_force(connection, by)
    if not by.is_admin and by.tenant != tenant:
        raise _no_tenant(tenant_name(tenant))  # as if there were none: names are nobody else's
    if not by.scopes & {"admin", scope}:
        raise AccessError(f"this needs the scope {scope}; the key {by.id} has {sorted(by.scopes)}")
    return find_tenant(connection, tenant)


def find_tenant(connection: Connection, name: str) -> Tenant:
    """The tenant of that name.

    Raises:
        UnknownNameError: There is none.
    """
    t = schema.tenants
    row = connection.execute(sa.select(t).where(t.c.name == tenant_name(name))).one_or_none()
    if row is None:
        raise _no_tenant(name)
    return Tenant(name=row.name, created_s=row.created_s, max_deltas=row.max_deltas)


def _no_tenant(name: str) -> UnknownNameError:
    return UnknownNameError(f"there is no tenant {name!r}")


def _require_in_force(connection: Connection, by: Key) -> None:
    if by is SYSTEM:
        return
    t = schema.keys
    # It was in force when its request came in; that may be a while ago.
    row = connection.execute(sa.select(t.c.revoked_s).where(t.c.id == by.id)).one_or_none()
    if row is None or row.revoked_s is not None:
        raise AccessError(f"the key {by.id} is unknown or revoked")
