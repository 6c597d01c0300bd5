"""What the dashboard shows of experiments and gates."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, final

from markupsafe import Markup

from tessera.errors import CheckpointError, MissingDataError, UnknownNameError
from tessera.serve.dashboard_chart import bar, interval
from tessera.serve.dashboard_parts import Context
from tessera.serve.dashboard_words import Z, gain, limits, nice, percent
from tessera.serve.gates_statistics import difference, wilson
from tessera.serve.records import Alias
from tessera.serve.registry import Registry
from tessera.serve.rollout import BUCKETS, Experiment
from tessera.serve.rollout_values import Gate

__all__ = ["Rolling", "gate_named"]

_GATE = re.compile("gate ([0-9a-f]{64})")
_SHADOWS = 10_000  # events of shadows that are read for one look at a page
_KNOWN = 1_000  # experiments whose shadows are remembered
_CHECKED = 20_000  # examples of a gate that is decided again for each look
_NAMED = 12  # examples that are named at once


@final
class Rolling:
    """Experiments and gates, as values for the templates.

    Args:
        registry: Has them.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._shadows: OrderedDict[str, dict[str, int]] = OrderedDict()
        self._counting = threading.Lock()

    # -- experiments --------------------------------------------------------------------------

    def under_way(self, limit: int) -> tuple[list[Context], int]:
        """(the newest experiments of all tenants, how many there are)."""
        aliases = self._registry.view().aliases
        running = self._registry.rollouts.experiments.running()
        found = [e for at, e in running.items() if at in aliases and e.holds(aliases[at])]
        found.sort(key=lambda e: -e.started_s)
        return [self._told(e) for e in found[:limit]], len(found)

    def beside(self, aliases: Sequence[Alias]) -> dict[str, Context]:
        """Name of an alias -> the experiment on it, where there is one."""
        running = self._registry.rollouts.experiments.running()
        found = ((a, running.get((a.tenant, a.name))) for a in aliases)
        return {a.name: self._told(e) for a, e in found if e is not None and e.holds(a)}

    def experiment(self, alias: Alias) -> Context | None:
        """The experiment of an alias with what is known of both arms; None: there is none."""
        try:
            found = self._registry.rollouts.experiments.get(alias.tenant, alias.name)
        except UnknownNameError:
            return None
        told = self._told(found) | {"holds": found.holds(alias)}
        if found.mode == "shadow":
            return told | {"shadow": self._agreement(found)}
        counts = self._registry.rollouts.journal.counts(alias.tenant, found.id)
        shares = {"candidate": found.share / BUCKETS, "incumbent": 1 - found.share / BUCKETS}
        arms = [
            _arm(name, getattr(found, name), shares[name], *counts[name])
            for name in ("candidate", "incumbent")
        ]
        (k1, n1), (k2, n2) = counts["incumbent"], counts["candidate"]
        change = None
        if n1 and n2:
            change = _change((k1, n1), (k2, n2))
        return told | {"arms": arms, "change": change}

    def _told(self, found: Experiment) -> Context:
        share = found.share / BUCKETS
        kind = "shadow" if found.mode == "shadow" else "candidate"
        summary = (
            f"{percent(share)} of the traffic is computed by the candidate besides"
            if found.mode == "shadow"
            else f"{percent(share)} of the users get the candidate, {percent(1 - share)} the "
            "incumbent"
        )
        split = bar([(share, kind), (1 - share, "incumbent")], summary=summary)
        return {"is": found, "share": percent(share), "split": split, "summary": summary}

    def _agreement(self, found: Experiment) -> Context:
        """How often the candidate's shadow said what the incumbent did."""
        with self._counting:
            known = dict(self._count(found))
        agree, rows = known["agree"], known["rows"]
        if not rows:
            return {**known, "share": "", "limits": "", "svg": ""}
        words = f"the same class in {percent(agree / rows)} of the rows"
        shown = {"share": percent(agree / rows), "limits": limits(agree, rows)}
        return {**known, **shown, "svg": _share(agree, rows, "l1", words)}

    def _count(self, found: Experiment) -> Mapping[str, int]:
        """Count on from where the last look at a page stopped."""
        known = self._shadows.setdefault(found.id, {"requests": 0, "rows": 0, "agree": 0, "at": 0})
        self._shadows.move_to_end(found.id)
        while len(self._shadows) > _KNOWN:
            self._shadows.popitem(last=False)
        began = known["at"] or self._registry.rollouts.experiments.began(found.tenant, found.alias)
        events = self._registry.audit.read(tenant=found.tenant, kinds=["shadow"], after_seq=began)
        for event, _ in zip(events, range(_SHADOWS), strict=False):
            known["at"] = event.seq
            if event.body.get("experiment") == found.id:
                known["requests"] += 1
                known["rows"] += int(event.body.get("rows", 0))
                known["agree"] += int(event.body.get("agree", 0))
        return known

    # -- gates --------------------------------------------------------------------------------

    def gates(self, alias: Alias, limit: int) -> tuple[list[Context], str]:
        """(the last gates of an alias, the edge of their scale in words), the newest first."""
        found = self._registry.rollouts.gates.all(alias.tenant, alias.name)[:limit]
        edge = _edge([g.decision["overall"] for g in found])
        return [
            {
                "is": gate,
                "overall": _row(gate.decision["overall"], edge, bad=not gate.passed),
                "promotable": _promotable(gate, alias),
            }
            for gate in found
        ], gain(edge)

    def last_about(self, alias: Alias, candidate: str) -> Gate | None:
        """The last gate on this candidate against what the alias points to; None: there is none."""
        for gate in self._registry.rollouts.gates.all(alias.tenant, alias.name):
            if (gate.incumbent, gate.candidate) == (alias.delta, candidate):
                return gate
        return None

    def gate(self, alias: Alias, id: str, *, check: bool) -> Context:
        """One gate: what was decided, and on what.

        Args:
            alias: As it is now.
            id: The gate's.
            check: Whether to decide again however many examples there are.

        Raises:
            UnknownNameError: The alias has no such gate.
        """
        gate = self._registry.rollouts.gates.get(alias.tenant, alias.name, id)
        decision = gate.decision
        overall, slices = decision["overall"], decision["slices"]
        many = overall["incumbent"][1] + overall["candidate"][1]
        evidence, wrong = None, ""
        if check or many <= _CHECKED:
            evidence, wrong = self._evidence(gate)
        policy = evidence["policy"] if evidence else None
        edge = _edge([overall, *slices])
        asked = policy and policy["margin"]
        slice_asked = policy and -policy["slice_margin"]
        rows = [
            {"name": "", "value": "All examples", "state": _verdict(gate)}
            | _row(overall, edge, asked, bad=not gate.passed)
        ]
        for slice in sorted(slices, key=lambda s: not s["regressed"]):
            state = "lost" if slice["regressed"] else "held" if slice["judged"] else "too few"
            rows.append(
                {"name": slice["feature"], "value": slice["value"], "state": state}
                | _row(slice, edge, slice_asked, bad=slice["regressed"])
            )
        return {
            "is": gate,
            "rows": rows,
            "edge": gain(edge),
            "policy": policy,
            "paired": "better" in overall,
            "checked": evidence is not None,
            "wrong": wrong,
            "worse": _worse(decision, evidence),
            "promotable": _promotable(gate, alias),
        }

    def evidence(self, alias: Alias, id: str) -> bytes:
        """The file a gate was decided on, every byte checked.

        Raises:
            UnknownNameError: The alias has no such gate.
            CheckpointError: The file is damaged.
            MissingDataError: It is lost.
        """
        gate = self._registry.rollouts.gates.get(alias.tenant, alias.name, id)
        return self._registry.rollouts.blobs.get(gate.id)

    def _evidence(self, gate: Gate) -> tuple[Mapping[str, Any] | None, str]:
        try:
            return self._registry.rollouts.gates.evidence(gate), ""
        except (CheckpointError, MissingDataError) as error:
            return None, str(error)


