"""New data against replayed data, weighed by how much the stream has drifted."""

from __future__ import annotations

from torch import Tensor

from tessera.errors import InputError
from tessera.ops.firstclass import RECENCY_WEIGHTED

__all__ = ["recency_weighted"]


def recency_weighted(new: Tensor, replay: Tensor, *, rho: float) -> Tensor:
    """``(1 - rho) replay + rho new``: two losses as one.

    Args:
        new: The loss on what just arrived, 0-d.
        replay: The loss on what was rehearsed, 0-d.
        rho: Weight of the new, in [0, 1]; raise it when the stream drifts.

    Returns:
        0-d tensor. Gradients reach both.

    Raises:
        InputError: `rho` lies outside [0, 1], or a loss is not 0-d.

    Example:
        >>> import torch
        >>> recency_weighted(torch.tensor(4.0), torch.tensor(0.0), rho=0.25).item()
        1.0
    """
    if not 0 <= rho <= 1:
        raise InputError(f"loss.recency_weighted needs rho in [0, 1], got {rho}")
    if new.dim() or replay.dim():
        raise InputError(
            f"loss.recency_weighted weighs two 0-d losses, got {tuple(new.shape)} and "
            f"{tuple(replay.shape)}; take their means first"
        )
    mixed: Tensor = RECENCY_WEIGHTED(new, replay, float(rho))
    return mixed
