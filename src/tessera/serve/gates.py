"""Gates: whether a candidate may take an incumbent's place, decided from evidence alone.

A decision is a pure function of the evidence, a JSON document that is kept as a blob: whoever has
the blob can decide again, and gets the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, final

from tessera.errors import CheckpointError, InputError
from tessera.serve.gates_statistics import (
    Limits,
    Pairs,
    difference,
    mcnemar,
    paired_difference,
    quantile,
    spent,
)

__all__ = ["Policy", "canonical", "decide", "decision_hash", "is_regression", "recompute"]

METRICS = ("accuracy",)
_MOST_SLICES = 16
_MOST_NAMED = 100  # examples that a decision names
_MOST_N = 1_000_000
_VERSION = 1

# (id, {feature: value}, incumbent, candidate); an outcome is 1, 0 or None: not that arm's.
Example = Sequence[Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Policy:
    """What a candidate has to show.

    Attributes:
        metric: "accuracy": the share of examples that an arm has right.
        min_n: Examples of each arm, at least.
        margin: The candidate's gain must be shown to exceed this; below 0, how much it may lose
            and pass nevertheless.
        confidence: 1 - the probability that a candidate passes that is no better than `margin`,
            over all the looks at it together.
        slices: Features; each value of each of them is a slice.
        slice_margin: What a slice may lose, >= 0.
        slice_min_n: Examples of each arm in a slice, at least; smaller ones are named, not judged.

    Example:
        >>> Policy(margin=-0.01, slices=("language",)).min_n
        50
    """

    metric: str = "accuracy"
    min_n: int = 50
    margin: float = 0.0
    confidence: float = 0.95
    slices: tuple[str, ...] = ()
    slice_margin: float = 0.0
    slice_min_n: int = 20

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> Policy:
        """Read a policy.

        Raises:
            InputError: There is none like this.

        Example:
            >>> Policy.parse({"min_n": 10}).min_n
            10
        """
        known = {f.name for f in fields(cls)}
        if unknown := set(said) - known:
            raise InputError(
                f"a policy has no {min(map(str, unknown))[:60]!r}, only {', '.join(sorted(known))}"
            )
        slices = said.get("slices", ())
        if not isinstance(slices, list | tuple):
            raise InputError(f"a policy's slices are a list of features, got {slices!r:.60}")
        policy = cls(**{**said, "slices": tuple(slices)})
        policy._check()
        return policy

    def _check(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"a gate knows {', '.join(METRICS)}, not {self.metric!r:.60}")
        for name in ("min_n", "slice_min_n"):
            n = getattr(self, name)
            if type(n) is not int or not 1 <= n <= _MOST_N:
                raise InputError(f"a policy's {name} is 1 to {_MOST_N}, got {n!r:.40}")
        for name, low in (("margin", -1.0), ("slice_margin", 0.0)):
            value = getattr(self, name)
            if not _is_number(value) or not low <= value < 1:
                raise InputError(f"a policy's {name} is {low:g} to below 1, got {value!r:.40}")
        if not _is_number(self.confidence) or not 0.5 < self.confidence < 1:
            raise InputError(
                f"a policy's confidence lies between 0.5 and 1, got {self.confidence!r:.40}"
            )
        if len(self.slices) > _MOST_SLICES or not all(
            isinstance(s, str) and 0 < len(s) <= 100 and s.isprintable() for s in self.slices
        ):
            raise InputError(f"a policy's slices are up to {_MOST_SLICES} names of features")

    def json(self) -> dict[str, Any]:
        """Plain values, from which `parse` makes the same."""
        return {**asdict(self), "slices": list(self.slices)}


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: keys sorted, no blanks, ASCII.

    Example:
        >>> canonical({"b": 1, "a": [0.5]})
        b'{"a":[0.5],"b":1}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def decision_hash(decision: Mapping[str, Any]) -> str:
    """What the audit log has of a whole decision, slices and examples included.

    Example:
        >>> decision_hash({"passed": True})[:8]
        '11c11db3'
    """
    return hashlib.sha256(canonical(decision)).hexdigest()


def recompute(blob: bytes) -> dict[str, Any]:
    """Decide again from the evidence that was kept.

    Args:
        blob: What `Blobs.get` has under the gate's id.

    Returns:
        The decision, equal to the one that was recorded.

    Raises:
        CheckpointError: It is no evidence, or of a newer version.

    Example:
        >>> examples = [[f"{i}", {}, i % 2, 1] for i in range(60)]
        >>> evidence = {"version": 1, "paired": True, "look": 1, "policy": Policy().json()}
        >>> recompute(canonical({**evidence, "examples": examples}))["passed"]
        True
    """
    try:
        evidence = json.loads(blob)
        if evidence["version"] != _VERSION:
            raise CheckpointError(
                f"the evidence has version {evidence['version']!r:.20}, this Tessera reads "
                f"{_VERSION}. Upgrade with: pip install -U tessera-lifelong"
            )
        return decide(evidence)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"this is no evidence of a gate: {error!r:.200}") from error


def decide(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the candidate passes.

    It passes where each arm has `min_n` examples; the lower limit of ``candidate - incumbent``
    exceeds `margin`; and no slice has regressed, that is, no upper limit of a slice's difference
    lies below ``-slice_margin``. Limits are one-sided:

    - paired (both arms on the same examples): Newcombe 1998, and where ``margin >= 0`` the exact
      McNemar test must agree, since limits are approximate and small samples flatter;
    - unpaired (each example has one arm's outcome): Newcombe 1998 on Wilson limits. It takes the
      examples for independent; where few users give most of the feedback they are less so, and
      the limits too narrow.

    Looking again is paid for: look k at the same pair spends ``6 / (pi k)^2`` of ``1 -
    confidence``, so that all looks together err with that probability at most, whenever one stops.
    Slices are judged at ``(1 - confidence) / number of slices judged`` (Bonferroni; slices of
    several features overlap, and it holds for any dependence), the same at every look: an error
    there refuses, and costs another try. Candidates are tests of their own: of twenty useless
    ones, one passes at 95 %.

    Args:
        evidence: ``paired``, ``look``, ``policy``, ``examples``; what else is there is ignored.

    Returns:
        Plain values: ``passed``, ``tested`` (there were enough examples), ``reasons``,
        ``overall``, ``slices``, ``regressed`` (ids of up to 100 examples), ``regressed_n``,
        ``outcomes`` (sha256 of the examples).

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998) 873 and 2635; Q. McNemar,
        Psychometrika 12 (1947) 153; O. J. Dunn, J. Am. Stat. Assoc. 56 (1961) 52 (Bonferroni).

    Example:
        >>> evidence = {"paired": True, "look": 1, "policy": {"min_n": 3}}
        >>> decide({**evidence, "examples": [["a", {}, 1, 0]]})["reasons"]
        ['the incumbent has 1 of the 3 examples that are needed', 'the candidate has 1 of the 3
        examples that are needed']
    """
    policy = Policy.parse(evidence["policy"])
    paired, examples = bool(evidence["paired"]), evidence["examples"]
    alpha = 1 - policy.confidence
    error = spent(alpha, int(evidence["look"]))
    overall = _compare(examples, paired, quantile(error))
    slices = _slices(examples, paired, policy, alpha)
    short = _short(overall, policy)
    reasons = short or _not_better(overall, policy, paired, error)
    reasons += [
        f"the slice {s['feature']}={s['value']} lost: {s['incumbent'][0]}/{s['incumbent'][1]} to "
        f"{s['candidate'][0]}/{s['candidate'][1]}"
        for s in slices
        if s["regressed"]
    ]
    worse = _regressed(examples, paired, slices) if reasons else []
    return {
        "passed": not reasons,
        "tested": not short,
        "reasons": reasons,
        "overall": overall,
        "slices": slices,
        "regressed": worse[:_MOST_NAMED],
        "regressed_n": len(worse),
        "outcomes": hashlib.sha256(canonical([list(e) for e in examples])).hexdigest(),
    }


