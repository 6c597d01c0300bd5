"""One data set, cut into the sequences of tasks that continual learning is measured on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tessera.data.batch import Batch
from tessera.data.readers import read_stream
from tessera.errors import InputError, unknown_name
from tessera.random import permutation

__all__ = ["Benchmark", "Task", "benchmark"]

_SCENARIOS = ("task", "domain", "class", "permuted")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """One stretch of the sequence: what is learned, and what it is judged by.

    Attributes:
        id: Which task, counted from 1.
        classes: The output labels that occur in it, ascending.
        train: Training examples, in the order of the data set.
        test: Examples that no task trains on.

    Example:
        >>> first = benchmark("digits").tasks[0]
        >>> first.id, first.classes, first.train.x.shape[1:]
        (1, (0, 1), torch.Size([1, 8, 8]))
    """

    id: int
    classes: tuple[int, ...]
    train: Batch
    test: Batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Benchmark:
    """The tasks of a scenario, in the order they are learned. Iterate it, or take its `len`.

    Attributes:
        name: The stream's name, or the folder's.
        scenario: "task", "domain", "class" or "permuted".
        tasks: Task 1 first.
        num_classes: C, how many outputs a model needs.
        input_shape: Shape of one example.
        mask: In the scenario "task", bool [C, C]: row y marks the classes that compete with the
            label y, which are those of its own task. So
            ``logits.masked_fill(~mask[y], -inf)`` is the task-incremental softmax, also for a
            batch that mixes tasks. None in the other scenarios.

    Example:
        >>> digits = benchmark("digits", "task")
        >>> [task.classes for task in digits]
        [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
        >>> digits.mask[2].nonzero().flatten().tolist()
        [2, 3]
    """

    name: str
    scenario: str
    tasks: tuple[Task, ...]
    num_classes: int
    input_shape: tuple[int, ...]
    mask: Tensor | None

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def joint(self) -> Task:
        """All tasks as one, for the model that may see everything at once.

        Returns:
            A task with the id `len(self)`, the training sets of all tasks in their order, the
            test sets likewise, and every class.

        Example:
            >>> whole = benchmark("digits").joint()
            >>> whole.id, len(whole.classes), len(whole.train.y), len(whole.test.y)
            (5, 10, 1437, 360)
        """
        return Task(
            id=len(self.tasks),
            classes=tuple(sorted({c for task in self.tasks for c in task.classes})),
            train=_joined([task.train for task in self.tasks]),
            test=_joined([task.test for task in self.tasks]),
        )


def benchmark(
    stream: str | os.PathLike[str],
    scenario: str = "class",
    *,
    num_tasks: int = 5,
    path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    validation: float = 0.0,
) -> Benchmark:
    """A stream cut into tasks.

    "task", "domain" and "class" cut the classes, in their order, into `num_tasks` equal groups.
    "class": one softmax over all C classes seen so far or not. "task": the same labels, and the
    task is known, so only its own classes compete (`Benchmark.mask`). "domain": the label is the
    rank within the group, C is the size of a group. "permuted": every task has all classes; task
    1 shows the examples as they are, each later one shuffles all input values by a permutation
    of its own (in memory: a copy of the data set a task).

    Args:
        stream: "digits" (ships with Tessera), "fashion_mnist", or a folder with the files that
            `tessera.data.readers.read_folder` names. Labels are 0 .. C-1, each present.
        scenario: "task", "domain", "class" or "permuted".
        num_tasks: >= 1; for all but "permuted" it divides C.
        path: Where fashion_mnist lies, if not where Debian puts it.
        seed: Of the permutations, and of the choice of validation examples.
        validation: Fraction in [0, 1) of the training examples. If positive, these are taken out
            of `train` and become `test`, and the real test set is not used at all: choose
            hyper-parameters so.

    Returns:
        The benchmark, on the CPU; `x` is float32, `y` int64.

    Raises:
        UnknownNameError: No such stream or scenario.
        MissingDataError: The data is not on this machine; the message says what provides it.
        InputError: The data is damaged, or an argument does not fit it.

    Source:
        Van de Ven, Tuytelaars & Tolias 2022, "Three types of incremental learning", Nature
        Machine Intelligence 4:1185; permuted: Goodfellow et al. 2013 (arXiv:1312.6211).

    Example:
        >>> for task in benchmark("digits", "domain", num_tasks=5):
        ...     print(task.id, task.classes, len(task.train.y), len(task.test.y))
        1 (0, 1) 292 68
        2 (0, 1) 291 69
        3 (0, 1) 297 66
        4 (0, 1) 268 92
        5 (0, 1) 289 65
    """
    if scenario not in _SCENARIOS:
        raise unknown_name("scenario", scenario, _SCENARIOS)
    if num_tasks < 1:
        raise InputError(f"benchmark needs num_tasks >= 1, got {num_tasks}")
    if not 0.0 <= validation < 1.0:
        raise InputError(f"validation is a fraction in [0, 1), got {validation}")
    train, test = read_stream(stream, path)
    num_labels = _count_labels(train, test, stream)
    if scenario != "permuted" and num_labels % num_tasks:
        raise InputError(
            f"{num_labels} classes cannot be cut into {num_tasks} equal groups; choose num_tasks "
            f"from {', '.join(str(n) for n in range(1, num_labels + 1) if num_labels % n == 0)}"
        )
    if validation > 0:
        train, test = _held_out(train, validation, seed)
    if scenario == "permuted":
        tasks = _permuted(train, test, num_tasks, num_labels, seed)
        num_classes = num_labels
    else:
        size = num_labels // num_tasks
        tasks = _by_class(train, test, size, num_tasks, ranked=scenario == "domain")
        num_classes = size if scenario == "domain" else num_labels
    group = torch.arange(num_labels) * num_tasks // num_labels
    return Benchmark(
        name=Path(os.fspath(stream)).name,
        scenario=scenario,
        tasks=tasks,
        num_classes=num_classes,
        input_shape=tuple(train.x.shape[1:]),
        mask=group[:, None] == group if scenario == "task" else None,
    )


def _count_labels(train: Batch, test: Batch, stream: str | os.PathLike[str]) -> int:
    """C, after checking that the labels are 0 .. C-1: a gap would be an output nobody trains."""
    present = np.unique(train.y.numpy())
    count = len(present)
    if present[-1] != count - 1:
        gap = next(i for i, label in enumerate(present) if i != label)
        raise InputError(
            f"{os.fspath(stream)}: labels must be 0 .. C-1 with none left out, but no training "
            f"example has label {gap} and the largest is {present[-1]}; renumber them with "
            "numpy.unique(y, return_inverse=True)"
        )
    if int(test.y.max()) >= count:
        raise InputError(
            f"{os.fspath(stream)}: the test set has label {int(test.y.max())}, "
            f"the training set only 0 .. {count - 1}"
        )
    return count


def _held_out(train: Batch, fraction: float, seed: int) -> tuple[Batch, Batch]:
    total = len(train.y)
    held = round(total * fraction)
    if not 0 < held < total:
        raise InputError(
            f"validation={fraction} of {total} training examples is {held}; "
            "both sides need at least one"
        )
    order = permutation(total, seed, "validation")
    kept, out = order[held:].sort().values, order[:held].sort().values
    return _rows(train, kept), _rows(train, out)


def _by_class(
    train: Batch, test: Batch, size: int, num_tasks: int, *, ranked: bool
) -> tuple[Task, ...]:
    tasks = []
    for index in range(num_tasks):
        first = index * size
        parts = []
        for part, data in (("training", train), ("test", test)):
            inside = ((data.y >= first) & (data.y < first + size)).nonzero().flatten()
            if not len(inside):
                raise InputError(
                    f"task {index + 1} (classes {first} .. {first + size - 1}) has no {part} "
                    "example; use more data, fewer tasks, or another validation fraction"
                )
            rows = _rows(data, inside)
            parts.append(Batch(rows.x, rows.y - first) if ranked else rows)
        base = 0 if ranked else first
        classes = tuple(range(base, base + size))
        tasks.append(Task(id=index + 1, classes=classes, train=parts[0], test=parts[1]))
    return tuple(tasks)


def _permuted(
    train: Batch, test: Batch, num_tasks: int, num_labels: int, seed: int
) -> tuple[Task, ...]:
    classes = tuple(range(num_labels))
    tasks = [Task(id=1, classes=classes, train=train, test=test)]
    for id in range(2, num_tasks + 1):
        order = permutation(train.x[0].numel(), seed, "permuted", id)
        shown = [
            Batch(data.x.flatten(1).index_select(1, order).view_as(data.x), data.y)
            for data in (train, test)
        ]
        tasks.append(Task(id=id, classes=classes, train=shown[0], test=shown[1]))
    return tuple(tasks)


def _rows(data: Batch, index: Tensor) -> Batch:
    return Batch(data.x.index_select(0, index), data.y.index_select(0, index))


def _joined(parts: list[Batch]) -> Batch:
    return Batch(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
