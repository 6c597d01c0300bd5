"""Lay deltas over a model and call it."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, final

from torch import nn

from tessera.arch import Delta, overlay
from tessera.arch.base import base_hash, structure
from tessera.arch.rows import StackedModel
from tessera.arch.stack import Stack
from tessera.errors import InputError

__all__ = ["Applied", "apply"]

_KEPT = 256  # shadows of one model; each is a few hundred small objects
_LOCK = threading.Lock()
_CACHE: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Any, _Entry]] = weakref.WeakKeyDictionary()


@final
class Applied:
    """A model under deltas, to be called as the model is.

    Any number of threads may call it. It follows the deltas' tensors while these are trained, and
    keeps the mode (train or eval) the model had when it was applied.

    Attributes:
        module: The shadow: a module of the base's own type, for what takes a module
            (``torch.compile``, ``.generate``). Its parameters are the base's; only read.

    Example:
        >>> import torch
        >>> applied = Applied(nn.Linear(2, 1))
        >>> applied(torch.ones(3, 2)).shape
        torch.Size([3, 1])
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives under the deltas."""
        return self.module(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Applied({type(self.module).__mro__[1].__name__})"


@final
class _Entry:
    """A cached shadow: valid while the model is built as it was and the deltas live."""

    def __init__(
        self, built: tuple[int, ...], deltas: Sequence[Any], applied: Applied | StackedModel
    ) -> None:
        self.built, self.applied = built, applied
        self.deltas: list[weakref.ref[Any]] = [weakref.ref(d) for d in deltas]

    def fits(self, built: tuple[int, ...], deltas: Sequence[Any]) -> bool:
        """Whether it is still the shadow of these deltas over a model built like this."""
        return self.built == built and all(
            ref() is d for ref, d in zip(self.deltas, deltas, strict=True)
        )


def apply(
    model: nn.Module,
    delta: Delta | Sequence[Delta] | Stack,
    *,
    weights: Sequence[float] | None = None,
) -> Applied | StackedModel:
    """The model under one delta, several, or one for each row of a batch.

    The model is neither changed nor copied: the result shares its parameters. It is kept and given
    again while the model is built as it is and the deltas live.

    Args:
        model: The base, in the mode (train or eval) that is wanted.
        delta: A delta; several, whose changes add up; or what `stack` made.
        weights: One for each of several deltas, e.g. ``hits.weights``; None: all 1.

    Returns:
        A callable with the model's arguments; of a stack, with ``rows=`` besides.

    Raises:
        UnknownNameError: A delta lies over a module the model lacks.
        DeltaError: A delta is of another base, or does not fit.
        InputError: The number of weights is not that of the deltas.

    Example:
        >>> import torch
        >>> from tessera.peft.lora import lora
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> delta, x = lora(model, r=1), torch.ones(3, 4)
        >>> bool((apply(model, delta)(x) == model(x)).all())
        True
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"peft.apply needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(delta, Stack):
        if weights is not None:
            raise InputError("peft.apply: a stack has a delta for each row, and no weights")
        return _stacked(model, delta)
    deltas = [delta] if isinstance(delta, Delta) else list(delta)
    if not deltas or not all(isinstance(d, Delta) for d in deltas):
        raise InputError("peft.apply needs at least one arch.Delta, or a stack of them")
    shares = [1.0] * len(deltas) if weights is None else [float(w) for w in weights]
    if len(shares) != len(deltas):
        raise InputError(f"peft.apply got {len(deltas)} deltas and {len(shares)} weights")
    key, built = (*map(id, deltas), *shares), structure(model)
    known: Applied | None = _known(model, key, built, deltas)
    if known is not None and all(d.base_hash in ("", base_hash(model)) for d in deltas):
        return known
    applied = Applied(overlay(model, list(zip(deltas, shares, strict=True))))
    _keep(model, key, _Entry(built, deltas, applied))
    return applied


def _stacked(model: nn.Module, stack: Stack) -> StackedModel:
    built = structure(model)
    known: StackedModel | None = _known(model, ("stack", id(stack)), built, [stack])
    if known is None:
        known = StackedModel(model, stack)
        _keep(model, ("stack", id(stack)), _Entry(built, [stack], known))
    return known


def _known(model: nn.Module, key: Any, built: tuple[int, ...], deltas: Sequence[Any]) -> Any:
    with _LOCK:
        entries = _CACHE.get(model)
        entry = None if entries is None else entries.get(key)
        if entries is None or entry is None or not entry.fits(built, deltas):
            return None
        entries.move_to_end(key)
        return entry.applied


def _keep(model: nn.Module, key: Any, entry: _Entry) -> None:
    with _LOCK:
        entries = _CACHE.setdefault(model, OrderedDict())
        for old in [k for k, e in entries.items() if any(r() is None for r in e.deltas)]:
            del entries[old]
        entries[key] = entry
        entries.move_to_end(key)
        while len(entries) > _KEPT:
            entries.popitem(last=False)
