"""Many inner loops at once: one vmapped forward over all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tessera import ops as T
from tessera.arch.base import named
from tessera.arch.delta import Delta
from tessera.data import Batch
from tessera.errors import GraphError, InputError
from tessera.meta.adapted import Adapted, MetaState
from tessera.meta.calling import Buffers, Functional
from tessera.meta.inner import InnerOpt, LossOf, Point, Tensors
from tessera.meta.loop import LossFn, Only, Plan, one_loss
from tessera.meta.recorded import recording

__all__ = ["losses_of", "maml_tasks", "support_of"]


def maml_tasks(
    model: nn.Module,
    tasks: Batch,
    *,
    inner_opt: InnerOpt,
    K: int | None = None,
    create_graph: bool = True,
    loss_fn: LossFn = T.cross_entropy,
    buffers: Buffers = "batch",
    only: Only = None,
    remat: bool = False,
    truncate: int | None = None,
    chunk: int | None = None,
    state: MetaState | None = None,
) -> tuple[Adapted, MetaState]:
    """`maml_step` for many tasks in one go: the same numbers as a loop over them, sooner.

    Args:
        model: As for `maml_step`; recurrent layers of PyTorch cannot be run over tasks at once.
        tasks: The support sets, x [tasks, n, ...] and y [tasks, n, ...].
        inner_opt: As for `maml_step`; a learning rate has the shape of its parameter, without
            tasks.
        K: How many steps, >= 0; by default what `inner_opt` says.
        create_graph: False takes the steps' gradients for constants.
        loss_fn: (output, y) -> 0-d loss of one task; it runs under `torch.func.vmap`.
        buffers: As for `maml_step`.
        only: As for `maml_step`.
        remat: As for `maml_step`.
        truncate: As for `maml_step`.
        chunk: How many tasks at once, >= 1; None takes all. It bounds the memory in use at a time,
            not that of the graph.
        state: Of an earlier call, to go on from.

    Returns:
        `Adapted`, which takes and gives ``[tasks, n, ...]``, and the `MetaState`.

    Raises:
        InputError: Bad shapes or arguments, or a loss reached no parameter that is adapted.
        UnknownNameError: `only` names nothing of the model, or there is no such `buffers`.
        NonFiniteError: A support loss is NaN or infinite; it says at which step and of which task.
        GraphError: It is being captured; `maml_step` can be.

    Example:
        >>> from tessera import graph as tg
        >>> model = nn.Linear(2, 3)
        >>> tasks = Batch(torch.ones(4, 5, 2), torch.zeros(4, 5, dtype=torch.int64))
        >>> adapted, state = maml_tasks(model, tasks, inner_opt=tg.SGD(0.1), K=2)
        >>> adapted(torch.ones(4, 7, 2)).shape, state.losses.shape
        (torch.Size([4, 7, 3]), torch.Size([2, 4]))
    """
    plan = Plan(
        inner_opt=inner_opt,
        K=K,
        create_graph=create_graph,
        buffers=buffers,
        only=only,
        remat=remat,
        truncate=truncate,
        state=state,
    )
    x, y = support_of(tasks, chunk)
    if recording():
        raise GraphError(
            "a captured graph holds no vmap: capture one task with maml_step, whose node is mapped "
            "over tasks by torch.func.vmap; or compile all of it with meta.MetaStep"
        )
    for name, module in named(model).items():
        if isinstance(module, nn.RNNBase):
            raise InputError(
                f"PyTorch has no {type(module).__name__} over tasks ({name!r}); loop over the "
                "tasks with maml_step"
            )
    run = plan.functional(model, stacked=True)
    count, size = x.shape[0], chunk or x.shape[0]
    start = plan.start(run, count)
    ends = []
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count))
        part = start if size >= count else _part(start, rows)
        ends.append(plan.descend(losses_of(run, loss_fn, x[rows], y[rows]), part))
    after = plan.state_after(ends[0] if len(ends) == 1 else _joined(ends), count)
    delta = only if isinstance(only, Delta) else None
    return Adapted(run, after, tasks=count, chunk=chunk, delta=delta), after


def losses_of(run: Functional, loss_fn: LossFn, x: Tensor, y: Tensor) -> LossOf:
    """The losses of all tasks, by one vmapped forward over them, as `descend` takes it.

    Args:
        run: The model, with ``stacked=True``.
        loss_fn: (output, y) -> 0-d loss of one task.
        x: [tasks, n, ...].
        y: [tasks, n, ...].

    Example:
        >>> run, x = Functional(nn.Linear(2, 1), stacked=True), torch.ones(3, 4, 2)
        >>> params = {n: p.expand(3, *p.shape) for n, p in run.params().items()}
        >>> losses, _ = losses_of(run, nn.functional.mse_loss, x, torch.ones(3, 4, 1))(params, {})
        >>> losses.shape
        torch.Size([3])
    """

    def one(
        params: Tensors, running: Tensors, x: Tensor, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output, after = run.call(params, (x,), running=running, learn=True)
        return one_loss(loss_fn, output, y), after

    every = torch.func.vmap(one)

    def losses(params: Tensors, running: Tensors) -> tuple[Tensor, Tensors]:
        try:
            found: tuple[Tensor, Tensors] = every(params, running, x, y)
        except RuntimeError as error:
            if "out of bounds" not in str(error):
                raise
            raise InputError(
                f"the inner loss or the model got an index out of range ({error}); the labels "
                f"span {y.min().item()} .. {y.max().item()}"
            ) from error
        return found

    return losses


def _part(point: Point, rows: slice) -> Point:
    return Point(
        params={n: p[rows] for n, p in point.params.items()},
        slots={s: {n: t[rows] for n, t in ts.items()} for s, ts in point.slots.items()},
        running={n: b[rows] for n, b in point.running.items()},
        step=point.step,
    )


def _joined(points: Sequence[Point]) -> Point:
    first = points[0]
    return Point(
        params={n: torch.cat([p.params[n] for p in points]) for n in first.params},
        slots={
            s: {n: torch.cat([p.slots[s][n] for p in points]) for n in ts}
            for s, ts in first.slots.items()
        },
        running={n: torch.cat([p.running[n] for p in points]) for n in first.running},
        step=first.step,
        losses=tuple(torch.cat(row) for row in zip(*(p.losses for p in points), strict=True)),
    )


def support_of(tasks: Any, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The tensors of `maml_tasks`'s tasks, once they were found in order.

    Example:
        >>> x, y = support_of(Batch(torch.ones(2, 3, 4), torch.zeros(2, 3)))
        >>> x.shape
        torch.Size([2, 3, 4])
    """
    if not (isinstance(tasks, tuple) and len(tasks) == 2):
        raise InputError(f"the tasks are data.Batch(x, y), got {type(tasks).__name__}")
    x, y = tasks
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or min(x.dim(), y.dim()) < 2:
        got = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in tasks]
        raise InputError(
            f"the tasks are x [tasks, n, ...] and y [tasks, n, ...], got {got[0]} and {got[1]}; "
            "maml_step takes a single one"
        )
    if 0 in x.shape[:2] or x.shape[:2] != y.shape[:2]:
        raise InputError(
            "x and y need the same numbers of tasks and of examples, at least one of each, got x "
            f"{tuple(x.shape)} and y {tuple(y.shape)}"
        )
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"chunk= is a number of tasks, >= 1, got {chunk!r}")
    return x, y
