"""Who signs in to the dashboard: how often one may try, and what the audit log says of it."""

from __future__ import annotations

import logging
from typing import final

from starlette.requests import Request

from tessera.errors import AccessError
from tessera.serve.dashboard_session import Throttle
from tessera.serve.records import Key
from tessera.serve.registry import Registry

__all__ = ["Door"]

_LOG = logging.getLogger("tessera.serve")
_LOOPBACK = ("127.0.0.1", "::1")


@final
class Door:
    """Lets admins in.

    Each try that was allowed is an event, "dashboard.signin" or "dashboard.refused", with the
    address; whoever is told to wait leaves none, so that nobody can fill the log from outside.
    Where the event cannot be written nobody gets in.

    Args:
        registry: Knows the keys.
        throttle: By default `Throttle()`.
    """

    def __init__(self, registry: Registry, throttle: Throttle | None = None) -> None:
        self._registry, self._throttle = registry, throttle or Throttle()

    def enter(self, secret: str, request: Request) -> Key:
        """The admin's key of that secret.

        Raises:
            BusyError: Too many wrong ones were tried.
            AccessError: It is no admin's key in force.
            StorageError: The event could not be written.
        """
        address = _address(request)
        self._throttle.enter(address)
        audit, known = self._registry.audit, ""
        try:
            key = self._registry.authenticate(secret)
            known = key.id
            if not key.is_admin:
                raise AccessError("a tenant's")
        except AccessError as error:
            _LOG.warning("somebody at %s was not let in to the dashboard", address)
            audit.append("dashboard.refused", None, {"address": address, "key": known})
            raise AccessError("That is not an admin's key in force.") from error
        self._throttle.right(address)
        audit.append("dashboard.signin", None, {"address": address, "by": key.id})
        return key


def _address(request: Request) -> str:
    """Where a request comes from, in up to 64 printable characters.

    A proxy on this machine says whom it forwards, in the last place: what stands before that the
    client may have made up. From elsewhere nobody is believed.
    """
    peer = request.client.host if request.client else ""
    forwarded = request.headers.get("x-forwarded-for", "") if peer in _LOOPBACK else ""
    said = forwarded.rpartition(",")[2].strip() or peer
    return "".join(c for c in said if c.isprintable())[:64]
