"""The accuracy matrix R[i, j] and what the field reads off it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tessera.errors import MetricError

__all__ = ["AccuracyMatrix"]


class AccuracyMatrix:
    """Accuracy on every task after every task, ``R[i, j]``.

    Row i is the model after learning task i (i = 0: the untrained model), column j is task j;
    tasks count from 1. A cell that was not recorded is NaN.

    Args:
        num_tasks: T, >= 1.

    Raises:
        MetricError: A task, row or accuracy is out of range.

    Example:
        >>> matrix = AccuracyMatrix(2)
        >>> for after, row in enumerate([(0.5, 0.5), (0.9, 0.6), (0.7, 0.8)]):
        ...     for task, accuracy in enumerate(row, start=1):
        ...         matrix.record(after, task, accuracy)
        >>> matrix.average_accuracy(), round(matrix.forgetting(), 3)
        (0.75, 0.2)
    """

    def __init__(self, num_tasks: int) -> None:
        if num_tasks < 1:
            raise MetricError(f"AccuracyMatrix needs num_tasks >= 1, got {num_tasks}")
        self.num_tasks = num_tasks
        self._rows = [[math.nan] * num_tasks for _ in range(num_tasks + 1)]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[float]]) -> AccuracyMatrix:
        """The matrix with these T + 1 rows of T accuracies, as `rows` returns them.

        Example:
            >>> AccuracyMatrix.from_rows([[0.5], [0.9]]).average_accuracy()
            0.9
        """
        matrix = cls(len(rows) - 1)
        for after, row in enumerate(rows):
            if len(row) != matrix.num_tasks:
                raise MetricError(
                    f"row {after} has {len(row)} accuracies, a matrix of {len(rows)} rows "
                    f"needs {matrix.num_tasks}"
                )
            for task, accuracy in enumerate(row, start=1):
                if not math.isnan(accuracy):
                    matrix.record(after, task, accuracy)
        return matrix

    def record(self, after: int, task: int, accuracy: float) -> None:
        """Set ``R[after, task]``.

        Args:
            after: How many tasks were learned, 0 .. T; 0 is the untrained model.
            task: The task measured, 1 .. T.
            accuracy: In [0, 1].
        """
        if not 0 <= after <= self.num_tasks or not 1 <= task <= self.num_tasks:
            raise MetricError(
                f"record(after={after}, task={task}) is outside a matrix of {self.num_tasks} "
                f"tasks: after is 0 (untrained) .. {self.num_tasks}, task is 1 .. {self.num_tasks}"
            )
        if not 0.0 <= accuracy <= 1.0:
            raise MetricError(f"an accuracy lies in [0, 1], got {accuracy}")
        self._rows[after][task - 1] = float(accuracy)

    @property
    def rows(self) -> list[list[float]]:
        """T + 1 rows of T accuracies, row 0 the untrained model; NaN where not recorded."""
        return [list(row) for row in self._rows]

    def average_accuracy(self) -> float:
        """ACC, ``1/T sum_j R[T, j]``: how good the final model is on all tasks.

        Source:
            Lopez-Paz & Ranzato 2017, eq. 2 (arXiv:1706.08840).

        Example:
            >>> AccuracyMatrix.from_rows([[0.1], [0.8]]).average_accuracy()
            0.8
        """
        last = self.num_tasks
        return self._mean([self._at(last, j) for j in range(1, last + 1)])

    def backward_transfer(self) -> float:
        """BWT, ``1/(T-1) sum_{j<T} R[T, j] - R[j, j]``: negative is forgetting.

        0.0 for a single task.

        Source:
            Lopez-Paz & Ranzato 2017, eq. 3 (arXiv:1706.08840).

        Example:
            >>> m = AccuracyMatrix.from_rows([[0.5, 0.5], [0.9, 0.5], [0.6, 0.8]])
            >>> round(m.backward_transfer(), 3)
            -0.3
        """
        last = self.num_tasks
        return self._mean([self._at(last, j) - self._at(j, j) for j in range(1, last)])

    def forward_transfer(self) -> float:
        """FWT, ``1/(T-1) sum_{j>=2} R[j-1, j] - R[0, j]``: help to tasks not yet seen.

        The baseline is the untrained model's own accuracy (row 0). 0.0 for a single task.

        Source:
            Lopez-Paz & Ranzato 2017, eq. 4 (arXiv:1706.08840).

        Example:
            >>> m = AccuracyMatrix.from_rows([[0.5, 0.5], [0.9, 0.7], [0.6, 0.8]])
            >>> round(m.forward_transfer(), 3)
            0.2
        """
        last = self.num_tasks
        return self._mean([self._at(j - 1, j) - self._at(0, j) for j in range(2, last + 1)])

    def forgetting(self) -> float:
        """``1/(T-1) sum_{j<T} max_{1<=i<T} R[i, j] - R[T, j]``: best earlier minus final.

        The untrained row does not count; negative where the final model is the best; 0.0 for a
        single task. Cells above the diagonal (a task before it was learned) count if recorded.

        Source:
            Chaudhry et al. 2018, eq. 3 (arXiv:1801.10112).

        Example:
            >>> rows = [[0.5] * 3, [0.6, 0.5, 0.5], [0.9, 0.8, 0.5], [0.5, 0.8, 0.7]]
            >>> round(AccuracyMatrix.from_rows(rows).forgetting(), 3)
            0.2
        """
        last = self.num_tasks
        return self._mean([max(self._earlier(j)) - self._at(last, j) for j in range(1, last)])

    def _earlier(self, task: int) -> list[float]:
        before = [self._rows[i][task - 1] for i in range(1, task)]
        after = [self._at(i, task) for i in range(task, self.num_tasks)]
        return [a for a in before if not math.isnan(a)] + after

    @staticmethod
    def _mean(values: list[float]) -> float:
        return math.fsum(values) / len(values) if values else 0.0

    def _at(self, after: int, task: int) -> float:
        value = self._rows[after][task - 1]
        if math.isnan(value):
            raise MetricError(
                f"this metric needs the accuracy on task {task} after task {after}, which was "
                f"not recorded: call record(after={after}, task={task}, accuracy=...)"
            )
        return value
