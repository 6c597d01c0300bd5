"""What the buttons of the dashboard do: each is one call of the registry, as with /v1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from tessera.errors import ConflictError, InputError, UnknownNameError
from tessera.serve.dashboard_log import Chain
from tessera.serve.records import Alias, Key
from tessera.serve.registry import Registry

__all__ = ["Actions"]

_Form = Mapping[str, str]
_Done = tuple[str, str]  # the page to go to, and what it says


@final
class Actions:
    """Promotes, rolls back, ends experiments, revokes, checks.

    An alias is only changed if it still is at the generation that the page showed; else the
    registry refuses, and the page says what has become of it.

    Args:
        registry: Is changed.
        chain: Is checked.
    """

    def __init__(self, registry: Registry, chain: Chain) -> None:
        self._registry, self._chain = registry, chain

    def on_tenant(self, form: _Form, by: Key, tenant: str) -> _Done:
        """Revoke a key of the tenant.

        Raises:
            UnknownNameError: It has no such key in force.
        """
        _require(form, "revoke")
        id = form.get("key", "")
        if not any(k.id == id for k in self._registry.keys(tenant)):
            raise UnknownNameError(f"{tenant} has no key {id[:80]!r} in force")
        self._registry.revoke_key(id, by=by)
        return f"/tenants/{tenant}", f"The key {id} is revoked."

    def on_alias(self, form: _Form, by: Key, tenant: str, alias: str) -> _Done:
        """Roll an alias back, point it to another delta, or end its experiment.

        Raises:
            ConflictError: It is at another generation, there is nothing before, or it is another
                experiment.
            InputError: The form asks for nothing that there is.
        """
        do, reason = form.get("do"), form.get("reason", "").strip()
        if do == "end":
            return self._end(tenant, alias, form.get("experiment", ""), reason, by)
        generation = _generation(form.get("generation", ""))
        if do == "rollback":
            found = self._registry.rollback(
                tenant, alias, generation=generation, by=by, reason=reason
            )
            return _page(found), f"Rolled back. {_where(found)}"
        _require(form, "promote")
        if "delta" not in form:
            raise InputError("choose a delta to promote")
        return self._point(tenant, alias, form["delta"], generation, reason, by)

    def on_delta(self, form: _Form, by: Key, tenant: str, delta: str) -> _Done:
        """Point an alias to the delta: an existing one, "GENERATION NAME", or a new one.

        Raises:
            ConflictError: The alias is at another generation.
            InputError: The form names no alias.
        """
        _require(form, "promote")
        generation, _, name = form.get("alias", "").partition(" ")
        new = form.get("new", "").strip()
        if new:
            generation, name = "0", new
        if not name:
            raise InputError("choose an alias, or name a new one")
        reason = form.get("reason", "").strip()
        return self._point(tenant, name, delta, _generation(generation), reason, by)

    def on_events(self, form: _Form) -> _Done:
        """Check the chain.

        Raises:
            BusyError: That is being done already.
        """
        _require(form, "verify")
        self._chain.check()
        return "/events", ""  # the page says what came of it

    def _end(self, tenant: str, alias: str, id: str, reason: str, by: Key) -> _Done:
        experiments = self._registry.rollouts.experiments
        found = experiments.get(tenant, alias)
        if found.id != id:
            raise ConflictError(
                f"the experiment on {alias!r} is {found.id} by now; look at it, then decide"
            )
        experiments.end(tenant, alias, by=by, reason=reason)
        said = f"The experiment is ended: everybody gets what {alias} points to."
        return f"/tenants/{tenant}/aliases/{alias}", said

    def _point(
        self, tenant: str, alias: str, delta: str, generation: int, reason: str, by: Key
    ) -> _Done:
        found = self._registry.set_alias(
            tenant, alias, delta, generation=generation, reason=reason, by=by
        )
        return _page(found), f"Promoted. {_where(found)}"


def _require(form: _Form, action: str) -> None:
    if form.get("do") != action:
        raise InputError("the form asks for nothing that can be done here")


def _generation(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise InputError("the form does not say which generation it was about")
    return int(text)


def _page(alias: Alias) -> str:
    return f"/tenants/{alias.tenant}/aliases/{alias.name}"


def _where(alias: Alias) -> str:
    what = f"delta {alias.delta[:12]}" if alias.delta else "the base alone"
    return f"{alias.name} is at generation {alias.generation}: {what}."
