"""The statistics of gates: differences of two shares, paired and not, with limits.

Pure and deterministic: the same counts give the same bits, so that a decision can be recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import final

from tessera.errors import InputError

__all__ = ["Pairs", "difference", "mcnemar", "paired_difference", "quantile", "spent", "wilson"]

Limits = tuple[float, float]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """How two arms did on the same examples.

    Attributes:
        both: Both right.
        better: The candidate right, the incumbent wrong.
        worse: The candidate wrong, the incumbent right.
        neither: Both wrong.

    Example:
        >>> Pairs.count([1, 1, 0, 0], [1, 0, 1, 0])
        Pairs(both=1, better=1, worse=1, neither=1)
    """

    both: int
    better: int
    worse: int
    neither: int

    @classmethod
    def count(cls, incumbent: Sequence[int], candidate: Sequence[int]) -> Pairs:
        """Count outcomes, 1 right and 0 wrong, example by example."""
        seen = [[0, 0], [0, 0]]
        for old, new in zip(incumbent, candidate, strict=True):
            seen[old][new] += 1
        return cls(both=seen[1][1], better=seen[0][1], worse=seen[1][0], neither=seen[0][0])

    @property
    def n(self) -> int:
        """All of them."""
        return self.both + self.better + self.worse + self.neither


def quantile(alpha: float) -> float:
    """z that a standard normal exceeds with that probability, 0 < alpha < 0.5.

    Raises:
        InputError: It is out of range.

    Example:
        >>> round(quantile(0.025), 4)
        1.96
    """
    if not 0 < alpha < 0.5:
        raise InputError(f"an error rate lies between 0 and 0.5, got {alpha!r}")
    return -NormalDist().inv_cdf(alpha)


def wilson(right: int, n: int, z: float) -> Limits:
    """Score limits of a share: ``(2np + z^2 -+ z sqrt(z^2 + 4np(1 - p))) / (2(n + z^2))``.

    Args:
        right: Successes, 0 to n.
        n: Trials, >= 1.
        z: Normal quantile, > 0; each limit is one-sided at that quantile.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209.

    Example:
        >>> [round(x, 4) for x in wilson(81, 263, 1.959964)]
        [0.2553, 0.3662]
    """
    middle, width = 2 * right + z * z, z * math.sqrt(z * z + 4 * right * (n - right) / n)
    whole = 2 * (n + z * z)
    # At the ends rounding would leave a trace outside [0, 1], or inside of p.
    low = 0.0 if right == 0 else max(0.0, (middle - width) / whole)
    high = 1.0 if right == n else min(1.0, (middle + width) / whole)
    return low, high


def difference(incumbent: tuple[int, int], candidate: tuple[int, int], z: float) -> Limits:
    """Limits of ``candidate - incumbent`` for two independent samples.

    With p the shares and (l, u) their Wilson limits: ``d - sqrt((p2 - l2)^2 + (u1 - p1)^2)`` and
    ``d + sqrt((u2 - p2)^2 + (p1 - l1)^2)``, 2 the candidate.

    Args:
        incumbent: (right, n), n >= 1.
        candidate: Likewise.
        z: Normal quantile, > 0.

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998) 873, method 10.

    Example:
        >>> [round(x, 4) for x in difference((48, 80), (56, 70), 1.959964)]
        [0.0524, 0.3339]
    """
    (r1, n1), (r2, n2) = incumbent, candidate
    (l1, u1), (l2, u2) = wilson(r1, n1, z), wilson(r2, n2, z)
    p1, p2 = r1 / n1, r2 / n2
    d = p2 - p1
    return d - math.hypot(p2 - l2, u1 - p1), d + math.hypot(u2 - p2, p1 - l1)


def paired_difference(pairs: Pairs, z: float) -> Limits:
    """Limits of ``candidate - incumbent`` on the same examples: Wilson limits, correlated.

    As `difference`, with ``-2 phi a b`` under each root; phi is the correlation of the table, its
    numerator reduced by n/2 where it is positive.

    Args:
        pairs: n >= 1.
        z: Normal quantile, > 0.

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998) 2635, method 10.

    Example:
        >>> table = Pairs(both=36, better=12, worse=2, neither=0)
        >>> [round(x, 4) for x in paired_difference(table, 1.959964)]
        [0.0569, 0.3404]
    """
    n, old, new = pairs.n, pairs.both + pairs.worse, pairs.both + pairs.better
    (l1, u1), (l2, u2) = wilson(old, n, z), wilson(new, n, z)
    p1, p2 = old / n, new / n
    phi = _correlation(pairs)
    d = (pairs.better - pairs.worse) / n
    low = _root(p2 - l2, u1 - p1, phi)
    high = _root(u2 - p2, p1 - l1, phi)
    return d - low, d + high


def _root(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


def _correlation(pairs: Pairs) -> float:
    old, new, n = pairs.both + pairs.worse, pairs.both + pairs.better, pairs.n
    whole = old * (n - old) * new * (n - new)
    if not whole:
        return 0.0
    top: float = pairs.both * pairs.neither - pairs.better * pairs.worse
    if top > 0:
        top = max(0.0, top - n / 2)
    return top / math.sqrt(whole)


def mcnemar(better: int, worse: int) -> float:
    """How likely as many improvements are where the arms do not differ: exact, one-sided.

    ``P(X >= better)``, X binomial of the ``better + worse`` examples on which the arms differ and
    1/2; computed in whole numbers.

    Args:
        better: Examples that only the candidate has right.
        worse: Those that only the incumbent has right.

    Source: Q. McNemar, Psychometrika 12 (1947) 153; the exact form, the sign test.

    Example:
        >>> mcnemar(5, 0), mcnemar(0, 0)
        (0.03125, 1.0)
    """
    n = better + worse
    term, total = math.comb(n, better), 0
    for k in range(better, n + 1):
        total += term
        term = term * (n - k) // (k + 1)
    return total / (1 << n)


def spent(alpha: float, look: int) -> float:
    """What the `look`-th look at an experiment may spend of alpha: ``alpha 6 / (pi look)^2``.

    The parts add up to alpha over any number of looks, so that by the union bound whoever looks
    whenever he likes, and stops when he likes, is misled with probability alpha at most.

    Args:
        alpha: Of all looks together, 0 to 1.
        look: Counted from 1.

    Source: the union bound with the weights of the Basel series; group sequential spending in
    general: K. K. G. Lan, D. L. DeMets, Biometrika 70 (1983) 659.

    Example:
        >>> round(spent(0.05, 1), 4), round(spent(0.05, 2), 4)
        (0.0304, 0.0076)
    """
    if look < 1:
        raise InputError(f"looks are counted from 1, got {look!r}")
    return alpha * 6 / (math.pi * look) ** 2
