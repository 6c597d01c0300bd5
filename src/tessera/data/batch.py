"""What a stream yields and a training step takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch"]


class Batch(NamedTuple):
    """Examples and their labels, by name or by position.

    Attributes:
        x: Inputs, shape [n, ...].
        y: Labels, int64 of shape [n] for classification.

    Example:
        >>> import torch
        >>> batch = Batch(torch.zeros(2, 3), torch.tensor([0, 1]))
        >>> x, y = batch
        >>> x is batch.x, batch.y.tolist()
        (True, [0, 1])
    """

    x: Tensor
    y: Tensor
