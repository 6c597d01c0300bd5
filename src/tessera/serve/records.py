"""What the registry hands out: values, and the names they may have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from tessera.errors import InputError

__all__ = [
    "SCOPES",
    "SYSTEM",
    "Alias",
    "DeltaRecord",
    "Event",
    "Key",
    "Session",
    "Tenant",
    "View",
    "alias_name",
    "content_hash",
    "one_line",
    "tenant_name",
]

SCOPES = frozenset({"infer", "manage", "admin"})

# Neither can express a path: no separator, no leading dot, nothing that a URL would escape.
_TENANT = re.compile("[a-z0-9][a-z0-9-]{0,62}")
_ALIAS = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HASH = re.compile("[0-9a-f]{64}")
_MOST_LINE = 500


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tenant:
    """A namespace of deltas, aliases and keys.

    Attributes:
        name: 1 to 63 of ``a-z 0-9 -``, no hyphen first.
        created_s: Seconds since 1970.
        max_deltas: How many deltas it may hold.
    """

    name: str
    created_s: float
    max_deltas: int


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Key:
    """What a secret stands for; the secret itself is kept nowhere.

    Attributes:
        id: Its public name.
        tenant: Whose it is; None: an admin's.
        scopes: Of a tenant's key some of "infer" and "manage"; of an admin's "admin", which
            includes all.
    """

    id: str
    tenant: str | None
    scopes: frozenset[str]

    @property
    def is_admin(self) -> bool:
        """Whether it may do everything for every tenant."""
        return "admin" in self.scopes


# Who acts where no request does: a gate, a clean-up. No secret leads to it.
SYSTEM = Key(id="system", tenant=None, scopes=frozenset({"admin"}))


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaRecord:
    """A delta that a tenant holds.

    Attributes:
        hash: `Delta.hash`, its identity.
        tenant: Whose it is.
        kind: `Delta.kind`.
        base_hash: Of the base it was accepted for.
        bytes: The size of its file.
        created_s: Seconds since 1970.
        parent: The hash of the one it came from; "" if there is none.
    """

    hash: str
    tenant: str
    kind: str
    base_hash: str
    bytes: int
    created_s: float
    parent: str


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Alias:
    """A name that points to a delta, at one generation.

    Attributes:
        tenant: Whose it is.
        name: 1 to 128 of ``A-Z a-z 0-9 . _ -``, a letter or digit first.
        generation: Counts its changes, from 1.
        delta: A delta's hash; "": the base alone.
        changed_s: Seconds since 1970.
        reason: Why it was changed, in a line.
    """

    tenant: str
    name: str
    generation: int
    delta: str
    changed_s: float
    reason: str


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Session:
    """A delta under a name that ends by itself.

    Attributes:
        id: Nobody can guess it.
        name: The model's name to ask it by.
        tenant: Whose it is; nobody else can use it.
        delta: Its delta's hash.
        expires_s: When it ends, in seconds since 1970, as the clock stood when it began.
    """

    id: str
    name: str
    tenant: str
    delta: str
    expires_s: float


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Event:
    """A link of the audit chain.

    Attributes:
        seq: Counts from 1, without gaps.
        previous: The hash of the one before; 64 zeros for the first.
        hash: sha256 of the canonical JSON of [seq, previous, time_s, kind, tenant, body].
        time_s: Seconds since 1970, as the clock said; it may jump, `seq` does not.
        kind: For example "alias.set".
        tenant: Whose it is; "": the server's own.
        body: Plain JSON.
    """

    seq: int
    previous: str
    hash: str
    time_s: float
    kind: str
    tenant: str
    body: Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """What the hot path needs, as it was at one revision; never changed, only replaced.

    Attributes:
        keys: sha256 of a secret -> its key; those in force.
        aliases: (tenant, name) -> alias.
        revision: Counts the changes of the registry.
    """

    keys: Mapping[bytes, Key]
    aliases: Mapping[tuple[str, str], Alias]
    revision: int


def tenant_name(value: object) -> str:
    """The value, if a tenant may be called that.

    Raises:
        InputError: It may not.

    Example:
        >>> tenant_name("acme-2")
        'acme-2'
    """
    if isinstance(value, str) and _TENANT.fullmatch(value):
        return value
    raise InputError(
        f"a tenant's name is 1 to 63 of a-z, 0-9 and '-', no '-' first; got {_short(value)}"
    )


def alias_name(value: object) -> str:
    """The value, if an alias may be called that.

    Raises:
        InputError: It may not.

    Example:
        >>> alias_name("MiniLM.v2")
        'MiniLM.v2'
    """
    if isinstance(value, str) and _ALIAS.fullmatch(value):
        return value
    raise InputError(
        "an alias's name is 1 to 128 of A-Z, a-z, 0-9, '.', '_' and '-', a letter or digit "
        f"first; got {_short(value)}"
    )


def content_hash(value: object) -> str:
    """The value, if it is the hex digest of a sha256.

    Raises:
        InputError: It is not.

    Example:
        >>> content_hash("ab" * 32)[:6]
        'ababab'
    """
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value
    raise InputError(f"a content hash is 64 of 0-9 and a-f; got {_short(value)}")


def one_line(value: object, what: str) -> str:
    """The value, if it is a line of text that every database can keep.

    Raises:
        InputError: It is not.

    Example:
        >>> one_line("better on slice 3", "a reason")
        'better on slice 3'
    """
    if isinstance(value, str) and len(value) <= _MOST_LINE and value.isprintable():
        return value
    raise InputError(
        f"{what} is one line of up to {_MOST_LINE} printable characters; got {_short(value)}"
    )


def _short(value: object) -> str:
    # A name may be a megabyte long, and goes into logs and answers.
    return repr(value[:80] if isinstance(value, str | bytes) else type(value).__name__)
