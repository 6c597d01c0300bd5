"""EWC inside the optimizer: the penalty's gradient in one pass, without autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import nn

from tessera.arch import Anchor
from tessera.arch.merge import as_anchors, merged, require_strength
from tessera.errors import AnchorError
from tessera.graph import Transform
from tessera.ops.kernels import add_pull, pull
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
        >>> import torch
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
        self._quadratic = merged(self._anchors, everything, lam=self._lam, who="opt.consolidate")

    def before_step(self) -> None:
        q = self._quadratic = self._quadratic.at(self._live)
        for name, centre in q.centres.items():
            p, w = self._live[name], q.weights[name]
            if not p.requires_grad:
                continue
            if is_watched(p) or p.grad is None:
                penalty, _ = pull(p.detach(), centre, w)
                report([p], [penalty])
                p.grad = penalty if p.grad is None else p.grad.add_(penalty)
            else:
                add_pull(p.grad, p.detach(), centre, w)
