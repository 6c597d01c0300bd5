"""What an inner loop returns: the adapted model, and where the loop stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from tessera import trees
from tessera.arch.delta import Delta
from tessera.errors import InputError
from tessera.graph.inner import Slots
from tessera.meta.calling import Functional

__all__ = ["Adapted", "MetaState"]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MetaState:
    """Where an inner loop stands; given back as ``state=``, the loop goes on from there.

    Attributes:
        losses: [steps], or [steps, tasks]: the support loss before each step; detached.
        params: Name -> tensor of what is adapted; with a leading dimension of tasks if there is.
        slots: What the inner optimizer remembers: "momentum", or "mean" and "square".
        running: Running statistics of each task, with ``buffers="per_task"``; else empty.
        steps: How many were taken.

    Example:
        >>> MetaState.at({}).losses.tolist()
        []
    """

    losses: Tensor
    params: Mapping[str, Tensor]
    slots: Slots
    running: Mapping[str, Tensor]
    steps: int

    @classmethod
    def at(cls, params: Mapping[str, Tensor]) -> MetaState:
        """The state of a loop that begins at `params`; what they do not name is the model's own.

        Args:
            params: Some of what is adapted, such as a head from `prototypes`; for `maml_tasks`
                with a leading dimension of tasks. The meta-gradient flows on into what they were
                made from.

        Example:
            >>> MetaState.at({"head.weight": torch.zeros(5, 3)}).steps
            0
        """
        return cls(losses=torch.zeros(0), params=dict(params), slots={}, running={}, steps=0)


@final
class Adapted:
    """A model with the parameters of its inner loop: ``adapted(x)``. The model is untouched.

    A backward through its outputs accumulates into the model's ``.grad``: through the inner loop,
    or past it with ``create_graph=False``.

    Attributes:
        params: Name -> tensor, of every parameter; of a delta, its trainable tensors. From
            `maml_tasks` each has a leading dimension of tasks.

    Example:
        >>> from tessera import graph as tg
        >>> from tessera.data import Batch
        >>> from tessera.meta.maml import maml_step
        >>> model = torch.nn.Linear(2, 3)
        >>> support = Batch(torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> adapted, state = maml_step(model, support, inner_opt=tg.SGD(0.1), K=2)
        >>> adapted(support.x).shape, sorted(adapted.params)
        (torch.Size([4, 3]), ['bias', 'weight'])
    """

    def __init__(
        self,
        run: Functional,
        state: MetaState,
        *,
        tasks: int | None = None,
        chunk: int | None = None,
        delta: Delta | None = None,
    ) -> None:
        self._run, self._moved, self._running = run, state.params, state.running
        self._tasks, self._chunk, self._delta = tasks, chunk, delta
        whole = {
            name: p if tasks is None else p.expand(tasks, *p.shape)
            for name, p in run.params().items()
        }
        self.params: Mapping[str, Tensor] = MappingProxyType({**whole, **state.params})

    def __call__(self, *args: Tensor) -> Any:
        """What the adapted model computes; of `maml_tasks`, each task on its part of ``[tasks, n,
        ...]``."""
        if self._tasks is None:
            return self._run.call(self._moved, args, running=self._running)[0]
        for x in args:
            if x.dim() < 1 or x.shape[0] != self._tasks:
                raise InputError(
                    f"this model was adapted to {self._tasks} tasks and takes [{self._tasks}, n, "
                    f"...], got {tuple(x.shape)}"
                )
        forward = torch.func.vmap(self._one, chunk_size=self._chunk)
        return forward(dict(self._moved), dict(self._running), args)

    def _one(self, params: dict[str, Tensor], running: dict[str, Tensor], args: Any) -> Any:
        return self._run.call(params, args, running=running)[0]

    def state_dict(self, task: int | None = None) -> dict[str, Tensor]:
        """Detached copies of `params` and of running statistics, for ``model.load_state_dict``.

        Args:
            task: Which one, after `maml_tasks`; None gives all, stacked.

        Raises:
            InputError: There is no such task.
        """
        found = trees.clone({**self.params, **self._running})
        return (
            found if task is None else {n: t[self._index(task)].clone() for n, t in found.items()}
        )

    def delta(self, task: int | None = None) -> Delta:
        """The delta that was adapted, as a snapshot to save or to serve.

        Raises:
            InputError: The loop adapted the model's own parameters, or there is no such task.
        """
        if self._delta is None:
            raise InputError("the inner loop adapted no delta; give it one with only=delta")
        if self._tasks is not None and task is None:
            raise InputError(f"which of the {self._tasks} tasks? Give delta(task)")
        mine = (
            self.params
            if task is None
            else {n: p[self._index(task)] for n, p in self.params.items()}
        )
        return replace(self._delta, tensors=trees.clone({**self._delta.tensors, **mine}))

    def _index(self, task: int) -> int:
        if self._tasks is None or not 0 <= task < self._tasks:
            raise InputError(f"there is no task {task} of {self._tasks or 'a single adaptation'}")
        return task
