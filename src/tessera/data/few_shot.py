"""Few-shot episodes: small classification problems drawn from the classes of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, final

import numpy.typing as npt
import torch
from torch import Tensor

from tessera.data.batch import Batch
from tessera.errors import InputError
from tessera.random import generator

Array: TypeAlias = Tensor | npt.NDArray[Any]

__all__ = ["Episodes", "Labelled", "episodes"]


class Labelled(Protocol):
    """Examples and their classes: a `Batch`, or `Glyphs`.

    Example:
        >>> some: Labelled = Batch(torch.zeros(2, 3), torch.tensor([0, 1]))
    """

    @property
    def x(self) -> Tensor:
        """Inputs, [n, ...]."""

    @property
    def y(self) -> Tensor:
        """The class of each, int64 [n]."""


@final
class Episodes:
    """Endless; item i is a function of (seed, i). `episodes` makes it.

    Example:
        >>> examples = Batch(torch.arange(12.0).view(12, 1), torch.arange(12) // 4)
        >>> drawn = episodes(examples, ways=2, shots=1, queries=3, tasks=5)
        >>> support, query = drawn[1000]
        >>> query.x.shape, bool((query.x == drawn[1000][1].x).all())
        (torch.Size([5, 6, 1]), True)
    """

    def __init__(
        self, x: Tensor, members: Tensor, sizes: Tensor, shape: tuple[int, int, int, int], seed: int
    ) -> None:
        # members [C, most]: the rows of each class, its first sizes[c] columns.
        self._x, self._members, self._sizes, self._shape, self._seed = (
            x,
            members,
            sizes,
            shape,
            seed,
        )

    def __getitem__(self, index: int) -> tuple[Batch, Batch]:
        """The support sets and the query sets of the tasks number `index`, counted from 0.

        Returns:
            Two batches, x [tasks, ways * shots, ...] and x [tasks, ways * queries, ...]. Labels
            are 0 .. ways-1, ascending; which class is 0 is drawn anew in every task. No example
            is in both.

        Raises:
            IndexError: `index` is negative: there is no last episode.
        """
        if index < 0:
            raise IndexError(f"episodes count from 0 and have no end, got {index}")
        ways, shots, queries, tasks = self._shape
        draw = generator(self._seed, "episodes", index)
        classes = torch.rand(tasks, len(self._sizes), generator=draw).argsort(1)[:, :ways]
        keys = torch.rand(tasks, ways, self._members.shape[1], generator=draw)
        absent = torch.arange(keys.shape[2]) >= self._sizes[classes].unsqueeze(2)
        places = keys.masked_fill(absent, 2.0).argsort(2)[..., : shots + queries]
        rows = self._members[classes].gather(2, places)
        return self._batch(rows[..., :shots]), self._batch(rows[..., shots:])

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        """All of them from number 0; the caller ends it."""
        index = 0
        while True:
            yield self[index]
            index += 1

    def _batch(self, rows: Tensor) -> Batch:
        tasks, ways, each = rows.shape
        device = self._x.device
        x = self._x[rows.reshape(tasks, ways * each).to(device)]
        return Batch(x, torch.arange(ways, device=device).repeat_interleave(each).repeat(tasks, 1))


def episodes(
    examples: Labelled | tuple[Array, Array],
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    tasks: int = 16,
    seed: int = 0,
) -> Episodes:
    """Batches of few-shot tasks, each of `ways` classes that are drawn without replacement.

    To go on after number 999 of an earlier run, ask for number 1000; there is no state to keep.

    Args:
        examples: x [n, ...] and y int64 [n], as `data.glyphs` gives them: a `Batch`, a pair of
            tensors or arrays, or an object with `x` and `y`. Labels may be any numbers. Every
            class needs ``shots + queries`` examples.
        ways: Classes of a task, >= 1.
        shots: Examples of each class to learn from, >= 1.
        queries: Examples of each class to be judged by, >= 1.
        tasks: Tasks at a time, >= 1.
        seed: Of all draws.

    Returns:
        An endless sequence of (support, query), for `meta.maml_tasks`.

    Raises:
        InputError: Fewer classes than `ways`, too few examples of one, or a count below 1.

    Source:
        Vinyals et al. 2016, section 4.1 (arXiv:1606.04080).

    Example:
        >>> examples = Batch(torch.arange(12.0).view(12, 1), torch.arange(12) // 4)
        >>> for support, query in episodes(examples, ways=3, shots=1, queries=3, tasks=2):
        ...     break
        >>> support.x.shape, support.y.tolist()
        (torch.Size([2, 3, 1]), [[0, 1, 2], [0, 1, 2]])
    """
    counts = {"ways": ways, "shots": shots, "queries": queries, "tasks": tasks}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"episodes needs {name} >= 1, got {count!r}")
    x, y = _pair(examples)
    if y.dim() != 1 or y.dtype != torch.int64 or x.dim() < 1 or x.shape[0] != len(y):
        raise InputError(
            f"episodes needs x [n, ...] and y int64 [n], got {tuple(x.shape)} and {y.dtype} "
            f"{tuple(y.shape)}"
        )
    labels, index, sizes = torch.unique(y.cpu(), return_inverse=True, return_counts=True)
    if len(labels) < ways:
        raise InputError(f"episodes of {ways} ways need as many classes, there are {len(labels)}")
    if int(sizes.min()) < shots + queries:
        least = int(sizes.argmin())
        raise InputError(
            f"episodes need {shots} + {queries} examples of every class, class "
            f"{int(labels[least])} has {int(sizes[least])}; leave it out, or ask for fewer"
        )
    order = index.argsort(stable=True)
    column = torch.arange(len(y)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    members = torch.zeros(len(labels), int(sizes.max()), dtype=torch.int64)
    members[index[order], column] = order
    return Episodes(x, members, sizes, (ways, shots, queries, tasks), seed)


def _pair(examples: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(examples, tuple) and hasattr(examples, "x") and hasattr(examples, "y"):
        examples = examples.x, examples.y
    if not isinstance(examples, tuple) or len(examples) != 2:
        raise InputError(
            f"episodes takes examples with x and y, or (x, y), got {type(examples).__name__}; "
            "data.Batch(x, y) makes them"
        )
    return torch.as_tensor(examples[0]), torch.as_tensor(examples[1])
