"""How many requests there were, how long they took and how many failed, over the last hour."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from prometheus_client import CollectorRegistry

__all__ = ["Figures", "Look", "Step", "Traffic", "quantile"]

_ROUTE = "infer"
_RATE_S = 60.0
_RECENT_S = 300.0


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Figures:
    """One tenant's requests, or all, as they are now.

    Attributes:
        per_minute: Over the last minute.
        requests: Over the last five minutes; so with those below.
        failed: That the server could not answer (5xx).
        refused: That were the client's fault, or one too many (4xx).
        seconds: p50, p95 and p99; inf: beyond the last bucket. None: there was no request.
        over_s: How long "five minutes" were: less, after a start.
    """

    per_minute: float
    requests: int
    failed: int
    refused: int
    seconds: tuple[float, float, float] | None
    over_s: float


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """A piece of the last hour.

    Attributes:
        ago_s: How long ago it ended.
        per_minute: Requests.
        failed: Requests that failed (5xx).
        seconds: p50, p95 and p99; None: there was no request.
    """

    ago_s: float
    per_minute: float
    failed: int
    seconds: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True, eq=False)
class _Counts:
    requests: float
    failed: float
    refused: float
    buckets: tuple[float, ...]  # each its own, not summed up


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    at_s: float
    bounds: tuple[float, ...]
    counts: Mapping[str, _Counts]  # tenant -> counts since the start; "": all


@final
class Look:
    """The readings as they were at one moment; `Traffic.look` makes it.

    Args:
        last: The reading of that moment.
        kept: Those before, the oldest first.
        first: How many there had been before these.
    """

    def __init__(self, last: _Reading, kept: Sequence[_Reading], first: int) -> None:
        self._last, self._kept, self._first = last, kept, first

    def now(self, tenant: str = "") -> Figures | None:
        """How it is at the moment; None: nothing was counted for this tenant.

        Args:
            tenant: "": all together.
        """
        last, kept = self._last, self._kept
        if tenant and tenant not in last.counts:
            return None
        lately, before = _since(kept, last, _RATE_S), _since(kept, last, _RECENT_S)
        rate, change = _change(lately, last, tenant), _change(before, last, tenant)
        over_s = last.at_s - lately.at_s
        return Figures(
            per_minute=60.0 * rate.requests / over_s if over_s > 0 else 0.0,
            requests=round(change.requests),
            failed=round(change.failed),
            refused=round(change.refused),
            seconds=_percentiles(last.bounds, change.buckets),
            over_s=last.at_s - before.at_s,
        )

    def course(self, tenant: str = "", *, steps: int = 90) -> list[Step]:
        """The last hour, or what there is of it, in up to so many steps, the oldest first."""
        now_s, kept, first = self._last.at_s, self._kept, self._first
        stride = max(1, math.ceil(len(kept) / steps))
        # The same readings begin the steps while time goes on, so that a line does not tremble.
        ends = [r for i, r in enumerate(kept, start=first) if i % stride == 0]
        found = []
        for one, two in itertools.pairwise(ends):
            change = _change(one, two, tenant)
            found.append(
                Step(
                    ago_s=now_s - two.at_s,
                    per_minute=60.0 * change.requests / (two.at_s - one.at_s),
                    failed=round(change.failed),
                    seconds=_percentiles(two.bounds, change.buckets),
                )
            )
        return found


@final
class Traffic:
    """Readings of the meters, every few seconds, for an hour.

    The meters only count up; what happened in a time is the difference of two readings. Latencies
    are as exact as the buckets of /metrics. Any thread may ask.

    Args:
        meters: `Meters.registry`.
        every_s: Between two readings that are kept.
        keep: How many.
        clock: Seconds that only go forward.

    Example:
        >>> from tessera.serve.meters import Meters
        >>> meters, now = Meters(10), [0.0]
        >>> traffic = Traffic(meters.registry, clock=lambda: now[0])
        >>> for _ in range(30):
        ...     meters.done("infer", "acme", 200, 0.002)
        >>> now[0] = 60.0
        >>> traffic.look().now().per_minute, traffic.look().now("globex") is None
        (30.0, True)
    """

    def __init__(
        self,
        meters: CollectorRegistry,
        *,
        every_s: float = 10.0,
        keep: int = 361,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meters, self._every_s, self._clock = meters, every_s, clock
        self._kept: deque[_Reading] = deque([self._read()], maxlen=keep)
        self._taken = 1
        self._lock = threading.Lock()

    def sample(self) -> None:
        """Take a reading, if it is time for one; to be called often."""
        with self._lock:
            if self._clock() >= self._kept[-1].at_s + self._every_s:
                self._kept.append(self._read())
                self._taken += 1

    def look(self) -> Look:
        """What there is to see at the moment."""
        with self._lock:
            first = self._taken - len(self._kept)
            return Look(self._read(), tuple(self._kept), first)

    def _read(self) -> _Reading:
        requests: dict[str, list[float]] = {}
        below: dict[str, dict[float, float]] = {}
        for family in self._meters.collect():
            for sample in family.samples:
                labels = sample.labels
                if labels.get("route") != _ROUTE:
                    continue
                own = labels["tenant"]
                if sample.name == "tessera_requests_total":
                    kind = {"5": 1, "4": 2}.get(labels["status"][:1], 0)
                    for name in {own, ""}:
                        three = requests.setdefault(name, [0.0, 0.0, 0.0])
                        three[kind] += sample.value
                elif sample.name == "tessera_request_seconds_bucket":
                    bound = float(labels["le"])
                    for name in {own, ""}:
                        sums = below.setdefault(name, {})
                        sums[bound] = sums.get(bound, 0.0) + sample.value
        bounds = tuple(sorted(below.get("", ())))
        counts = {}
        for name, (well, failed, refused) in requests.items():
            sums = below.get(name, {})
            upto = [sums.get(b, 0.0) for b in bounds]
            each = tuple(b - a for a, b in zip([0.0, *upto], upto, strict=False))
            counts[name] = _Counts(well + failed + refused, failed, refused, each)
        return _Reading(self._clock(), bounds, counts)


def quantile(bounds: Sequence[float], counts: Sequence[float], share: float) -> float | None:
    """A quantile of what was counted in buckets, as if each were evenly filled.

    Args:
        bounds: Upper bound of each bucket, rising; the last is inf.
        counts: In each.
        share: In [0, 1].

    Returns:
        The quantile; inf where it lies in the last bucket, None where nothing was counted.

    Example:
        >>> quantile([1.0, 2.0, math.inf], [10, 10, 0], 0.75)
        1.5
        >>> quantile([1.0, math.inf], [0, 3], 0.5), quantile([1.0, math.inf], [0, 0], 0.5)
        (inf, None)
    """
    total = sum(counts)
    if total <= 0:
        return None
    wanted, passed, low = share * total, 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=True):
        if count > 0 and passed + count >= wanted:
            if math.isinf(bound):
                return bound
            return low + (bound - low) * max(0.0, wanted - passed) / count
        passed, low = passed + count, bound
    return math.inf


def _percentiles(
    bounds: Sequence[float], counts: Sequence[float]
) -> tuple[float, float, float] | None:
    p50, p95, p99 = (quantile(bounds, counts, q) for q in (0.5, 0.95, 0.99))
    return None if p50 is None or p95 is None or p99 is None else (p50, p95, p99)


def _since(kept: Iterable[_Reading], last: _Reading, span_s: float) -> _Reading:
    """The latest reading that is at least that old; the oldest where none is."""
    readings = list(kept)
    return next((r for r in reversed(readings) if last.at_s - r.at_s >= span_s), readings[0])


def _change(one: _Reading, two: _Reading, tenant: str) -> _Counts:
    none = (0.0,) * len(two.bounds)
    after = two.counts.get(tenant) or _Counts(0.0, 0.0, 0.0, none)
    before = one.counts.get(tenant)
    if before is None:
        return after
    buckets = before.buckets or none
    return _Counts(
        after.requests - before.requests,
        after.failed - before.failed,
        after.refused - before.refused,
        tuple(b - a for a, b in zip(buckets, after.buckets, strict=True)),
    )
