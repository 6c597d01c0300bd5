"""What the HTTP face asks of the rest of the server, and a request as it goes through it."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, final

from torch import Tensor

from tessera.arch import Delta
from tessera.errors import UnknownNameError
from tessera.serve.records import Alias, DeltaRecord, Key, Tenant, View
from tessera.serve.web import HttpError, authenticate, tenant_for, want_scope

__all__ = [
    "Answered",
    "Answering",
    "Call",
    "Managing",
    "Recording",
    "Viewing",
    "alias_of",
    "only",
    "reader",
]


class Answered(Protocol):
    """What an engine's future brings: `engine.Answer`."""

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """By name."""

    @property
    def delta(self) -> str:
        """The hash of the one that computed it."""


class Answering(Protocol):
    """What is asked of an engine."""

    def has(self, delta: str) -> bool:
        """Whether `submit` will not read it from a disk."""

    def submit(
        self,
        inputs: Mapping[str, Tensor],
        delta: str,
        *,
        tenant: str,
        timeout_s: float | None = None,
    ) -> Future[Any]:
        """Queue a request."""


class Viewing(Protocol):
    """What is asked of a registry here."""

    def view(self) -> View:
        """Keys and aliases, from memory."""


class Managing(Viewing, Protocol):
    """What is asked of a registry by /v1; each call may wait for a disk or a database."""

    def create_tenant(self, name: str, *, by: Key) -> Tenant:
        """A new one."""

    def tenants(self) -> Sequence[Tenant]:
        """All."""

    def create_key(
        self, tenant: str | None, scopes: Collection[str], *, by: Key
    ) -> tuple[Key, str]:
        """A key and its secret."""

    def keys(self, tenant: str | None) -> Sequence[Key]:
        """Those in force."""

    def revoke_key(self, id: str, *, by: Key) -> None:
        """Put it out of force."""

    def put_delta(self, tenant: str, delta: Delta, *, by: Key, parent: str = "") -> DeltaRecord:
        """Keep it."""

    def deltas(self, tenant: str) -> Sequence[DeltaRecord]:
        """A tenant's."""

    def delta(self, tenant: str, hash: str) -> DeltaRecord:
        """One of a tenant's."""

    def set_alias(
        self, tenant: str, name: str, delta: str, *, generation: int, by: Key, reason: str = ""
    ) -> Alias:
        """Compare and swap."""

    def rollback(
        self, tenant: str, name: str, *, by: Key, generation: int | None = None, reason: str = ""
    ) -> Alias:
        """To the delta before."""

    def aliases(self, tenant: str) -> Sequence[Alias]:
        """A tenant's."""

    def alias(self, tenant: str, name: str) -> Alias:
        """One of a tenant's."""

    def history(self, tenant: str, name: str) -> Sequence[Alias]:
        """All generations of one."""


class Recording(Protocol):
    """What is asked of a recorder."""

    def request(
        self,
        request: str,
        *,
        tenant: str,
        alias: str,
        generation: int,
        answer: Any,
        inputs: Mapping[str, Tensor],
        arm: Mapping[str, Any] | None = None,
    ) -> None:
        """Take note of an answer."""

    def note(self, kind: str, tenant: str, body: dict[str, Any]) -> None:
        """Take note of something else."""

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until all that was noted is in the log."""


@final
class Call:
    """One request as it goes through the server.

    Args:
        id: Its request id.
        method: HTTP's.
        path: Decoded.
        headers: By lower-case name.

    Attributes:
        began_s: On the monotonic clock.
        route: For the metrics.
        tenant: For the metrics; "" while none is known.
        status: That it was answered with; 0 before.
        pattern: For the log, as all below: of the path, where `route` says less.
        about: The tenant that the path names, where `tenant` is not known.
        alias: The model, or what the path names.
        delta: That computed the answer.
        rows: Of the inputs.
        received: Bytes of the body.
        sent: Bytes of the answer.
    """

    __slots__ = (
        "about",
        "alias",
        "began_s",
        "delta",
        "headers",
        "id",
        "method",
        "path",
        "pattern",
        "received",
        "route",
        "rows",
        "sent",
        "status",
        "tenant",
    )

    def __init__(self, id: str, method: str, path: str, headers: Mapping[bytes, bytes]) -> None:
        self.id, self.method, self.path, self.headers = id, method, path, headers
        self.began_s = time.monotonic()
        self.route = "unknown"
        self.tenant = self.pattern = self.about = self.alias = self.delta = ""
        self.status = self.rows = self.received = self.sent = 0


def only(call: Call, method: str) -> None:
    """Raise unless the request has this method.

    Raises:
        HttpError: 405.
    """
    if call.method != method and (call.method, method) != ("HEAD", "GET"):
        raise HttpError(
            405,
            f"this takes {method}, not {call.method[:20]}",
            headers=[(b"allow", method.encode())],
        )


def reader(registry: Viewing, call: Call) -> tuple[str, View]:
    """Whose models a request is about, and the picture in which its key was in force.

    Raises:
        AccessError: It has no key, or one that may not infer.
        UnknownNameError: It names another tenant.
    """
    view = registry.view()
    key = authenticate(view, call.headers)
    want_scope(key, "infer")
    named = call.headers.get(b"x-tessera-tenant")
    return tenant_for(key, None if named is None else named.decode("latin-1")), view


def alias_of(registry: Viewing, call: Call, name: str, version: str | None) -> Alias:
    """The alias a request names, as it is now.

    Raises:
        AccessError: As `reader`.
        UnknownNameError: The tenant has no such alias, or not at this version.
    """
    tenant, view = reader(registry, call)
    found = view.aliases.get((tenant, name))
    if found is None:
        raise UnknownNameError(f"there is no model {name[:128]!r}")
    if version is not None and version != str(found.generation):
        raise UnknownNameError(
            f"model {name!r} is served at version {found.generation}, not {version[:20]!r}"
        )
    return found