def is_regression(
    before: tuple[int, int], live: tuple[int, int], *, margin: float, confidence: float, look: int
) -> bool:
    """Whether live accuracy has fallen by more than `margin` since a promotion.

    ``upper limit of live - before < -margin``, unpaired (Newcombe 1998), at look `look` of as many
    as there will be: see `spent`.

    Args:
        before: (right, n) of the incumbent.
        live: (right, n) since.
        margin: >= 0.
        confidence: Of all looks together.
        look: Counted from 1.

    Example:
        >>> is_regression((90, 100), (50, 100), margin=0.05, confidence=0.95, look=1)
        True
        >>> is_regression((90, 100), (88, 100), margin=0.0, confidence=0.95, look=1)
        False
    """
    if not before[1] or not live[1]:
        return False
    z = quantile(spent(1 - confidence, look))
    return difference(before, live, z)[1] < -margin


def _compare(examples: Sequence[Example], paired: bool, z: float) -> dict[str, Any]:
    old = [e[2] for e in examples if e[2] is not None]
    new = [e[3] for e in examples if e[3] is not None]
    found: dict[str, Any] = {
        "incumbent": [sum(old), len(old)],
        "candidate": [sum(new), len(new)],
        "low": None,
        "high": None,
        "p": None,
    }
    if not old or not new:
        return found
    limits: Limits
    if paired:
        pairs = Pairs.count(old, new)
        limits = paired_difference(pairs, z)
        found["p"] = mcnemar(pairs.better, pairs.worse)
        found["better"], found["worse"] = pairs.better, pairs.worse
    else:
        limits = difference((sum(old), len(old)), (sum(new), len(new)), z)
    found["low"], found["high"] = limits
    return found


