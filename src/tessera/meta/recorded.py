"""An inner loop as one node of a graph that is being captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tessera.errors import GraphError
from tessera.graph.inner import InnerSGD
from tessera.graph.regions import closed_gradient_region
from tessera.meta.adapted import MetaState
from tessera.meta.inner import steps_of
from tessera.meta.loop import Plan
from tessera.ops.firstclass import MAML_STEP

__all__ = ["recorded", "recording"]

# (adapted, x, y) -> the support loss, 0-d
Loss = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


def recording() -> bool:
    """Whether ops are being recorded before they are differentiated: `tg.capture`, `torch.export`.

    Example:
        >>> recording()
        False
    """
    return bool(torch._ops._len_torch_dispatch_stack_pre_dispatch())  # type: ignore[no-untyped-call]


def recorded(
    plan: Plan, loss: Loss, start: Mapping[str, Tensor], batch: Sequence[Tensor]
) -> MetaState:
    """The loop as one ``tessera.maml_step``, with the gradient of `loss` as its region.

    Args:
        plan: Must be plain gradient descent at one rate that is a number.
        loss: Plain operations; what it closes over becomes an input of the node.
        start: What is adapted.
        batch: x and y.

    Returns:
        Without losses: the node gives none, and nothing looks whether they are finite.

    Raises:
        GraphError: The loop is none that the op can hold, or the loss is no graph.
    """
    rule, K = plan.inner_opt, steps_of(plan.inner_opt, plan.K)
    if not isinstance(rule, InnerSGD) or rule.momentum or not isinstance(rule.lr, float | int):
        raise _refused(f"inner_opt={type(rule).__name__} with tensors, lists or momentum")
    options = {
        "buffers='per_task'": plan.buffers == "per_task",
        "remat=True": plan.remat,
        "truncate=": plan.truncate is not None,
        "state=": plan.state is not None,
    }
    for option, given in options.items():
        if given:
            raise _refused(option)
    names = list(start)

    def of(params: list[Tensor], given: list[Tensor]) -> Tensor:
        return loss(dict(zip(names, params, strict=True)), *given)

    gradients, closed = closed_gradient_region(of, list(start.values()), batch)
    after = MAML_STEP.node(
        list(start.values()), [*batch, *closed], gradients, K, float(rule.lr), plan.create_graph
    )
    params = dict(zip(names, after, strict=True))
    return MetaState(losses=torch.zeros(0), params=params, slots={}, running={}, steps=K)


def _refused(what: str) -> GraphError:
    return GraphError(
        f"a captured inner loop is gradient descent at one rate, inner_opt=tg.SGD(0.1), got {what};"
        " run it uncaptured, or compiled by meta.MetaStep"
    )
