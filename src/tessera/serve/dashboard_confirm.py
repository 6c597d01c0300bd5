"""What is asked before an alias is changed: what will become of what, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from tessera.errors import ConflictError, InputError, UnknownNameError
from tessera.serve.dashboard_parts import Context
from tessera.serve.dashboard_rollout import Rolling
from tessera.serve.records import Alias, alias_name
from tessera.serve.registry import Registry
from tessera.serve.rollout_values import Gate

__all__ = ["Confirming"]


@final
class Confirming:
    """The page between a button and what it does; its form is about what the page shows.

    Args:
        registry: Is asked what there is.
        rolling: Knows gates and experiments.
    """

    def __init__(self, registry: Registry, rolling: Rolling) -> None:
        self._registry, self._rolling = registry, rolling

    def page(self, tenant: str, query: Mapping[str, str]) -> Context:
        """The values of the page.

        Args:
            tenant: Whose alias.
            query: "do": promote, rollback or end; "alias", or "new" for one that is not there yet;
                "delta" to promote.

        Raises:
            InputError: It asks for nothing that there is.
            UnknownNameError: There is no such tenant, alias, delta or experiment.
            ConflictError: There is nothing to go back to.
        """
        self._registry.tenant(tenant)
        new = query.get("new", "").strip()
        name = alias_name(new or query.get("alias", ""))
        do = query.get("do", "")
        if do == "promote":
            return self._promote(tenant, name, query, new=bool(new))
        alias = self._registry.alias(tenant, name)
        if do == "rollback":
            return self._roll_back(alias)
        if do == "end":
            return self._end(alias)
        raise InputError("this address asks for nothing that can be done here")

    def _promote(self, tenant: str, name: str, query: Mapping[str, str], *, new: bool) -> Context:
        delta, alias = query.get("delta", ""), self._find(tenant, name)
        if new and alias is not None:
            raise ConflictError(f"{tenant} has an alias {name!r} already; choose it from the list")
        if alias is None and not new:
            raise UnknownNameError(f"{tenant} has no alias {name!r}")
        if alias is not None and alias.delta == delta:
            raise InputError(f"the alias {name!r} points to {delta or 'the base'} already")
        kind = self._registry.delta(tenant, delta).kind if delta else ""
        gate = self._rolling.last_about(alias, delta) if alias else None
        notes = [_gate_note(alias, gate), *self._experiment_notes(alias)]
        return {
            **self._common("promote", tenant, name, alias, notes),
            "then": delta,
            "then_kind": kind,
            "reason": f"gate {gate.id}" if gate and gate.passed else "",
        }

    def _roll_back(self, alias: Alias) -> Context:
        before = self._registry.listing.before(alias.tenant, alias.name)
        if before is None:
            raise ConflictError(
                f"the alias {alias.name!r} is at the first it ever pointed to; there is nothing "
                "before"
            )
        notes = [("", f"It goes back to what generation {before.generation} pointed to.")]
        return {
            **self._common("rollback", alias.tenant, alias.name, alias, notes),
            "then": before.delta,
            "then_kind": "",
            "notes": notes + self._experiment_notes(alias),
        }

    def _end(self, alias: Alias) -> Context:
        found = self._registry.rollouts.experiments.get(alias.tenant, alias.name)
        notes = [("", "The feedback that came so far stays, and so do the gates.")]
        return {
            **self._common("end", alias.tenant, alias.name, alias, notes),
            "then": alias.delta,
            "then_kind": "",
            "experiment": found,
        }

    def _common(
        self,
        do: str,
        tenant: str,
        name: str,
        alias: Alias | None,
        notes: list[tuple[str, str]],
    ) -> Context:
        return {
            "do": do,
            "tenant": tenant,
            "name": name,
            "alias": alias,
            "generation": alias.generation if alias else 0,
            "experiment": None,
            "reason": "",
            "notes": notes,
        }

    def _find(self, tenant: str, name: str) -> Alias | None:
        try:
            return self._registry.alias(tenant, name)
        except UnknownNameError:
            return None

    def _experiment_notes(self, alias: Alias | None) -> list[tuple[str, str]]:
        running = self._rolling.beside([alias]) if alias else {}
        return [
            (
                "warn",
                f"It ends the experiment with {e['is'].candidate[:12] or 'the base'}, which has "
                f"{e['share']} of the traffic.",
            )
            for e in running.values()
        ]


def _gate_note(alias: Alias | None, gate: Gate | None) -> tuple[str, str]:
    if alias is None:
        return "", "The alias is new: from now on it can be asked."
    if gate is None:
        return "warn", "No gate has compared it with what the alias points to now."
    if gate.passed:
        return "good", f"It passed the gate {gate.id[:12]} against what the alias points to."
    reasons = "; ".join(gate.decision["reasons"][:3])
    return "bad", f"The gate {gate.id[:12]} refused it: {reasons}."
