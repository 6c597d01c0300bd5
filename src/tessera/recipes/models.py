"""The models `tessera learn` uses unless told otherwise."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from tessera.errors import NonFiniteError

__all__ = ["Standardize", "mlp", "small_mlp"]


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


def small_mlp(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """One hidden layer of 64 ReLU units over standardized features: for streams of table rows.

    Args:
        input_shape: Of one example; flattened.
        num_classes: Outputs.

    Example:
        >>> small_mlp((9,), 2)(torch.ones(5, 9)).shape
        torch.Size([5, 2])
    """
    return nn.Sequential(
        nn.Flatten(),
        Standardize(math.prod(input_shape)),
        nn.Linear(math.prod(input_shape), 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


@final
class Standardize(nn.Module):
    """Features less their mean over their deviation, both of the stream so far.

    In training mode a batch first moves the statistics: a row weighs 1/n of n rows seen, and at
    least ``1 / memory``, so that a scale that drifts is followed. In eval mode they stand still.

    Args:
        features: d, >= 1.
        memory: Rows after which the past counts e times less.

    Example:
        >>> layer = Standardize(1)
        >>> layer(torch.tensor([[1.0], [3.0]])).flatten().tolist()
        [-1.0, 1.0]
    """

    mean: Tensor
    square: Tensor
    rows: Tensor

    def __init__(self, features: int, *, memory: float = 10_000.0) -> None:
        super().__init__()
        self.memory = memory
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("square", torch.zeros(features))  # mean square gap to the mean
        self.register_buffer("rows", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, d] to [n, d]; a feature that never varied becomes 0."""
        if self.training:
            with torch.no_grad():
                self._move(x)
        gap = x - self.mean
        return gap * torch.where(self.square > 0, torch.rsqrt(self.square), 0.0)

    def _move(self, x: Tensor) -> None:
        seen = float(self.rows) + len(x)
        share = max(len(x) / seen, min(1.0, len(x) / self.memory))
        square, mean = torch.var_mean(x, 0, correction=0)
        if not math.isfinite(square.sum()):
            raise NonFiniteError(
                "Standardize was given a batch that is not finite; its statistics stand. Leave "
                "rows with NaN or infinite features out"
            )
        gap = mean - self.mean
        self.mean.add_(gap, alpha=share)
        # The spread of a mixture: that within its two parts, and that between their means.
        self.square.lerp_(square, share).addcmul_(gap, gap, value=share * (1 - share))
        self.rows.fill_(seen)
