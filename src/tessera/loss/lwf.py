"""Learning without forgetting: distil the model as it was."""

from __future__ import annotations

from torch import Tensor

from tessera.arch.merge import require_strength
from tessera.errors import InputError
from tessera.ops.firstclass import LWF

__all__ = ["lwf"]


def lwf(logits: Tensor, prev_logits: Tensor, *, T: float = 2.0, lam: float = 1.0) -> Tensor:
    """Learning without forgetting, ``lam T^2 KL(softmax(prev/T) || softmax(logits/T))``.

    The factor T^2 keeps the gradient's size independent of the temperature (to first order), so
    `lam` need not be tuned again when T changes. Mean over the batch.

    Args:
        logits: The model in training on the new inputs, [n, ..., C].
        prev_logits: ``anchor.model(x)`` on the same inputs, same shape; no gradient flows in.
        T: Temperature, > 0.
        lam: Strength, >= 0.

    Returns:
        0-d tensor to be added to the task loss; 0 where the two agree.

    Raises:
        InputError: Shapes differ, T is not positive and finite, or `lam` is negative.

    Source:
        Li & Hoiem 2016, eq. 2 (arXiv:1606.09282); T^2: Hinton, Vinyals & Dean 2015, section 2.1
        (arXiv:1503.02531).

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, -1.0]])
        >>> lwf(z, z).item(), lwf(z, -z, T=1.0).item() > 0
        (0.0, True)
    """
    require_strength("loss.lwf", "lam", lam)
    if not 0 < T < float("inf"):
        raise InputError(f"loss.lwf needs a finite temperature T > 0, got {T}")
    if logits.shape != prev_logits.shape:
        raise InputError(
            f"loss.lwf needs two logits of one shape, got {tuple(logits.shape)} and "
            f"{tuple(prev_logits.shape)}: run both models on the same inputs"
        )
    penalty: Tensor = LWF(logits, prev_logits, float(T), float(lam))
    return penalty
