"""What goes into an index, checked: items through the encoder, vectors as float32 rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tessera.errors import InputError

__all__ = ["Encoder", "Floats", "as_rows", "encoded"]

Encoder = Callable[[Sequence[Any]], Tensor]
Floats = npt.NDArray[np.float32]

_ENCODED_AT_ONCE = 256


def encoded(encoder: Encoder | None, items: Sequence[Any], dim: int) -> Tensor:
    """What the encoder makes of the items: [n, dim].

    Raises:
        InputError: There is no encoder, or it gave something else.
    """
    if encoder is None:
        raise InputError(
            "this retrieval.Index has no encoder: give vectors, or build it with encoder="
        )
    found = [torch.empty(0, dim)]
    for start in range(0, len(items), _ENCODED_AT_ONCE):
        some = list(items[start : start + _ENCODED_AT_ONCE])
        vectors = encoder(some)
        if not isinstance(vectors, Tensor) or vectors.shape != (len(some), dim):
            got = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
            raise InputError(
                f"the encoder must give vectors [{len(some)}, {dim}] for {len(some)} items, "
                f"got {got}"
            )
        found.append(vectors.detach().cpu())
    return torch.cat(found)


def as_rows(who: str, vectors: Tensor, dim: int, metric: str) -> Floats:
    """Finite float32 rows, of length 1 for "cosine".

    Raises:
        InputError: The shape is another, or a number is none.
    """
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or vectors.shape[1] != dim:
        got = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise InputError(f"{who} needs vectors [n, {dim}], got {got}")
    rows = vectors.detach().to("cpu", torch.float64).numpy()
    finite = np.isfinite(rows).all(1)
    if metric == "dot":  # which keeps them as they are
        finite &= (np.abs(rows) <= np.finfo(np.float32).max).all(1)
    if not finite.all():
        bad = int(np.flatnonzero(~finite)[0])
        raise InputError(f"{who}: vector {bad} has NaN or infinite numbers, as float32")
    if metric == "cosine":
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if len(rows) and not lengths.min() > 0:
            bad = int(lengths.argmin())
            raise InputError(f"{who}: vector {bad} is zero, and has no direction")
        rows = rows / lengths
    return rows.astype(np.float32)
