"""What a query finds."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Hits"]


class Hits(NamedTuple):
    """The nearest entries of one query, best first; of equal scores the smaller id first.

    Attributes:
        ids: int64 [m], m <= k.
        scores: float64 [m], falling: cosines in [-1, 1], or inner products.
        payloads: What was stored with each, m of them.
        weights: float64 [m], ``softmax(scores / temperature)``: shares to compose the payloads
            with. They add up to 1, or there are none.

    Example:
        >>> import torch
        >>> hits = Hits(torch.tensor([7]), torch.tensor([0.9]), ["text"], torch.tensor([1.0]))
        >>> ids, scores, payloads, weights = hits
        >>> payloads
        ['text']
    """

    ids: Tensor
    scores: Tensor
    payloads: list[Any]
    weights: Tensor
