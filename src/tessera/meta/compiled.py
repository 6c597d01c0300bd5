"""A whole meta-gradient as one call, and as one compiled graph."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from tessera import ops as T
from tessera.data import Batch
from tessera.errors import InputError, unknown_name
from tessera.meta.calling import Buffers
from tessera.meta.compiled_graph import Compiled, Result, kinds
from tessera.meta.inner import InnerOpt, Tensors, require_finite
from tessera.meta.loop import LossFn, Only, Plan, one_loss
from tessera.meta.recompute import leaves_of
from tessera.meta.tasks import losses_of, support_of

__all__ = ["MetaStep"]

Compile: TypeAlias = bool | Literal["background"]
_SHAPES = 8


@final
class MetaStep:
    """The outer loss of a batch of tasks and its gradient: ``loss = step(support, query)``.

    ``L = mean over tasks of loss_fn(adapted(query.x), query.y)``. A call does what `maml_tasks`,
    the loss and ``backward()`` do: the gradient is added to ``.grad`` of whatever the outer loss
    depends on (the model, or the delta; learned rates; what `loss_fn` closes over).

    With `compile` the whole of it (inner loops, outer loss, gradient) is one graph, compiled by
    PyTorch's inductor for each new shape of batches, and kept on disk for the next process; on a
    CPU only: elsewhere it runs uncompiled, with a warning. The
    first result of a compiled graph is compared with the uncompiled one, and so is every tenth,
    hundredth, and so on; where they disagree, or nothing can be compiled, there is a warning and
    the uncompiled one is used. A tensor may change its values between calls; what your functions
    read that is no tensor is what it was at the first call.

    Args:
        model: As for `maml_tasks`.
        inner_opt: As for `maml_step`. Rates that are learned are parameters, or views of some.
        K: How many steps, >= 0; by default what `inner_opt` says.
        create_graph: False takes the steps' gradients for constants.
        loss_fn: (output, y) -> 0-d loss of one task, inner and outer.
        buffers: As for `maml_step`.
        only: As for `maml_step`.
        compile: True waits for the compiler at the first call of a shape (half a minute or more);
            "background" goes on uncompiled meanwhile; False never compiles.

    Raises:
        InputError: The model or the rule cannot be run this way.
        UnknownNameError: No such `buffers` or `compile`.

    Example:
        >>> from tessera import graph as tg
        >>> model = nn.Linear(2, 3)
        >>> step = MetaStep(model, inner_opt=tg.SGD(0.1), K=2)
        >>> tasks = Batch(torch.ones(4, 5, 2), torch.zeros(4, 5, dtype=torch.int64))
        >>> loss = step(tasks, tasks)
        >>> loss.shape, model.weight.grad.shape
        (torch.Size([]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_opt: InnerOpt,
        K: int | None = None,
        create_graph: bool = True,
        loss_fn: LossFn = T.cross_entropy,
        buffers: Buffers = "batch",
        only: Only = None,
        compile: Compile = False,
    ) -> None:
        if compile not in (False, True, "background"):
            raise unknown_name("compile", str(compile), ["True", "False", "background"])
        self._model, self._loss_fn, self._compile = model, loss_fn, compile
        self._plan = Plan(
            inner_opt=inner_opt,
            K=K,
            create_graph=create_graph,
            buffers=buffers,
            only=only,
            remat=False,
            truncate=None,
            state=None,
        )
        self._plan.functional(model, stacked=True)  # to refuse now what a call would refuse
        self._shapes: dict[Any, Compiled] = {}
        self._lock, self._full = threading.Lock(), False

    def __call__(self, support: Batch, query: Batch) -> Tensor:
        """The outer loss, 0-d and detached; the gradient is added to ``.grad``.

        Args:
            support: x [tasks, n, ...] and y [tasks, n, ...].
            query: The same with another n, if you like.

        Raises:
            InputError: Bad shapes, or the loss reached no parameter that is adapted.
            NonFiniteError: A support loss is NaN or infinite; it says at which step and of which
                task. No ``.grad`` was touched.
        """
        given = [*support_of(support), *support_of(query)]
        if len(given[0]) != len(given[2]):
            raise InputError(
                f"support and query need the same number of tasks, got {len(given[0])} and "
                f"{len(given[2])}"
            )
        with torch.enable_grad():
            compiled = self._compiled(given) if self._compile else None
            if compiled is None or not compiled.ready():
                found = self._sure(given)
            else:
                found = compiled(given, lambda: self._sure(given))
        # Accumulated by autograd itself, so that hooks see it.
        torch.autograd.backward(list(found.leaves), list(found.gradients))
        return found.outer

    def ready(self, *, wait_s: float = 0.0) -> bool:
        """Whether all shapes seen so far run compiled, after waiting for up to `wait_s` seconds.

        Example:
            >>> from tessera import graph as tg
            >>> MetaStep(nn.Linear(2, 1), inner_opt=tg.SGD(0.1), K=1).ready()
            False
        """
        shapes = list(self._shapes.values())
        return bool(shapes) and all(shape.ready(wait_s=wait_s) for shape in shapes)

    def _sure(self, given: Sequence[Tensor]) -> Result:
        """Uncompiled, and checked as soon as the inner loops are done."""
        return self._gradients(given, finite=True)

    def _gradients(self, given: Sequence[Tensor], *, finite: bool = False) -> Result:
        x, y, query_x, query_y = given
        run = self._plan.functional(self._model, stacked=True)
        start = self._plan.start(run, x.shape[0])
        end = self._plan.descend(losses_of(run, self._loss_fn, x, y), start)

        def one(params: Tensors, running: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return one_loss(self._loss_fn, run.call(params, (x,), running=running)[0], y)

        if finite and end.losses:
            require_finite(torch.stack(end.losses))
        each = torch.func.vmap(one)(dict(end.params), dict(end.running), query_x, query_y)
        outer = each.mean()
        leaves = leaves_of([outer], [])
        found = torch.autograd.grad(outer, leaves, allow_unused=True)
        pairs = [(leaf, g) for leaf, g in zip(leaves, found, strict=True) if g is not None]
        return Result(
            outer=outer.detach(),
            losses=torch.stack(end.losses) if end.losses else each.detach().new_zeros(0),
            leaves=[leaf for leaf, _ in pairs],
            gradients=[g for _, g in pairs],
        )

    def _compiled(self, given: Sequence[Tensor]) -> Compiled | None:
        """For batches of this shape and a model in this state; None if there are too many."""
        held = list(self._model.modules())
        state = [
            *kinds(given),
            *((id(m), m.training) for m in held),
            *((id(p), p.requires_grad) for p in self._model.parameters()),
            *_autocast(given[0].device.type),
        ]
        key = tuple(state)
        with self._lock:
            known = self._shapes.get(key)
            if known is not None and not known.fits():
                del self._shapes[key]
                known = None
            if known is None and len(self._shapes) < _SHAPES:
                later = self._compile == "background"
                known = Compiled(self._gradients, given, background=later, held=held)
                self._shapes[key] = known
            elif known is None and not self._full:
                self._full = True
                warnings.warn(
                    f"MetaStep has compiled for {_SHAPES} shapes of batches, or states of the "
                    "model, and runs others uncompiled; give batches of one shape",
                    stacklevel=3,
                )
        return known


def _autocast(kind: str) -> tuple[Any, ...]:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