def _slices(
    examples: Sequence[Example], paired: bool, policy: Policy, alpha: float
) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        for feature in policy.slices:
            if feature in example[1]:
                groups.setdefault((feature, str(example[1][feature])), []).append(example)

    def judged(group: Sequence[Example]) -> bool:
        least = min(sum(e[arm] is not None for e in group) for arm in (2, 3))
        return least >= policy.slice_min_n

    tests = sum(judged(g) for g in groups.values())
    found = []
    for (feature, value), group in sorted(groups.items()):
        own = _compare(group, paired, quantile(alpha / max(1, tests)))
        enough = judged(group)
        regressed = enough and own["high"] < -policy.slice_margin
        found.append(
            {"feature": feature, "value": value, "judged": enough, "regressed": regressed} | own
        )
    return found


def _short(overall: Mapping[str, Any], policy: Policy) -> list[str]:
    return [
        f"the {arm} has {overall[arm][1]} of the {policy.min_n} examples that are needed"
        for arm in ("incumbent", "candidate")
        if overall[arm][1] < policy.min_n
    ]


def _not_better(
    overall: Mapping[str, Any], policy: Policy, paired: bool, error: float
) -> list[str]:
    reasons = []
    if not overall["low"] > policy.margin:
        reasons.append(
            f"the gain is shown to exceed {overall['low']:.4f} only, and {policy.margin:g} is asked"
        )
    # The test's null is "no difference", so it says nothing of a margin below it.
    if paired and policy.margin >= 0 and overall["p"] > error:
        reasons.append(
            f"better on {overall['better']} examples and worse on {overall['worse']} is chance "
            f"with p {overall['p']:.4f}, and {error:.4f} is asked"
        )
    return reasons


def _regressed(
    examples: Sequence[Example], paired: bool, slices: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Ids of what the candidate has wrong, and, where it is known, the incumbent right."""
    lost = {(s["feature"], s["value"]) for s in slices if s["regressed"]}
    worse = [e for e in examples if e[3] == 0 and (e[2] == 1 or not paired)]

    def in_lost(example: Example) -> bool:
        return any((f, str(v)) in lost for f, v in example[1].items())

    return [str(e[0]) for e in sorted(worse, key=lambda e: not in_lost(e))]


def _is_number(value: object) -> bool:
    # Compared, not `isfinite`, which overflows where a whole number is larger than any float.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -math.inf < value < math.inf
