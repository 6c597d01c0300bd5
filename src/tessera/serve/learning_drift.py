"""From feedback, in the order it came, to whether an alias's answers got worse, and since when."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, final

from tessera.data import ADWIN

__all__ = ["Seen", "after_change", "detector_of", "follow", "labels_in"]

# (generation, seq, width) -> the first feedback after the change that the last `width` outcomes up
# to `seq` hold, the labelled examples from there on, and the outcomes.
Since = Callable[[int, int, int], tuple[int, int, str]]
_LEAST = 5  # outcomes after a change


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What is known of an alias's feedback so far; columns of the table `learning`.

    Attributes:
        at: The last feedback that was looked at.
        generation: Of the alias, whose answers the detector sees.
        detector: Its state, as JSON; "": a new one.
        change: The first feedback after a change for the worse; 0: there is none.
        changed: Labelled examples since then.
        due: How many of them the next round waits for.
        fresh: Labelled examples since the last round.
    """

    at: int = 0
    generation: int = 0
    detector: str = ""
    change: int = 0
    changed: int = 0
    due: int = 0
    fresh: int = 0


def follow(seen: Seen, rows: Iterable[Any], since: Since, *, least: int) -> tuple[Seen, list[Any]]:
    """Look at further feedback.

    The detector sees right and wrong of what the alias itself answered, not of an experiment's
    candidate, and begins anew where the alias has moved. A change for the better is no drift.

    Args:
        seen: So far.
        rows: Of the table `feedback`, in order.
        since: Looks back.
        least: Labelled examples that a round waits for after a change.

    Returns:
        What is known now, and for each drift its event's body.

    Example:
        >>> from types import SimpleNamespace as Row
        >>> rows = [
        ...     Row(seq=i, generation=1, arm="", outcomes=str(int(i < 200)), said='{"label": [0]}')
        ...     for i in range(300)
        ... ]
        >>> def since(generation, seq, width):
        ...     window = "".join(row.outcomes for row in rows[seq - width + 1 : seq + 1])
        ...     n = after_change(window)
        ...     return seq - n + 1, n, window[-n:]
        >>> seen, drifts = follow(Seen(), rows, since, least=64)
        >>> drifts[0]["at"], drifts[0]["change"], drifts[0]["before"], drifts[0]["now"]
        (223, 200, 1.0, 0.0)
        >>> seen.changed, seen.fresh
        (100, 300)
    """
    detector, drifts = detector_of(seen), list[Any]()
    for row in rows:
        labels = labels_in(row)
        if row.generation > seen.generation:
            detector = ADWIN()
            seen = replace(seen, generation=row.generation, change=0, changed=0, due=0)
        changed = seen.changed + labels if seen.change else 0
        seen = replace(seen, at=row.seq, changed=changed, fresh=seen.fresh + labels)
        if row.arm == "candidate" or row.generation < seen.generation:
            continue
        befores = [_fallen(detector, int(outcome)) for outcome in row.outcomes]
        fallen = [before for before in befores if before is not None]
        if fallen:
            change, changed, after = since(row.generation, row.seq, detector.width)
            seen = replace(seen, change=change, changed=changed, due=least)
            body = {"at": row.seq, "generation": row.generation, "change": change}
            body |= {"now": after.count("1") / len(after), "width": len(after)}
            drifts.append({**body, "before": fallen[-1]})
    return replace(seen, detector=json.dumps(detector.state_dict())), drifts


def detector_of(seen: Seen) -> ADWIN:
    """The detector as it is."""
    detector = ADWIN()
    if seen.detector:
        detector.load_state_dict(json.loads(seen.detector))
    return detector


def labels_in(row: Any) -> int:
    """How many labelled examples a row of feedback is, those whose inputs were kept."""
    return len(json.loads(row.said)["label"]) if row.outcomes else 0


def after_change(outcomes: str) -> int:
    """How many of the last outcomes came after they changed for the worse.

    What a detector keeps at a detection begins before the change. The most likely place of one
    change in a sequence of ones and zeros is taken where it is told from none by more than
    ``ln n`` of the likelihood; else all came after it.

    Source: D. V. Hinkley and E. A. Hinkley, Biometrika 57 (1970) 477; the bound is that of
        G. Schwarz, Ann. Statist. 6 (1978) 461, for two parameters more.

    Example:
        >>> after_change("1" * 30 + "0" * 20), after_change("01" * 20)
        (20, 40)
    """
    n, right = len(outcomes), outcomes.count("1")
    best, place, old = math.log(max(n, 1)), 0, 0
    for k in range(1, n - _LEAST + 1):
        old += outcomes[k - 1] == "1"
        if old / k > (right - old) / (n - k):
            gain = _fit(old, k) + _fit(right - old, n - k) - _fit(right, n)
            if gain > best:
                best, place = gain, k
    return n - place


def _fit(right: int, n: int) -> float:
    """The most that the logarithm of the likelihood can be."""
    return sum(k * math.log(k / n) for k in (right, n - right) if k)


def _fallen(detector: ADWIN, outcome: int) -> float | None:
    """The accuracy before a change for the worse at this outcome; None: there is none."""
    width, total = detector.width + 1, detector.mean * detector.width + outcome
    if detector.drift_detected:  # with this one it begins anew
        width, total = 1, float(outcome)
    if not detector.update(outcome) or detector.width == width:
        return None
    before = (total - detector.mean * detector.width) / (width - detector.width)
    return before if detector.mean < before else None
