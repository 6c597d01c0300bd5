"""Dark experience replay: match the logits of the day."""

from __future__ import annotations

from torch import Tensor

from tessera.arch.merge import require_strength
from tessera.errors import InputError
from tessera.ops.firstclass import DER

__all__ = ["der"]


def der(logits: Tensor, stored_logits: Tensor, *, alpha: float) -> Tensor:
    """Dark experience replay, ``alpha mean (logits - stored)^2`` over all elements.

    Args:
        logits: The model in training on replayed inputs, [n, ..., C].
        stored_logits: What it answered when they were stored, same shape; no gradient flows in.
        alpha: Strength, >= 0.

    Returns:
        0-d tensor to be added to the task loss; 0 for an empty replay.

    Raises:
        InputError: Shapes differ, or `alpha` is negative.

    Source:
        Buzzega et al. 2020, eq. 6 (arXiv:2004.07211); DER++ adds the labels' loss, eq. 7.

    Example:
        >>> import torch
        >>> der(torch.ones(2, 3), torch.zeros(2, 3), alpha=0.5).item()
        0.5
    """
    require_strength("loss.der", "alpha", alpha)
    if logits.shape != stored_logits.shape:
        raise InputError(
            f"loss.der needs two logits of one shape, got {tuple(logits.shape)} and "
            f"{tuple(stored_logits.shape)}: store the logits of the same head"
        )
    penalty: Tensor = DER(logits, stored_logits, float(alpha))
    return penalty