def gate_named(reason: str) -> str:
    """The id of the gate that a promotion's reason names; "": it names none.

    Example:
        >>> gate_named("gate " + "ab" * 32)[:4], gate_named("gate keeper")
        ('abab', '')
    """
    found = _GATE.match(reason)
    return found[1] if found else ""


def _arm(name: str, delta: str, share: float, right: int, n: int) -> Context:
    found = {"name": name, "delta": delta, "share": percent(share), "right": right, "n": n}
    if not n:
        return found | {"accuracy": "", "limits": "", "svg": ""}
    kind = "l1" if name == "candidate" else "l0"
    svg = _share(right, n, kind, f"{name}: {percent(right / n)} right")
    return found | {"accuracy": percent(right / n), "limits": limits(right, n), "svg": svg}


def _share(right: int, n: int, kind: str, words: str) -> Markup:
    """A share with its limits, on a scale from 0 to 1."""
    low, high = wilson(right, n, Z)
    summary = f"{words}, {limits(right, n)}"
    return interval((low, right / n, high), scale=(0.0, 1.0), kind=kind, summary=summary)


def _change(incumbent: tuple[int, int], candidate: tuple[int, int]) -> Context:
    low, high = difference(incumbent, candidate, Z)
    middle = candidate[0] / candidate[1] - incumbent[0] / incumbent[1]
    return {"gain": gain(middle), "limits": f"{gain(low)} to {gain(high)}"}


