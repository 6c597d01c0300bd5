"""Put deltas side by side for batches in which each row has its own."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.arch import Delta
from tessera.arch.stack import Stack

__all__ = ["stack"]


def stack(deltas: Sequence[Delta], *, slots: int = 0) -> Stack:
    """Snapshots of the deltas in one tensor; ``apply(model, stack)(x, rows=rows)`` runs them.

    Args:
        deltas: Any kinds, ranks and sites, of one base.
        slots: Room for at least so many, for ``stack.put(slot, delta)`` later.

    Raises:
        InputError: There is no delta.
        DeltaError: They are of different bases, or differ in shape at a site.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tessera.peft.lora import lora
        >>> model = nn.Linear(3, 2)
        >>> both = stack([lora(model, r=1), lora(model, r=2, seed=1)])
        >>> both
        Stack(2 deltas, 2 slots, 10 values each)
    """
    return Stack([d.snapshot() for d in deltas], slots=slots)
