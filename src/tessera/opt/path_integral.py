"""SI's importance, integrated along the path the weights take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from tessera.errors import AnchorError, InputError
from tessera.graph import Transform
from tessera.ops.quadratic import PenaltyTap

__all__ = ["path_integral"]


def path_integral(*, damping: float = 0.1) -> Transform:
    """Accumulate SI's importance for the next anchor.

    Along a task every step adds ``W -= g * (theta_after - theta_before)`` with g the gradient of
    the task's loss, so W is the fall of the loss that each weight is responsible for. An anchor
    taken from the model turns it into ``omega += max(0, W / (Delta^2 + damping))``, Delta the way
    from the last anchor, stores omega as ``anchor.stats["path_integral"]`` and starts afresh.

    The gradient that quadratic penalties (`loss.ewc`, `loss.si`, `loss.l2sp`, `opt.consolidate`)
    send into the weights is not the task's and is left out; distillation and replay count as part
    of the task's loss. Inside `torch.compile` penalties cannot be told apart and count as well.

    Args:
        damping: xi, > 0; 0.1 in the paper.

    Returns:
        A transform for ``tg.Adam(..., plugin=...)`` or ``tg.SGD(..., plugin=...)``. Keep it when a
        new optimizer is built for the next task, so that omega goes on.

    Raises:
        InputError: `damping` is not positive.

    Source:
        Zenke, Poole & Ganguli 2017, eqs. 3-5 (arXiv:1703.04200).

    Example:
        >>> from tessera import arch, graph as tg
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=path_integral())
        >>> model(torch.ones(1, 1)).sum().backward()  # gradient 1, step -0.1: W = 0.1
        >>> optimizer.step()
        >>> anchor = arch.anchor_from(model, "t1", fisher=None)
        >>> round(anchor.stats["path_integral"]["weight"].item(), 4)  # 0.1 / (0.1^2 + 0.1)
        0.9091
    """
    if not damping > 0:
        raise InputError(f"opt.path_integral needs damping > 0, got {damping}")
    return _PathIntegral(damping)


@final
class _PathIntegral(Transform):
    def __init__(self, damping: float) -> None:
        self._damping = damping
        self._w: list[Tensor] = []
        self._omega: list[Tensor] = []
        self._start: list[Tensor] = []
        self._task: list[Tensor | None] = []
        self._before: list[Tensor] = []

    def attach(self, params: Sequence[nn.Parameter]) -> None:
        known = [p.shape for p in self.params] or [o.shape for o in self._omega]
        moved = self.params and [id(p) for p in self.params] != [id(p) for p in params]
        if moved or (known and known != [p.shape for p in params]):
            raise AnchorError(
                "this opt.path_integral already integrates along the path of other parameters; "
                "make a new one for another model"
            )
        self.params = params
        self._tap = PenaltyTap(params)
        if not known:
            self._w = [torch.zeros_like(p) for p in params]
            self._omega = [torch.zeros_like(p) for p in params]
            self._start = [p.detach().clone() for p in params]

    def before_step(self) -> None:
        penalties = self._tap.take()
        self._task = []
        for p, penalty in zip(self.params, penalties, strict=True):
            if p.grad is None:
                self._task.append(None)
            else:
                g = p.grad.detach()
                self._task.append(g - penalty if penalty is not None else g.clone())
        # A copy: on a CPU a detached tensor is the weight itself and would move with it.
        self._before = [p.detach().clone() for p in self.params]

    def after_step(self) -> None:
        for w, g, p, before in zip(self._w, self._task, self.params, self._before, strict=True):
            if g is not None:
                w.addcmul_(g, p.detach() - before, value=-1)
        # A penalty that came after our look at the gradients belongs to this step, not the next.
        self._tap.take()

    def on_anchor(self, names: Mapping[int, str]) -> dict[str, Any]:
        found: dict[str, Tensor] = {}
        for i, p in enumerate(self.params):
            gap = p.detach() - self._start[i]
            self._omega[i] += (self._w[i] / (gap.square() + self._damping)).clamp_(min=0)
            self._w[i].zero_()
            self._start[i].copy_(p.detach())
            if id(p) in names:
                found[names[id(p)]] = self._omega[i].clone()
        return {"path_integral": found}

    def state_dict(self) -> dict[str, Any]:
        return {"w": list(self._w), "omega": list(self._omega), "start": list(self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = {k: [t.detach().clone() for t in state[k]] for k in ("w", "omega", "start")}
        shapes = [p.shape for p in self.params] or [t.shape for t in saved["omega"]]
        if any([t.shape for t in tensors] != shapes for tensors in saved.values()):
            raise InputError("opt.path_integral: the saved state is of parameters of other shapes")
        devices = [p.device for p in self.params] or [t.device for t in saved["omega"]]
        self._w, self._omega, self._start = (
            [t.to(d) for t, d in zip(tensors, devices, strict=True)] for tensors in saved.values()
        )