def _edge(compared: Sequence[Mapping[str, Any]]) -> float:
    """Where the scale of some differences ends: a round number of points, alike to both sides."""
    ends = [abs(c[end]) for c in compared for end in ("low", "high") if c[end] is not None]
    return min(1.0, nice(max(ends, default=0.1)))


def _row(
    compared: Mapping[str, Any], edge: float, asked: float | None = None, *, bad: bool
) -> Context:
    (k1, n1), (k2, n2) = compared["incumbent"], compared["candidate"]
    found: Context = {
        "incumbent": f"{k1:,} of {n1:,}",
        "candidate": f"{k2:,} of {n2:,}",
        "accuracies": tuple(percent(k / n) if n else "–" for k, n in ((k1, n1), (k2, n2))),
    }
    if compared["low"] is None:
        return found | {"gain": "–", "limits": "", "svg": ""}
    middle, low, high = k2 / n2 - k1 / n1, compared["low"], compared["high"]
    between = f"{gain(low)} to {gain(high)}"
    marks = [(0.0, "zero")] + ([] if asked is None else [(asked, "asked")])
    svg = interval(
        (low, middle, high),
        scale=(-edge, edge),
        marks=marks,
        kind="bad" if bad else "good" if low > 0 else "",
        summary=f"{gain(middle)}, between {between}",
    )
    return found | {"gain": gain(middle), "limits": between, "svg": svg}


def _verdict(gate: Gate) -> str:
    return "passed" if gate.passed else "refused"


def _promotable(gate: Gate, alias: Alias) -> bool:
    now = (alias.generation, alias.delta)
    return gate.passed and now == (gate.generation, gate.incumbent)


def _worse(decision: Mapping[str, Any], evidence: Mapping[str, Any] | None) -> list[Context]:
    """The examples the candidate lost, by the slice that regressed; the rest together."""
    lost = [(s["feature"], s["value"]) for s in decision["slices"] if s["regressed"]]
    told = {str(e[0]): e[1] for e in evidence["examples"]} if evidence else {}
    groups: dict[str, list[str]] = {}
    for id in decision["regressed"]:
        slices = told.get(id, {})
        name = next((f"{f}={v}" for f, v in lost if str(slices.get(f)) == v), "")
        groups.setdefault(name, []).append(id)
    return [
        {"slice": name, "first": ids[:_NAMED], "rest": ids[_NAMED:]}
        for name, ids in sorted(groups.items(), key=lambda g: not g[0])
    ]
