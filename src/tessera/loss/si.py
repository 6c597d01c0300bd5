"""Synaptic intelligence."""

from __future__ import annotations

from torch import Tensor, nn

from tessera import trees
from tessera.arch import Anchor
from tessera.arch.anchor import require_fit
from tessera.arch.merge import require_strength
from tessera.errors import AnchorError
from tessera.ops import weighted_square
from tessera.ops.firstclass import SI
from tessera.ops.registry import transformed

__all__ = ["si"]


def si(model: nn.Module, anchor: Anchor, *, c: float) -> Tensor:
    """Synaptic intelligence, ``c sum_i omega_i (theta_i - theta*_i)^2``.

    The importance ``omega = sum over tasks of max(0, W / (Delta^2 + 0.1))`` is handed to the
    anchor by `opt.path_integral`, which integrates ``W``, the fall of the task's loss along each
    weight's path. It accumulates over the tasks, so the newest anchor is the only one needed.

    Args:
        model: The module in training.
        anchor: Made by `arch.anchor_from` while `opt.path_integral()` was a plugin of the
            optimizer that trained the model (``fisher=None`` will do).
        c: Strength, >= 0.

    Returns:
        0-d tensor to be added to the task loss; 0 at the anchor. Gradients reach `model` only.

    Raises:
        AnchorError: The anchor carries no path integral, or is of another model.
        InputError: `c` is negative or not finite.

    Source:
        Zenke, Poole & Ganguli 2017, eqs. 4-5 (arXiv:1703.04200).

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 1, bias=False)
        >>> stats = {"path_integral": {"weight": torch.full((1, 1), 3.0)}}
        >>> anchor = Anchor("t0", {"weight": model.weight.detach() - 1}, stats)
        >>> round(si(model, anchor, c=0.5).item(), 5)
        1.5
    """
    require_strength("loss.si", "c", c)
    omega = anchor.stats.get("path_integral")
    if not omega:
        raise AnchorError(
            f"loss.si needs a path integral, but anchor {anchor.name!r} has none. Train with "
            "tg.SGD(params, lr=..., plugin=opt.path_integral()) (or tg.Adam) and take the anchor "
            "after it has stepped"
        )
    current = trees.parameters(model)
    require_fit(anchor, current)
    params = [current[name] for name in omega]
    centres = [trees.beside(anchor.params[name], p) for name, p in zip(omega, params, strict=True)]
    importance = [trees.beside(w, p) for w, p in zip(omega.values(), params, strict=True)]
    if transformed():
        penalty: Tensor = SI.node(params, centres, importance, c)
        return penalty
    return weighted_square(params, centres, [(2.0 * c) * w for w in importance])
