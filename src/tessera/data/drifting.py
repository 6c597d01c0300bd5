"""Generated streams that drift at known places: row t is a function of (seed, t) alone.

So a slice of a stream is the stream of the slice, and nothing needs to be downloaded or kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tessera import random
from tessera.data.batch import Batch
from tessera.errors import InputError

__all__ = ["bernoulli", "hyperplane", "sea", "stagger"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SEA = np.array([8.0, 9.0, 7.0, 9.5])


def sea(
    n: int,
    *,
    start: int = 0,
    drifts: Sequence[int] = (),
    width: float = 0.0,
    noise: float = 0.1,
    seed: int = 0,
) -> Batch:
    """SEA concepts: is the sum of the first two of three numbers at most theta?

    ``y = [x_0 + x_1 <= theta]`` with x uniform in [0, 10] and theta = 8, 9, 7, 9.5, 8, ... by
    concept; the third number says nothing.

    Args:
        n: Rows.
        start: Position of the first in the stream, >= 0.
        drifts: At which positions the next concept begins, ascending.
        width: 0: at once. Else the share of the new concept is
            ``1 / (1 + exp(-4 (t - drift) / width))``: rows over which it takes over.
        noise: Share of labels that are flipped, in [0, 0.5].
        seed: Of everything.

    Returns:
        x float32 [n, 3], y int64 [n].

    Raises:
        InputError: An argument is out of range.

    Source:
        Street & Kim 2001, "A streaming ensemble algorithm (SEA) for large-scale classification",
        KDD; the gradual form: Bifet et al. 2010, "MOA", JMLR 11.

    Example:
        >>> whole = sea(1000, drifts=[500])
        >>> bool((sea(10, start=495, drifts=[500]).y == whole.y[495:505]).all())
        True
    """
    _check("sea", n, start, drifts, width, noise)
    x = _single(10.0 * _uniform(seed, "sea", "x", start, n, 3))
    theta = _SEA[_concepts(seed, "sea", start, n, drifts, width) % len(_SEA)]
    y = (x[:, 0] + x[:, 1] <= theta) ^ _flipped(seed, "sea", start, n, noise)
    return _batch(x, y)


def stagger(
    n: int,
    *,
    start: int = 0,
    drifts: Sequence[int] = (),
    width: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
) -> Batch:
    """STAGGER concepts: rules over size, colour and shape, three values each.

    The concepts are, in turn: small and red; green or circular; medium or large.

    Args:
        n: Rows.
        start: Position of the first in the stream, >= 0.
        drifts: At which positions the next concept begins, ascending.
        width: As for `sea`.
        noise: Share of labels that are flipped, in [0, 0.5].
        seed: Of everything.

    Returns:
        x float32 [n, 9], one-hot: small, medium, large; red, green, blue; square, circular,
        triangular. y int64 [n].

    Raises:
        InputError: An argument is out of range.

    Source:
        Schlimmer & Granger 1986, "Incremental learning from noisy data", Machine Learning 1(3).

    Example:
        >>> batch = stagger(100)
        >>> bool((batch.y == (batch.x[:, 0] * batch.x[:, 3])).all())  # small and red
        True
    """
    _check("stagger", n, start, drifts, width, noise)
    values = (3 * _uniform(seed, "stagger", "x", start, n, 3)).astype(np.int64)
    size, colour, shape = values.T
    rules = np.stack([(size == 0) & (colour == 0), (colour == 1) | (shape == 1), size > 0])
    concept = _concepts(seed, "stagger", start, n, drifts, width) % 3
    y = rules[concept, np.arange(n)] ^ _flipped(seed, "stagger", start, n, noise)
    return _batch(np.eye(3)[values].reshape(n, 9), y)


def hyperplane(
    n: int,
    *,
    start: int = 0,
    features: int = 10,
    drifting: int = 2,
    period: float = 20_000.0,
    noise: float = 0.05,
    seed: int = 0,
) -> Batch:
    """A hyperplane that never stops turning.

    ``y = [sum w_i x_i >= sum w_i / 2]`` with x uniform in [0, 1] and
    ``w_i(t) = u_i + sin(2 pi (t / period + v_i))`` for the first `drifting` weights, ``w_i = u_i``
    for the others; u and v are drawn once, uniform in [0, 1].

    Args:
        n: Rows.
        start: Position of the first in the stream, >= 0.
        features: d, >= 2.
        drifting: How many weights move, 0 .. d.
        period: Rows until they are back, > 0.
        noise: Share of labels that are flipped, in [0, 0.5].
        seed: Of everything.

    Returns:
        x float32 [n, d], y int64 [n].

    Raises:
        InputError: An argument is out of range.

    Source:
        Hulten, Spencer & Domingos 2001, "Mining time-changing data streams", KDD. There weights
        move by random steps; here along a sine, so that a row depends on its position alone.

    Example:
        >>> hyperplane(3, features=4).x.shape
        torch.Size([3, 4])
    """
    _check("hyperplane", n, start, (), 0.0, noise)
    if features < 2 or not 0 <= drifting <= features or not (0 < period < math.inf):
        raise InputError(
            f"hyperplane needs features >= 2, drifting in 0 .. features and period > 0, got "
            f"{features}, {drifting}, {period}"
        )
    x = _single(_uniform(seed, "hyperplane", "x", start, n, features))
    u, v = _uniform(seed, "hyperplane", "weights", 0, 2, features)
    turn = np.sin(2 * np.pi * (np.arange(start, start + n)[:, None] / period + v))
    weights = u + np.where(np.arange(features) < drifting, turn, 0.0)
    y = (weights * (x - 0.5)).sum(1) >= 0
    return _batch(x, y ^ _flipped(seed, "hyperplane", start, n, noise))


def bernoulli(
    n: int,
    *,
    start: int = 0,
    p: Sequence[float] = (0.2, 0.4),
    drifts: Sequence[int] = (),
    width: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Zeros and ones whose mean changes: the errors of a model on a stream that drifts.

    Args:
        n: Values.
        start: Position of the first in the stream, >= 0.
        p: The mean of each concept, in [0, 1]; after the last comes the first again.
        drifts: At which positions the next mean begins, ascending.
        width: As for `sea`.
        seed: Of everything.

    Returns:
        float64 [n] of 0 and 1.

    Raises:
        InputError: An argument is out of range.

    Example:
        >>> values = bernoulli(2000, p=(0.0, 1.0), drifts=[1500])
        >>> values[:1500].sum().item(), values[1500:].sum().item()
        (0.0, 500.0)
    """
    _check("bernoulli", n, start, drifts, width, 0.0)
    if not len(p) or not all(0 <= chance <= 1 for chance in p):
        raise InputError(f"bernoulli needs means p in [0, 1], got {list(p)}")
    chance = np.array(p)[_concepts(seed, "bernoulli", start, n, drifts, width) % len(p)]
    drawn = _uniform(seed, "bernoulli", "x", start, n, 1)[:, 0]
    return torch.from_numpy((drawn < chance).astype(np.float64))


