"""Rows of tensors, kept in numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Column", "Index", "Place", "row_problem", "shown"]

Index = npt.NDArray[np.intp]
Place = Index | slice

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """The rows of one field, kept by numpy as integers as wide as the field's elements.

    numpy moves whole rows at the speed of memcpy, and asks the kernel for huge pages, which
    random rows of a large store want. It knows no bfloat16, hence the integers.

    Attributes:
        dtype: Of the tensors that the integers stand for.
        row_shape: Of one row.
        store: [capacity, elements a row]; what was never written is undefined.

    Example:
        >>> value = torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16)
        >>> column = Column.like(value, 3)
        >>> column.put(slice(0, 2), value, slice(0, 2))
        >>> column.rows(np.array([1, 0])).tolist()
        [[2.0], [1.0]]
    """

    dtype: torch.dtype
    row_shape: tuple[int, ...]
    store: npt.NDArray[Any]

    @classmethod
    def like(cls, value: Tensor, capacity: int) -> Column:
        """Room for `capacity` rows as `value` [n, ...] has them."""
        row_shape = tuple(value.shape[1:])
        store = np.empty((capacity, math.prod(row_shape)), f"i{value.element_size()}")
        return cls(dtype=value.dtype, row_shape=row_shape, store=store)

    def put(self, place: Place, value: Tensor, source: Place) -> None:
        """Copy ``value[source]`` to `place`; `value` [n, ...] may be on any device."""
        words = value.detach().resolve_neg().view(_WORDS[value.element_size()])
        rows = words.numpy(force=True).reshape(len(value), self.store.shape[1])
        self.store[place] = rows[source] if isinstance(source, slice) else rows.take(source, 0)

    def rows(self, place: Place) -> Tensor:
        """A copy of the rows at `place`, as a CPU tensor [n, ...]."""
        taken = self.store[place].copy() if isinstance(place, slice) else self.store.take(place, 0)
        shaped = taken.reshape(len(taken), *self.row_shape)
        if self.dtype in _NUMPY:  # numpy sees the integers as what they are in a tenth of the time
            return torch.from_numpy(shaped.view(_NUMPY[self.dtype]))
        return torch.from_numpy(shaped).view(self.dtype)


def shown(value: object) -> str:
    """A value as an error message names it.

    Example:
        >>> shown(torch.zeros(2, 3)), shown("x")
        ('torch.float32 [2, 3]', 'str')
    """
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def row_problem(value: object) -> str | None:
    """What keeps a value from being rows of a column, if anything does.

    Example:
        >>> row_problem(torch.tensor([1.0, math.nan]))
        'has NaN or infinite values (torch.float32 [2]); leave those rows out'
        >>> row_problem(torch.zeros(2)) is None
        True
    """
    if not isinstance(value, Tensor) or value.ndim < 1 or value.is_complex():
        return f"must be a real tensor [n, ...], got {shown(value)}"
    if value.layout is not torch.strided or 0 in value.shape[1:]:
        return f"must be dense rows with at least one element, got {value.layout} {shown(value)}"
    if value.is_floating_point():
        wide = value.detach().float() if value.element_size() == 1 else value.detach()
        # A NaN or an infinity always reaches the sum; one that overflowed needs a second look.
        if not math.isfinite(wide.sum()) and not wide.isfinite().all():
            return f"has NaN or infinite values ({shown(value)}); leave those rows out"
    return None
