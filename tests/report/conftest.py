import math

import pytest

from tessera.metrics import AccuracyMatrix


@pytest.fixture
def learned():
    """A made-up result in which every task falls from 0.9 by 0.1 with every later task."""

    def make(num_tasks=3, *, recipe="er", seed=0, **changes):
        def accuracy(after, task):
            return max(0.0, 0.9 - 0.1 * (after - task)) if after >= task else 0.05

        columns = range(1, num_tasks + 1)
        rows = [[accuracy(i, j) for j in columns] for i in range(num_tasks + 1)]
        matrix = AccuracyMatrix.from_rows(rows)
        result = {
            "recipe": recipe,
            "scenario": "class",
            "stream": "digits",
            "seed": seed,
            "num_tasks": num_tasks,
            "accuracy_matrix": rows,
            "average_accuracy": matrix.average_accuracy(),
            "backward_transfer": matrix.backward_transfer(),
            "forward_transfer": matrix.forward_transfer(),
            "forgetting": matrix.forgetting(),
            "seconds": 12.34,
            "weights_sha256": "ab" * 32,
            "settings": {"lr": 0.05, "command": "tessera learn --recipe er"},
            "curve": [
                {"step": 100 * i - 50 * half, "task": i, "accuracy": rows[i - half]}
                for i in columns
                for half in (1, 0)
            ],
        }
        return result | changes

    return make


@pytest.fixture
def joint(learned):
    """The joint baseline: no order, so nothing between the first and the last row."""

    def make(num_tasks=3, **changes):
        rows = [[0.1] * num_tasks, *[[None] * num_tasks] * (num_tasks - 1), [0.95] * num_tasks]
        undefined = dict.fromkeys(("backward_transfer", "forgetting"))
        undefined |= {"forward_transfer": math.nan, "accuracy_matrix": rows, "curve": []}
        return learned(num_tasks, recipe="joint", average_accuracy=0.95) | undefined | changes

    return make
