"""Counts and latencies for Prometheus, with a bound on how many series there can be."""

from __future__ import annotations

from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Meters"]

_OTHER = "_other"  # which no tenant can be called
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
        if tenant and tenant not in self._tenants:
            if len(self._tenants) < self._most:
                self._tenants.add(tenant)
            else:
                tenant = _OTHER
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

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
