"""The model `tessera learn` uses unless told otherwise."""

from __future__ import annotations

import math

from torch import nn

__all__ = ["mlp"]


def mlp(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A perceptron with two hidden layers of 256 ReLU units.

    Args:
        input_shape: Of one example; flattened.
        num_classes: Outputs.

    Example:
        >>> sum(p.numel() for p in mlp((1, 8, 8), 10).parameters())
        85002
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(input_shape), 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, num_classes),
    )
