"""What stands on each page of the dashboard: values for the templates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from markupsafe import Markup

from tessera.serve.dashboard_chart import spark
from tessera.serve.dashboard_confirm import Confirming
from tessera.serve.dashboard_learning import Progress
from tessera.serve.dashboard_log import Chain
from tessera.serve.dashboard_parts import Context, held, latency_chart, rate_chart, tile, tiles
from tessera.serve.dashboard_rollout import Rolling
from tessera.serve.dashboard_traffic import Look, Traffic
from tessera.serve.records import Alias
from tessera.serve.registry import Registry

__all__ = ["Occupied", "Seen", "Views", "Watched"]

_TENANTS, _ALIASES, _DELTAS, _HISTORY, _OPTIONS = 50, 50, 50, 50, 200
_SWAPS, _EXPERIMENTS, _GATES, _STEPS, _HAPPENED, _SPARKS = 8, 8, 10, 10, 12, 12
_LATELY = 50_000  # events
_TRAFFIC = ("request", "batch", "shadow", "feedback")  # events that are no changes

_KINDS = (
    "alias",
    "delta",
    "experiment",
    "gate",
    "watch",
    "learn",
    "session",
    "key",
    "tenant",
    "server",
    "feedback",
    "request",
    "batch",
    "shadow",
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
        registry: Tenants, keys, deltas, aliases, rollouts, learning and the log.
        engine: Its queue and slots.
        traffic: Counts and latencies.
        chain: Whether the log was checked.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        registry: Registry,
        engine: Watched,
        traffic: Traffic,
        chain: Chain,
        clock: Callable[[], float],
    ) -> None:
        self._registry, self._engine, self._traffic = registry, engine, traffic
        self._chain, self._clock = chain, clock
        self._rolling = Rolling(registry)
        self._progress = Progress(registry.learning)
        self._confirming = Confirming(registry, self._rolling)

    # -- pages --------------------------------------------------------------------------------

    def overview(self, query: Mapping[str, str]) -> Seen:
        """All of it at a glance."""
        self._traffic.sample()
        look, listing = self._traffic.look(), self._registry.listing
        view, part = self._registry.view(), query.get("part", "").strip().lower()[:63]
        shown = listing.tenants(after=query.get("after", ""), part=part, limit=_TENANTS + 1)
        rest, shown = shown[_TENANTS:], shown[:_TENANTS]
        deltas = listing.held([t.name for t in shown])
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
        tenants, total = listing.totals()
        experiments, running = self._rolling.under_way(_EXPERIMENTS)
        values = {
            "held": held(tenants, total, len(view.aliases)),
            "tiles": [*tiles(look.now()), *self._engine_tiles()],
            "charts": _charts(look, ""),
            "tenants": rows,
            "many": tenants > _TENANTS or part,
            "part": part,
            "after": shown[-1].name if rest else "",
            "experiments": experiments,
            "running": running,
            "swaps": sorted(view.aliases.values(), key=lambda a: -a.changed_s)[:_SWAPS],
        }
        return Seen(template="overview.html", values=values)

    def tenant(self, query: Mapping[str, str], name: str) -> Seen:
        """One tenant: aliases, budget, deltas, sessions, keys."""
        registry, listing = self._registry, self._registry.listing
        tenant, keys = registry.tenant(name), registry.keys(name)
        aliases, many = listing.aliases(name, after=query.get("aliases", ""), limit=_ALIASES + 1)
        onward, aliases = aliases[_ALIASES:], aliases[:_ALIASES]
        begin = _whole(query.get("from"), 0)
        deltas = listing.deltas(name, skip=begin, limit=_DELTAS)
        uses: dict[str, list[str]] = {}
        for alias in listing.pointing(name, [d.hash for d in deltas], limit=_OPTIONS):
            uses.setdefault(alias.delta, []).append(alias.name)
        look, count = self._traffic.look(), listing.held([name])[name]
        figures = look.now(name)
        values = {
            "tenant": tenant,
            "aliases": aliases,
            "many": many,
            "onward": aliases[-1].name if onward else "",
            "kinds": listing.kinds(name, {a.delta for a in aliases}),
            "experiments": self._rolling.beside(aliases),
            "sparks": self._progress.sparks(aliases[:_SPARKS], self._clock()),
            "budget": self._progress.budget(name),
            "policies": self._progress.policies(name, _SPARKS),
            "sessions": registry.sessions.all(name)[:_OPTIONS],
            "deltas": deltas,
            "begin": begin,
            "held": count,
            "next": begin + _DELTAS if begin + _DELTAS < count else 0,
            "uses": uses,
            "keys": [{"id": k.id, "scopes": ", ".join(sorted(k.scopes))} for k in keys],
            "tiles": tiles(figures),
            "charts": _charts(look, name),
        }
        parts = [*_states(aliases), *(k.id for k in keys), str(count)]
        return Seen(template="tenant.html", values=values, state=_digest(parts))

    def alias(self, query: Mapping[str, str], tenant: str, name: str) -> Seen:
        """One alias: how it does, what is tried beside it, where it pointed, and where it could."""
        registry, listing = self._registry, self._registry.listing
        alias = registry.alias(tenant, name)
        before = _whole(query.get("before"), 1 << 62)
        history = listing.history(tenant, name, before=before, limit=_HISTORY + 1)
        older, history = history[_HISTORY:], history[:_HISTORY]
        recent = listing.history(tenant, name, limit=_HISTORY) if "before" in query else history
        options = listing.deltas(tenant, limit=_OPTIONS + 1)
        gates, edge = self._rolling.gates(alias, _GATES)
        policy = self._progress.policy(alias)
        values = {
            "alias": alias,
            "previous": listing.before(tenant, name),
            "history": history,
            "before": history[-1].generation if older else 0,
            "deltas": [d for d in options if d.hash != alias.delta][:_OPTIONS],
            "kinds": listing.kinds(tenant, {h.delta for h in [*history, alias]}),
            "accuracy": self._progress.accuracy(alias, recent, self._clock()),
            "experiment": self._rolling.experiment(alias),
            "gates": gates,
            "edge": edge,
            "policy": policy,
            "steps": self._progress.steps(tenant, name, _STEPS) if policy else [],
            "events": listing.events(
                tenant=tenant, alias=name, but=_TRAFFIC, limit=_HAPPENED, most=_LATELY
            ).events,
        }
        return Seen(template="alias.html", values=values, state=_digest(_states([alias])))

    def gate(self, query: Mapping[str, str], tenant: str, name: str, id: str) -> Seen:
        """One gate and its evidence, from which it is decided again."""
        alias = self._registry.alias(tenant, name)
        found = self._rolling.gate(alias, id, check="check" in query)
        return Seen(template="gate.html", values={"alias": alias, "gate": found})

    def evidence(self, tenant: str, name: str, id: str) -> bytes:
        """The file that a gate was decided on."""
        return self._rolling.evidence(self._registry.alias(tenant, name), id)

    def delta(self, tenant: str, hash: str) -> Seen:
        """One delta, and the aliases that point to it or could."""
        registry, listing = self._registry, self._registry.listing
        record = registry.delta(tenant, hash)
        aliases, _ = listing.aliases(tenant, limit=_OPTIONS)
        values = {
            "delta": record,
            "pointing": listing.pointing(tenant, [hash], limit=_OPTIONS),
            "others": [a for a in aliases if a.delta != hash],
        }
        return Seen(template="delta.html", values=values)

    def confirm(self, query: Mapping[str, str], tenant: str) -> Seen:
        """What an action on an alias would do."""
        found = self._confirming.page(tenant, query)
        now = found["alias"]
        state = _digest(_states([now])) if now else ""
        return Seen(template="confirm.html", values=found, state=state)

    def events(self, query: Mapping[str, str], *, live: bool) -> Seen:
        """The log.

        Args:
            query: "tenant", "alias", "kind" ("changes": all but requests and batches; "all"; one,
                or the first part of some), "before".
            live: Only whether there is news is asked for.
        """
        tenant, kind = query.get("tenant", ""), query.get("kind", "changes")
        alias, before = query.get("alias", ""), _whole(query.get("before"), 0) or None
        head, found = self._registry.audit.head(), None
        if not live:
            found = self._registry.listing.events(
                before=before,
                tenant=tenant,
                alias=alias,
                kind="" if kind in ("all", "changes") else kind,
                but=_TRAFFIC if kind == "changes" else (),
            )
        values = {
            "page": found,
            "filter": {"tenant": tenant, "alias": alias, "kind": kind},
            "tenants": [t.name for t in self._registry.listing.tenants(limit=_OPTIONS)],
            "kinds": _KINDS if kind in (*_KINDS, "all", "changes") else (*_KINDS, kind),
            "head": head,
            "verdict": self._chain.verdict,
        }
        # Under load there always is news; that a page of the past has not changed is certain.
        return Seen(
            template="events.html", values=values, state="" if before else _digest([head[1]])
        )

    # -- parts of pages -----------------------------------------------------------------------

    def _engine_tiles(self) -> list[Context]:
        engine = self._engine
        room = f"of {engine.queue_rows:,} that may wait" if isinstance(engine, Occupied) else ""
        found = [tile("Rows in the queue", f"{engine.waiting():,}", room)]
        if isinstance(engine, Occupied):
            found.append(
                tile("Slots in use", f"{engine.slots_used:,}", f"of {engine.slots:,} for deltas")
            )
        return found


def _spark(look: Look, tenant: str) -> Markup:
    steps = look.course(tenant, steps=30)
    return spark([s.per_minute for s in steps], summary="requests a minute, the last hour")


def _charts(look: Look, tenant: str) -> list[Context]:
    steps = look.course(tenant)
    return [rate_chart(steps), latency_chart(steps)]


def _states(aliases: Sequence[Alias]) -> list[str]:
    return [f"{a.name} {a.generation}" for a in aliases]


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _whole(text: str | None, default: int) -> int:
    """A number from an address; what is none there is taken for the default."""
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 18:
        return default
    return int(text)
