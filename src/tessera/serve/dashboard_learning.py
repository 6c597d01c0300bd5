"""What the dashboard shows of accuracy, drift, budgets and learning from feedback."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar, final

from tessera.serve.dashboard_chart import Dot, Mark, bar, course, spark
from tessera.serve.dashboard_parts import Context, tile
from tessera.serve.dashboard_words import ago, count, energy, gain, limits, percent, span
from tessera.serve.learning import Learning
from tessera.serve.learning_values import AccuracyPoint, LearningPolicy, LearningStep
from tessera.serve.records import Alias

__all__ = ["Progress"]

K = TypeVar("K")
V = TypeVar("V")

_POINTS, _FEW_POINTS = 48, 24
_FRESH_S, _KEPT = 30.0, 1000


@final
class Progress:
    """Accuracy, budgets and policies, as values for the templates.

    Args:
        learning: Has them.
    """

    def __init__(self, learning: Learning) -> None:
        self._learning = learning
        self._drawn: dict[tuple[str, str], tuple[float, Context | None]] = {}
        self._charted: dict[tuple[str, str], tuple[tuple[int, int], list[AccuracyPoint]]] = {}

    def accuracy(self, alias: Alias, history: Sequence[Alias], now_s: float) -> Context | None:
        """Accuracy over time with drifts and swaps; None: there is no feedback."""
        points = self._points(alias.tenant, alias.name)
        if not points:
            return None
        last, drifts = points[-1], [p for p in points if p.drift]
        dots = [_dot(p, now_s) for p in points]
        marks = [
            Mark(time_s=h.changed_s, kind="swap", label=f"g{h.generation}", tip=_swapped(h, now_s))
            for h in reversed(history)
        ]
        marks += [
            Mark(time_s=p.time_s, kind="drift", label="", tip=f"{_ago(p, now_s)}: drift detected")
            for p in drifts
        ]
        right, n = _lately(points)
        total = sum(p.n for p in points)
        tiles = [
            tile(
                "Accuracy, lately",
                percent(right / n),
                f"{limits(right, n)}, of the last {count(n, 'outcome')}",
            ),
            tile("Outcomes shown", f"{total:,}", f"in {count(len(points), 'group')}"),
            tile(
                "Drifts",
                str(len(drifts)),
                f"the last {_ago(drifts[-1], now_s)}" if drifts else "none in the time shown",
                mark="bad" if drifts else "",
            ),
        ]
        middle = (points[0].time_s + last.time_s) / 2
        summary = (
            f"Accuracy of {alias.name} from {percent(points[0].accuracy)} to "
            f"{percent(last.accuracy)}; {count(len(drifts), 'drift')}"
        )
        return {
            "svg": course(dots, marks, summary=summary),
            "ticks": ("100 %", "75 %", "50 %", "25 %", "0 %"),
            "span": [ago(now_s - t) for t in (points[0].time_s, middle, last.time_s)],
            "tiles": tiles,
            "rows": [_told(p) for p in reversed(points)],
        }

    def _points(self, tenant: str, alias: str) -> list[AccuracyPoint]:
        """Those of the chart, counted again where there is news."""
        at, newest = (tenant, alias), self._learning.newest(tenant, alias)
        known, points = self._charted.get(at, ((-1, -1), []))
        if known != newest:
            points = self._learning.accuracy(tenant, alias, _POINTS)
            self._charted = _with(self._charted, at, (newest, points))
        return points

    def sparks(self, aliases: Sequence[Alias], now_s: float) -> dict[str, Context]:
        """Name of an alias -> its accuracy as small as a word, where there is feedback.

        Each is up to half a minute old: thousands of outcomes are read for it.
        """
        found = {}
        for alias in aliases:
            at = alias.tenant, alias.name
            drawn_s, drawn = self._drawn.get(at, (-math.inf, None))
            if not 0 <= now_s - drawn_s < _FRESH_S:
                drawn = self._spark(*at)
                self._drawn = _with(self._drawn, at, (now_s, drawn))
            if drawn is not None:
                found[alias.name] = drawn
        return found

    def _spark(self, tenant: str, alias: str) -> Context | None:
        points = self._learning.accuracy(tenant, alias, _FEW_POINTS)
        if not points:
            return None
        right, n = _lately(points)
        svg = spark([p.accuracy for p in points], top=1.0, summary="accuracy over time")
        return {"last": percent(right / n), "svg": svg, "drift": any(p.drift for p in points)}

    def budget(self, tenant: str) -> Context:
        """What a tenant's background fits took, of what they may take."""
        spent = self._learning.spending(tenant)
        meters = [_meter("Time", spent.ms / 1e3, spent.cap_ms / 1e3, span)]
        meters.append(_meter("Energy", spent.joules, spent.cap_joules, energy))
        ends_s = spent.since_s + spent.window_s
        return {"meters": meters, "window": span(spent.window_s), "ends_s": ends_s}

    def policies(self, tenant: str, limit: int) -> list[Context]:
        """The policies of a tenant, each with its last step."""
        found = self._learning.policies(tenant)[:limit]
        return [_policy(p) | {"steps": self.steps(tenant, p.alias, 1)} for p in found]

    def policy(self, alias: Alias) -> Context | None:
        """The policy of an alias; None: it does not learn."""
        found = self._learning.policies(alias.tenant)
        return next((_policy(p) for p in found if p.alias == alias.name), None)

    def steps(self, tenant: str, alias: str, limit: int) -> list[LearningStep]:
        """The last steps of an alias's learning, the newest first."""
        return self._learning.steps(tenant, alias, limit)[::-1]


