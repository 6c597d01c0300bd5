"""Counts and latencies for Prometheus, with a bound on how many series there can be."""

from __future__ import annotations

import threading
from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tessera.serve.records import Event

__all__ = ["Meters"]

_OTHER = "_other"  # which no tenant can be called
_ANSWERS = ("request", "batch")  # which are counted as requests, and are many
_FITS = ("delta.fit", "learn.fit")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@final
class Meters:
    """What the server counts.

    The first `tenants` tenants have a label of their own, those that come later share "_other".

    Args:
        tenants: How many.

    Example:
        >>> meters = Meters(1)
        >>> for tenant in ("acme", "globex"):
        ...     meters.done("infer", tenant, 200, 0.004)
        >>> [w for w in meters.page().decode().splitlines() if w.startswith("tessera_requests_t")]
        ['tessera_requests_total{route="infer",status="200",tenant="acme"} 1.0',
         'tessera_requests_total{route="infer",status="200",tenant="_other"} 1.0']
    """

    def __init__(self, tenants: int) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._most = tenants
        self._tenants: set[str] = set()
        self._requests = Counter(
            "tessera_requests",
            "Requests answered",
            ("route", "tenant", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "tessera_request_seconds",
            "From the head of a request to its answer",
            ("route", "tenant"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.under_way = Gauge(
            "tessera_requests_under_way", "Requests being answered", registry=self.registry
        )
        self._events = Counter(
            "tessera_events",
            "Events that this process wrote into the audit log, but for requests and batches",
            ("kind", "tenant"),
            registry=self.registry,
        )
        self._fit_seconds = Counter(
            "tessera_fit_seconds", "That fits took", ("tenant",), registry=self.registry
        )
        self._lock = threading.Lock()
        # labels() checks and hashes each time; the hot path keeps what it found.
        self._known: dict[tuple[str, str, int], tuple[Any, Any]] = {}

    def done(self, route: str, tenant: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            route: What it was for: a word of ours, never the path, which is the client's.
            tenant: "" where none was known.
            status: HTTP's.
            seconds: It took.
        """
        tenant = self._label(tenant)
        name = (route, tenant, status)
        found = self._known.get(name)
        if found is None:
            found = (
                self._requests.labels(route, tenant, str(status)),
                self._seconds.labels(route, tenant),
            )
            self._known[name] = found
        found[0].inc()
        found[1].observe(seconds)

    def event(self, event: Event) -> None:
        """Count an event of the audit log; see `Audit.told`."""
        if event.kind in _ANSWERS:
            return
        tenant = self._label(event.tenant)
        self._events.labels(event.kind, tenant).inc()
        if event.kind in _FITS:
            self._fit_seconds.labels(tenant).inc(float(event.body.get("ms", 0.0)) / 1e3)

    def _label(self, tenant: str) -> str:
        if not tenant or tenant in self._tenants:
            return tenant
        with self._lock:
            if len(self._tenants) < self._most:
                self._tenants.add(tenant)
        return tenant if tenant in self._tenants else _OTHER

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
