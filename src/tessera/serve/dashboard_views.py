"""What stands on each page of the dashboard: values for the templates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from markupsafe import Markup

from tessera.serve.dashboard_chart import spark
from tessera.serve.dashboard_log import Chain, log_page
from tessera.serve.dashboard_parts import (
    Context,
    Panel,
    held,
    latency_chart,
    panel_chart,
    rate_chart,
    tile,
    tiles,
)
from tessera.serve.dashboard_traffic import Look, Traffic
from tessera.serve.records import Alias, Event, View
from tessera.serve.registry import Registry

__all__ = ["Occupied", "Seen", "Views", "Watched"]

_TENANTS, _DELTAS, _HISTORY, _OPTIONS, _SWAPS = 100, 50, 50, 200, 8
_TRAFFIC = ("request", "batch")  # events that are no changes

_KINDS = (
    "alias.set",
    "alias.rolled_back",
    "delta.put",
    "delta.replaced",
    "key.created",
    "key.revoked",
    "tenant.created",
    "server.start",
    "request",
    "batch",
)


class Watched(Protocol):
    """What is asked of an engine."""

    def waiting(self) -> int:
        """Rows in the queue."""


@runtime_checkable
class Occupied(Protocol):
    """What an engine may say beside that."""

    @property
    def slots(self) -> int:
        """Deltas it can have in use."""

    @property
    def slots_used(self) -> int:
        """Deltas it has in use."""

    @property
    def queue_rows(self) -> int:
        """Rows that may wait."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """A page to be shown.

    Attributes:
        template: Its file.
        values: What stands in it.
        state: Changes when what its forms act upon has; "": it has none.
    """

    template: str
    values: Context
    state: str = ""


@final
class Views:
    """Reads what a page shows. Its methods wait for the database; any thread may call them.

    Args:
        registry: Tenants, keys, deltas, aliases and the log.
        engine: Its queue and slots.
        traffic: Counts and latencies.
        chain: Whether the log was checked.
        panels: What others show.
    """

    def __init__(
        self,
        registry: Registry,
        engine: Watched,
        traffic: Traffic,
        chain: Chain,
        panels: Sequence[Panel],
    ) -> None:
        self._registry, self._engine, self._traffic = registry, engine, traffic
        self._chain, self._panels = chain, tuple(panels)
        self._counted: tuple[int, dict[str, int]] = (-1, {})

    # -- pages --------------------------------------------------------------------------------

    def overview(self, query: Mapping[str, str]) -> Seen:
        """All of it at a glance."""
        self._traffic.sample()
        look = self._traffic.look()
        view, everyone = self._registry.view(), self._registry.tenants()
        after = query.get("after", "")
        shown = [t for t in everyone if t.name > after]
        rest, shown = shown[_TENANTS:], shown[:_TENANTS]
        deltas = self._deltas_of(view, [t.name for t in shown])
        aliases = Counter(owner for owner, _ in view.aliases)
        rows = []
        for tenant in shown:
            figures = look.now(tenant.name)
            rows.append(
                {
                    "name": tenant.name,
                    "created_s": tenant.created_s,
                    "deltas": deltas[tenant.name],
                    "aliases": aliases[tenant.name],
                    "figures": figures,
                    "spark": _spark(look, tenant.name) if figures else "",
                }
            )
        total = sum(deltas.values()) if len(shown) == len(everyone) else None
        swaps = sorted(view.aliases.values(), key=lambda a: -a.changed_s)[:_SWAPS]
        values = {
            "held": held(len(everyone), total, len(view.aliases)),
            "tiles": [*tiles(look.now()), *self._engine_tiles()],
            "charts": _charts(look, ""),
            "tenants": rows,
            "after": shown[-1].name if rest else "",
            "swaps": swaps,
            "panels": self._panels_of("overview", "", ""),
        }
        return Seen(template="overview.html", values=values)

    def tenant(self, name: str, query: Mapping[str, str]) -> Seen:
        """One tenant: aliases, deltas, keys."""
        tenant = self._registry.tenant(name)
        aliases, keys = self._registry.aliases(name), self._registry.keys(name)
        deltas = self._registry.deltas(name)[::-1]
        begin = _whole(query.get("from"), 0)
        uses: dict[str, list[str]] = {}
        for alias in aliases:
            uses.setdefault(alias.delta, []).append(alias.name)
        look = self._traffic.look()
        figures = look.now(name)
        values = {
            "tenant": tenant,
            "aliases": aliases,
            "kinds": {d.hash: d.kind for d in deltas},
            "deltas": deltas[begin : begin + _DELTAS],
            "begin": begin,
            "held": len(deltas),
            "next": begin + _DELTAS if begin + _DELTAS < len(deltas) else 0,
            "uses": uses,
            "keys": [{"id": k.id, "scopes": ", ".join(sorted(k.scopes))} for k in keys],
            "tiles": tiles(figures) if figures else [],
            "charts": _charts(look, name) if figures else [],
            "panels": self._panels_of("tenant", name, ""),
        }
        parts = [*_states(aliases), *(k.id for k in keys), str(len(deltas))]
        return Seen(template="tenant.html", values=values, state=_digest(parts))

    def alias(self, tenant: str, name: str, query: Mapping[str, str]) -> Seen:
        """One alias: where it points, where it pointed, and where it could."""
        alias = self._registry.alias(tenant, name)
        history = self._registry.history(tenant, name)[::-1]
        before = _whole(query.get("before"), 1 << 62)
        older = [h for h in history if h.generation < before]
        deltas = self._registry.deltas(tenant)[::-1]
        values = {
            "alias": alias,
            "history": older[:_HISTORY],
            "before": older[_HISTORY - 1].generation if len(older) > _HISTORY else 0,
            "deltas": [d for d in deltas if d.hash != alias.delta][:_OPTIONS],
            "kinds": {d.hash: d.kind for d in deltas},
            "panels": self._panels_of("alias", tenant, name),
        }
        return Seen(template="alias.html", values=values, state=_digest(_states([alias])))

    def delta(self, tenant: str, hash: str) -> Seen:
        """One delta, and the aliases that point to it or could."""
        record, aliases = self._registry.delta(tenant, hash), self._registry.aliases(tenant)
        values = {
            "delta": record,
            "pointing": [a for a in aliases if a.delta == hash],
            "others": [a for a in aliases if a.delta != hash],
            "panels": self._panels_of("delta", tenant, hash),
        }
        return Seen(template="delta.html", values=values, state=_digest(_states(aliases)))

    def events(self, query: Mapping[str, str], *, live: bool) -> Seen:
        """The log.

        Args:
            query: "tenant", "kind" ("changes": all but requests and batches; "all"; or one),
                "before".
            live: Only whether there is news is asked for.
        """
        tenant, kind = query.get("tenant", ""), query.get("kind", "changes")
        before = _whole(query.get("before"), 0) or None
        head = self._registry.audit.head()
        found = None

        def wanted(event: Event) -> bool:
            fits = event.kind == kind if kind not in ("all", "changes") else True
            if kind == "changes" and event.kind in _TRAFFIC:
                return False
            return fits and (not tenant or event.tenant == tenant)

        if not live:
            every = kind == "all" and not tenant
            found = log_page(self._registry.audit, before=before, wanted=None if every else wanted)
        values = {
            "page": found,
            "filter": {"tenant": tenant, "kind": kind},
            "tenants": [t.name for t in self._registry.tenants()[:1000]],
            "kinds": _KINDS if kind in (*_KINDS, "all", "changes") else (*_KINDS, kind),
            "head": head,
            "verdict": self._chain.verdict,
        }
        # Under load there always is news; that a page of the past has not changed is certain.
        return Seen(
            template="events.html", values=values, state="" if before else _digest([head[1]])
        )

    # -- parts of pages -----------------------------------------------------------------------

    def _deltas_of(self, view: View, tenants: Sequence[str]) -> dict[str, int]:
        """How many each holds; counted again when something changed."""
        revision, known = self._counted
        if revision != view.revision:
            known = {}
        counts = {t: known[t] if t in known else len(self._registry.deltas(t)) for t in tenants}
        self._counted = (view.revision, {**known, **counts})
        return counts

    def _engine_tiles(self) -> list[Context]:
        engine = self._engine
        room = f"of {engine.queue_rows:,} that may wait" if isinstance(engine, Occupied) else ""
        found = [tile("Rows in the queue", f"{engine.waiting():,}", room)]
        if isinstance(engine, Occupied):
            found.append(
                tile("Slots in use", f"{engine.slots_used:,}", f"of {engine.slots:,} for deltas")
            )
        return found

    def _panels_of(self, place: str, tenant: str, name: str) -> list[Context]:
        found = []
        for panel in self._panels:
            facts = panel.read(tenant, name) if panel.place == place else None
            if facts is not None:
                found.append({"title": panel.title, "facts": facts, "chart": panel_chart(facts)})
        return found


def _spark(look: Look, tenant: str) -> Markup:
    steps = look.course(tenant, steps=30)
    return spark([s.per_minute for s in steps], summary="requests a minute, the last hour")


def _charts(look: Look, tenant: str) -> list[Context]:
    steps = look.course(tenant)
    return [rate_chart(steps), latency_chart(steps)] if len(steps) > 1 else []


def _states(aliases: Sequence[Alias]) -> list[str]:
    return [f"{a.name} {a.generation}" for a in aliases]


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _whole(text: str | None, default: int) -> int:
    """A number from an address; what is none there is taken for the default."""
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 18:
        return default
    return int(text)
