"""One inner loop: a model adapted to a support set, differentiable through its steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tessera import ops as T
from tessera.arch.delta import Delta
from tessera.data import Batch
from tessera.errors import InputError
from tessera.meta.adapted import Adapted, MetaState
from tessera.meta.calling import Buffers
from tessera.meta.inner import InnerOpt, Tensors
from tessera.meta.loop import LossFn, Only, Plan, chosen_of, one_loss
from tessera.meta.recorded import recorded, recording

__all__ = ["maml_step"]


def maml_step(
    model: nn.Module,
    batch: Batch,
    *,
    inner_opt: InnerOpt,
    K: int | None = None,
    create_graph: bool = True,
    loss_fn: LossFn = T.cross_entropy,
    buffers: Buffers = "batch",
    only: Only = None,
    remat: bool = False,
    truncate: int | None = None,
    state: MetaState | None = None,
) -> tuple[Adapted, MetaState]:
    """Adapt `model` to a support set: ``theta_k+1 = theta_k - lr grad L(theta_k; support)``.

    ``loss_fn(adapted(query.x), query.y).backward()`` then accumulates the meta-gradient in the
    model's ``.grad``. The model itself (parameters, gradients, buffers, mode) is never written to.
    Under `tg.no_grad()` the loop adapts all the same and keeps no graph. The forward must be a
    function of its inputs: dropout that is on is refused. Inside `tg.capture` the loop is one node,
    ``tessera.maml_step``; it then is `tg.SGD` at one rate, and the state has no losses.

    Args:
        model: Parameters with ``requires_grad=False`` are not adapted.
        batch: The support examples, x [n, ...] and y [n, ...], n >= 1.
        inner_opt: `tg.SGD(1e-2)`, `tg.Adam(1e-2)`, or another `InnerOpt`.
        K: How many steps, >= 0; by default what `inner_opt` says.
        create_graph: False takes the steps' gradients for constants (first-order MAML).
        loss_fn: (output, y) -> 0-d loss of the inner loop.
        buffers: What BatchNorm does: "batch", "frozen" or "per_task", as `Functional` says.
            "per_task": the support moves the task's running statistics, which `adapted` then uses.
        only: What is adapted: names or globs of parameters or of modules (ANIL: ``"head"``); or a
            `Delta` over the model, whose tensors then get the meta-gradient, and the model none.
        remat: Keep one point in sqrt(K) steps and compute the others again in the backward.
        truncate: Second order through the last so many steps; those before count as first order.
        state: Of an earlier call, to go on from.

    Returns:
        `Adapted`, a callable with ``.params``, and the `MetaState`, with ``.losses``.

    Raises:
        InputError: Bad shapes or arguments, or the loss reached no parameter that is adapted.
        UnknownNameError: `only` names nothing of the model, or there is no such `buffers`.
        NonFiniteError: A support loss is NaN or infinite; it says at which step.
        GraphError: It is being captured, and is no loop that a node can hold.

    Source:
        Finn, Abbeel & Levine 2017, algorithm 1 (arXiv:1703.03400).

    Example:
        >>> import torch
        >>> from tessera import graph as tg
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> support = Batch(torch.ones(1, 1), torch.zeros(1, 1))
        >>> adapted, state = maml_step(
        ...     model, support, inner_opt=tg.SGD(0.25), K=2, loss_fn=nn.functional.mse_loss)
        >>> nn.functional.mse_loss(adapted(support.x), support.y).backward()
        >>> state.losses.tolist(), adapted.params["weight"].item(), model.weight.grad.item()
        ([1.0, 0.25], 0.25, 0.125)
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
    x, y = _support(batch)
    run = plan.functional(model)
    delta = only if isinstance(only, Delta) else None
    if recording():

        def loss(params: Tensors, x: Tensor, y: Tensor) -> Tensor:
            inside = plan.functional(model)  # made of nothing of the trace around
            return one_loss(loss_fn, inside.call(params, (x,), learn=True)[0], y)

        node = recorded(plan, loss, chosen_of(run.params(), only), (x, y))
        return Adapted(run, node, delta=delta), node

    def loss_of(params: Tensors, running: Tensors) -> tuple[Tensor, Tensors]:
        output, running = run.call(params, (x,), running=running, learn=True)
        return one_loss(loss_fn, output, y), running

    end = plan.descend(loss_of, plan.start(run, None))
    after = plan.state_after(end, None)
    return Adapted(run, after, delta=delta), after


def _support(batch: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple) and len(batch) == 2):
        raise InputError(f"a support set is data.Batch(x, y), got {type(batch).__name__}")
    x, y = batch
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dim() < 1 or y.dim() < 1:
        raise InputError("a support set has tensors x [n, ...] and y [n, ...]")
    if x.shape[0] == 0 or x.shape[0] != y.shape[0]:
        raise InputError(
            f"a support set needs as many labels as inputs, at least one, got x {tuple(x.shape)} "
            f"and y {tuple(y.shape)}"
        )
    return x, y
