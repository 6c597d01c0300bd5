"""Elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tessera import trees
from tessera.arch import Anchor
from tessera.arch.merge import as_anchors, merged, require_strength
from tessera.ops import weighted_square
from tessera.ops.firstclass import EWC
from tessera.ops.registry import transformed

__all__ = ["ewc"]


def ewc(model: nn.Module, anchor: Anchor | Sequence[Anchor], *, lam: float) -> Tensor:
    """Elastic weight consolidation, ``lam/2 sum_i F_i (theta_i - theta*_i)^2``.

    Pulls each weight back to where it was, in proportion to how much it mattered. Weights the
    anchor does not name (a new head, say) are free. Several anchors give the sum of their
    penalties; they are merged into one quadratic once, so five cost what one costs.

    Args:
        model: The module in training.
        anchor: One anchor or several, from ``arch.anchor_from(..., fisher="diagonal")``. With no
            anchor (an empty sequence) the penalty is 0.
        lam: Strength, >= 0. F is a mean over examples, so working values are large: 1e2 .. 1e6
            (`docs/methods.md` has them by scenario). Papers that leave out the 1/2 need twice
            their lambda here.

    Returns:
        0-d tensor to be added to the task loss; exactly 0 at a single anchor. Gradients reach
        `model` only.

    Raises:
        AnchorError: An anchor carries no Fisher, or is of another model.
        InputError: `lam` is negative or not finite.

    Source:
        Kirkpatrick et al. 2017, eq. 3 (arXiv:1612.00796); merging: Huszar 2018
        (arXiv:1712.03847), with every anchor kept at its own minimum.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> theta = model.weight.detach().clone()
        >>> anchor = Anchor("t0", {"weight": theta}, {"fisher": {"weight": torch.ones(1, 2)}})
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(2.0)
        >>> round(ewc(model, anchor, lam=0.5).item(), 5)
        2.0
    """
    require_strength("loss.ewc", "lam", lam)
    current = trees.parameters(model)
    q = merged(as_anchors(anchor, "loss.ewc"), current, who="loss.ewc")
    params, centres = [current[name] for name in q.centres], list(q.centres.values())
    if params and transformed():
        penalty: Tensor = EWC.node(params, centres, list(q.fisher.values()), lam, q.constant)
        return penalty
    return weighted_square(params, centres, q.weights(lam), constant=lam * q.constant)
