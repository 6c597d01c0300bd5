"""Accuracy on a stream that is tested before it is learned, beside what learns nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from torch import Tensor

from tessera.errors import CheckpointError, InputError, MetricError

__all__ = ["Prequential"]


@final
class Prequential:
    """Test-then-train accuracy, with what no-change and majority would have got.

    "No-change" answers with the label before, "majority" with the most frequent label so far (of
    several the smallest), both row by row. A model that does not beat them has learned nothing:
    on Elec2 no-change gets 85 %.

    Args:
        num_classes: C, >= 2; labels are 0 .. C-1.
        every: Rows between the points of the curve, >= 1.

    Raises:
        MetricError: An argument is out of range.

    Source:
        Gama, Sebastiao & Rodrigues 2013, "On evaluating stream learning algorithms", Machine
        Learning 90(3); no-change and kappa-temporal: Zliobaite et al. 2015, "Evaluation methods
        and decision theory for classification of streaming data with temporal dependence",
        Machine Learning 98(3).

    Example:
        >>> import torch
        >>> score = Prequential(2, every=4)
        >>> score.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]))
        0.25
        >>> score.accuracy(), score.no_change(), score.majority()
        (0.75, 0.75, 0.5)
    """

    def __init__(self, num_classes: int, *, every: int = 200) -> None:
        if num_classes < 2 or every < 1:
            raise MetricError(
                f"Prequential needs num_classes >= 2 and every >= 1, got {num_classes}, {every}"
            )
        self._classes, self._every = num_classes, every
        self._right = self._same = self._frequent = 0
        self._counts = np.zeros(num_classes, np.int64)
        self._last = 0
        self._part = [0, 0, 0, 0]  # rows, right, same, frequent since the last point
        self._curve: list[list[float]] = []

    @property
    def rows(self) -> int:
        """How many rows were tested."""
        return int(self._counts.sum())

    @property
    def curve(self) -> list[list[float]]:
        """[rows so far, accuracy, no-change, majority], each over the rows since the last point."""
        return [list(point) for point in self._curve]

    def update(self, predicted: Tensor, labels: Tensor) -> float:
        """Count a batch that the model has not learned yet, in stream order.

        Args:
            predicted: Classes, int64 [n].
            labels: The truth, int64 [n], n >= 1.

        Returns:
            The share of the batch that was wrong, in [0, 1]: what a drift detector wants.

        Raises:
            InputError: The shapes differ, there is no row, or a label is out of range. Nothing
                was counted.
        """
        y, guess = labels.detach().cpu().numpy(), predicted.detach().cpu().numpy()
        if y.ndim != 1 or y.shape != guess.shape or not len(y):
            raise InputError(
                f"Prequential.update needs classes [n] and labels [n], n >= 1, got {guess.shape} "
                f"and {y.shape}"
            )
        if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= self._classes:
            raise InputError(
                f"Prequential.update needs labels 0 .. {self._classes - 1}, got {y.dtype} "
                f"{y.min()} .. {y.max()}; build Prequential with more classes"
            )
        right = guess == y
        before = np.concatenate([[self._last], y[:-1]])
        # Row i meets the counts of the rows before it.
        counts = np.eye(self._classes, dtype=np.int64)[y].cumsum(0)
        counts = np.concatenate([np.zeros((1, self._classes), np.int64), counts[:-1]])
        same, frequent = before == y, (counts + self._counts).argmax(1) == y
        self._add(right, same, frequent)
        self._counts += np.bincount(y, minlength=self._classes)
        self._last = int(y[-1])
        return 1.0 - float(right.mean())

    def _add(self, *hits: np.ndarray[Any, Any]) -> None:
        """Count hits of model, no-change and majority, [n] each, and set points of the curve."""
        done, n = self.rows, len(hits[0])
        start = 0
        while start < n:
            stop = min(n, start + self._every - self._part[0])
            found = [int(h[start:stop].sum()) for h in hits]
            self._part = [self._part[0] + stop - start] + [
                a + b for a, b in zip(self._part[1:], found, strict=True)
            ]
            self._right, self._same = self._right + found[0], self._same + found[1]
            self._frequent += found[2]
            if self._part[0] == self._every:
                self._curve.append([done + stop, *(k / self._every for k in self._part[1:])])
                self._part = [0, 0, 0, 0]
            start = stop

    def accuracy(self) -> float:
        """Share of all rows that were right before they were learned.

        Raises:
            MetricError: No row was tested yet; likewise for the others.
        """
        return self._share(self._right)

    def no_change(self) -> float:
        """What the label before would have got; the very first guess is class 0."""
        return self._share(self._same)

    def majority(self) -> float:
        """What the most frequent label so far would have got."""
        return self._share(self._frequent)

    def kappa_temporal(self) -> float:
        """``(accuracy - no_change) / (1 - no_change)``: 0 is as good as no-change, 1 is perfect."""
        floor = self.no_change()
        return (self.accuracy() - floor) / (1 - floor) if floor < 1 else 0.0

    def _share(self, hits: int) -> float:
        if not self.rows:
            raise MetricError("Prequential has tested no row yet; call update first")
        return hits / self.rows

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        return {
            "num_classes": self._classes,
            "every": self._every,
            "counts": self._counts.tolist(),
            "hits": [self._right, self._same, self._frequent],
            "last": self._last,
            "part": list(self._part),
            "curve": self.curve,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            CheckpointError: It is damaged, or of another number of classes or spacing; nothing was
                changed.
        """
        for name, own in (("num_classes", self._classes), ("every", self._every)):
            if state.get(name) != own:
                raise CheckpointError(
                    f"this state of Prequential has {name}={state.get(name)!r}, the one that loads "
                    f"it {own!r}; build it as the saved one was"
                )
        try:
            counts = np.array(state["counts"], np.int64)
            hits, part = ([int(n) for n in state[name]] for name in ("hits", "part"))
            last, curve = int(state["last"]), [list(map(float, point)) for point in state["curve"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"damaged state of Prequential ({type(error).__name__}: {error})"
            ) from error
        if counts.shape != (self._classes,) or len(hits) != 3 or len(part) != 4:
            raise CheckpointError("damaged state of Prequential: a count is missing")
        self._counts, self._last, self._part, self._curve = counts, last, part, curve
        self._right, self._same, self._frequent = hits
