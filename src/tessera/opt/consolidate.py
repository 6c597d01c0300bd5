"""EWC inside the optimizer: the penalty's gradient in one pass, without autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.arch import Anchor
from tessera.arch.merge import as_anchors, merged, require_strength
from tessera.errors import AnchorError
from tessera.graph import Transform
from tessera.ops.kernels import AdamState, adam_pulls, add_pulls, sgd_pulls
from tessera.ops.quadratic import is_watched, report

__all__ = ["consolidate"]


def consolidate(anchor: Anchor | Sequence[Anchor], *, lam: float) -> Transform:
    """EWC as a plugin: adds ``lam sum_k F_k (theta - theta*_k)`` to the gradients before a step.

    The same weights as ``+ loss.ewc(model, anchors, lam=lam)`` to rounding, at a fraction of the
    cost: no graph, no second backward, and five anchors cost what one costs. The reported loss is
    the task's alone.

    Args:
        anchor: One anchor or several, taken from the model in training in this process, or loaded
            and then bound to it with ``anchor.bind(model)``.
        lam: Strength, >= 0; the lambda of `loss.ewc`.

    Returns:
        A transform for ``tg.Adam(..., plugin=...)`` or ``tg.SGD(..., plugin=...)``.

    Raises:
        AnchorError: When the optimizer is built: an anchor has no Fisher, is not bound, or is of a
            model whose parameters the optimizer does not have.
        InputError: `lam` is negative or not finite.

    Source:
        Kirkpatrick et al. 2017, eq. 3 (arXiv:1612.00796).

    Example:
        >>> from tessera import graph as tg
        >>> model = nn.Linear(1, 1, bias=False)
        >>> anchor = Anchor("t0", {"weight": model.weight.detach() - 1},
        ...                 {"fisher": {"weight": torch.ones(1, 1)}})
        >>> _ = anchor.bind(model)
        >>> optimizer = tg.SGD(model.parameters(), lr=1.0, plugin=consolidate(anchor, lam=0.5))
        >>> before = model.weight.item()
        >>> optimizer.step()
        >>> round(before - model.weight.item(), 5)
        0.5
    """
    require_strength("opt.consolidate", "lam", lam)
    return _Consolidate(as_anchors(anchor, "opt.consolidate"), lam)


@final
class _Consolidate(Transform):
    def __init__(self, anchors: tuple[Anchor, ...], lam: float) -> None:
        self._anchors = anchors
        self._lam = lam
        self._live: dict[str, nn.Parameter] = {}

    def attach(self, params: Sequence[nn.Parameter]) -> None:
        self.params = params
        mine = {id(p) for p in params}
        for a in self._anchors:
            live = a.live()
            strangers = [n for n in a.fisher if n not in live or id(live[n]) not in mine]
            if strangers:
                raise AnchorError(
                    f"opt.consolidate: anchor {a.name!r} holds {strangers[0]!r}, which is none of "
                    "this optimizer's parameters. If the anchor was loaded or made on a copy, call "
                    "anchor.bind(model) with the model in training first"
                )
            self._live.update({n: live[n] for n in a.fisher})
        everything = {n: p for a in self._anchors for n, p in a.live().items()}
        self._quadratic = merged(self._anchors, everything, who="opt.consolidate")

    def _terms(self) -> tuple[list[Tensor], list[nn.Parameter], list[Tensor], list[Tensor]]:
        """Gradients, parameters, centres and weights, in one order."""
        q = self._quadratic = self._quadratic.at(self._live)
        weights = dict(zip(q.centres, q.weights(self._lam), strict=True))
        names = [n for n in q.centres if self._live[n].requires_grad]
        params = [self._live[n] for n in names]
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in params if p.grad is not None]
        return grads, params, [q.centres[n] for n in names], [weights[n] for n in names]

    def before_step(self) -> None:
        grads, params, centres, weights = self._terms()
        for p, c, w in zip(params, centres, weights, strict=True):
            if is_watched(p):
                report([p], [(p.detach() - c) * w])
        add_pulls(grads, [p.detach() for p in params], centres, weights)

    def take_step(self, optimizer: Optimizer) -> Sequence[nn.Parameter]:
        """Plain SGD and Adam need no more than gradient and pull, so one pass does both."""
        rate = _plain_rate(optimizer)
        if rate is None and not _is_plain_adam(optimizer):
            return ()
        grads, params, centres, weights = self._terms()
        if not params or any(map(is_watched, params)):
            return ()
        values = [p.detach() for p in params]
        if rate is not None:
            fused = sgd_pulls(grads, values, centres, weights, lr=rate)
        else:
            state = _adam_state(optimizer, params)
            fused = state is not None and adam_pulls(grads, values, centres, weights, state)
        return params if fused else ()


def _plain_rate(optimizer: Optimizer) -> float | None:
    """The learning rate of SGD without momentum or decay, the same for all; None for others."""
    if type(optimizer) is not torch.optim.SGD:
        return None
    rates = {g["lr"] for g in optimizer.param_groups}
    simple = all(
        not (g["momentum"] or g["weight_decay"] or g["maximize"] or g["differentiable"])
        for g in optimizer.param_groups
    )
    rate = rates.pop()
    return rate if simple and not rates and isinstance(rate, float) else None


def _is_plain_adam(optimizer: Optimizer) -> bool:
    """Whether it is PyTorch's fused Adam with one group of settings and nothing added to it."""
    if type(optimizer) is not torch.optim.Adam or len(optimizer.param_groups) != 1:
        return False
    group = optimizer.param_groups[0]
    added = ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable")
    return bool(
        group["fused"] and isinstance(group["lr"], float) and not any(group[k] for k in added)
    )


def _adam_state(optimizer: Optimizer, params: Sequence[nn.Parameter]) -> AdamState | None:
    """What the optimizer knows of the parameters; None before their first step."""
    states = [optimizer.state.get(p) for p in params]
    known = [s for s in states if s]
    if len(known) < len(states):
        return None
    group = optimizer.param_groups[0]
    return AdamState(
        means=[s["exp_avg"] for s in known],
        squares=[s["exp_avg_sq"] for s in known],
        steps=[s["step"] for s in known],
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
    )