def _with(known: dict[K, V], key: K, value: V) -> dict[K, V]:
    """A new one, since several threads may be here, that does not grow without end."""
    return {**dict(list(known.items())[-_KEPT:]), key: value}


def _policy(policy: LearningPolicy) -> Context:
    """A policy in a few words each."""
    on = {"drift": "drift", "both": f"drift, and every {span(policy.every_s)}"}
    promotes = "promotes what passes its gate" if policy.promote else "a person promotes"
    watch = policy.watch
    return {
        "is": policy,
        "on": on.get(policy.on, f"every {span(policy.every_s)}"),
        "waits": f"{count(policy.min_new, 'labelled example')}",
        "fits": f"{policy.window:,} new, {policy.replay:,} rehearsed, {policy.fit.steps} steps",
        "gate": f"gain above {gain(policy.gate.margin)} at {percent(policy.gate.confidence)}",
        "then": promotes + (f", watched from {watch.min_n:,} outcomes on" if watch else ""),
    }


def _meter(name: str, spent: float, cap: float | None, words: Callable[[float], str]) -> Context:
    found = {"name": name, "spent": words(spent), "cap": "", "share": "", "svg": "", "full": False}
    if cap is None:
        return found
    share = min(1.0, spent / cap) if cap > 0 else 1.0
    full = share >= 1.0
    summary = f"{words(spent)} of {words(cap)}"
    svg = bar([(share, "full" if full else "spent")], summary=summary)
    return found | {"cap": words(cap), "share": percent(share), "svg": svg, "full": full}


def _lately(points: Sequence[AccuracyPoint]) -> tuple[int, int]:
    """(right, all) of the last 100 outcomes, and what came in the same group."""
    right = n = 0
    for point in reversed(points):
        right, n = right + round(point.accuracy * point.n), n + point.n
        if n >= 100:
            break
    return right, n


def _dot(point: AccuracyPoint, now_s: float) -> Dot:
    right = round(point.accuracy * point.n)
    tip = (
        f"{_ago(point, now_s)}: {percent(point.accuracy)} of {count(point.n, 'outcome')} right, "
        f"{limits(right, point.n)}"
    )
    return Dot(time_s=point.time_s, right=right, n=point.n, tip=tip)


def _told(point: AccuracyPoint) -> Context:
    return {
        "time_s": point.time_s,
        "n": point.n,
        "accuracy": percent(point.accuracy),
        "limits": limits(round(point.accuracy * point.n), point.n),
        "drift": point.drift,
    }


def _ago(point: AccuracyPoint, now_s: float) -> str:
    return ago(now_s - point.time_s)


def _swapped(alias: Alias, now_s: float) -> str:
    reason = f": {alias.reason}" if alias.reason else ""
    return f"{ago(now_s - alias.changed_s)}: generation {alias.generation}{reason}"
