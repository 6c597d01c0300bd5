"""L2-SP: stay near the starting point."""

from __future__ import annotations

from torch import Tensor, nn

from tessera import trees
from tessera.arch import Anchor
from tessera.arch.anchor import require_fit
from tessera.arch.merge import require_strength
from tessera.ops import weighted_square
from tessera.ops.firstclass import L2SP
from tessera.ops.registry import transformed

__all__ = ["l2sp"]


def l2sp(model: nn.Module, anchor: Anchor, *, lam: float) -> Tensor:
    """L2 towards the starting point, ``lam/2 sum_i (theta_i - theta*_i)^2``.

    `loss.ewc` with every importance equal to one: no data and no Fisher needed.

    Args:
        model: The module in training.
        anchor: From `arch.anchor_from`; ``fisher=None`` will do.
        lam: Strength, >= 0.

    Returns:
        0-d tensor to be added to the task loss; 0 at the anchor. Gradients reach `model` only.

    Raises:
        AnchorError: The anchor is of another model.
        InputError: `lam` is negative or not finite.

    Source:
        Li, Grandvalet & Davoine 2018, eq. 3 (arXiv:1802.01483).

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> anchor = Anchor("t0", {"weight": model.weight.detach() - 1})
        >>> round(l2sp(model, anchor, lam=3.0).item(), 5)
        3.0
    """
    require_strength("loss.l2sp", "lam", lam)
    current = trees.parameters(model)
    require_fit(anchor, current)
    params = [current[name] for name in anchor.params]
    centres = [trees.beside(c, p) for c, p in zip(anchor.params.values(), params, strict=True)]
    if transformed():
        penalty: Tensor = L2SP.node(params, centres, lam)
        return penalty
    return weighted_square(params, centres, float(lam))