def _check(who: str, n: int, start: int, drifts: Sequence[int], width: float, noise: float) -> None:
    if n < 0 or start < 0:
        raise InputError(f"{who} needs n >= 0 rows from start >= 0, got {n} from {start}")
    if any(a >= b for a, b in pairwise(drifts)) or any(d < 0 for d in drifts):
        raise InputError(f"{who} needs ascending positions >= 0 as drifts, got {list(drifts)}")
    if not 0 <= width < math.inf:
        raise InputError(f"{who} needs a finite width >= 0 in rows, got {width}")
    if not 0 <= noise <= 0.5:
        raise InputError(f"{who} needs a noise in [0, 0.5], got {noise}")


def _uniform(seed: int, kind: str, what: str, start: int, n: int, columns: int) -> Floats:
    """[n, columns] in [0, 1), of the rows from `start` on."""
    words = random.bits(random.key(seed, kind, what), start * columns, n * columns)
    drawn: Floats = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn.reshape(n, columns)


def _single(x: Floats) -> Floats:
    """As the batch will hold it, so that labels follow from the very numbers that are given."""
    return x.astype(np.float32).astype(np.float64)


def _concepts(
    seed: int, kind: str, start: int, n: int, drifts: Sequence[int], width: float
) -> Ints:
    """Which concept each row is of: the number of the last drift that it lies behind."""
    t = np.arange(start, start + n)
    concept = np.zeros(n, np.int64)
    for k, position in enumerate(drifts, start=1):
        if width:
            away = np.clip(-4.0 * (t - position) / width, -700.0, 700.0)
            behind = _uniform(seed, kind, f"drift {k}", start, n, 1)[:, 0] < 1 / (1 + np.exp(away))
        else:
            behind = t >= position
        concept[behind] = k
    return concept


def _flipped(seed: int, kind: str, start: int, n: int, noise: float) -> npt.NDArray[np.bool_]:
    return _uniform(seed, kind, "noise", start, n, 1)[:, 0] < noise


def _batch(x: Floats, y: npt.NDArray[np.bool_]) -> Batch:
    return Batch(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.int64)))
