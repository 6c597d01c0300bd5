"""Which optimizer owns which parameter, and what it carries. Held weakly."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.graph.transform import Transform

__all__ = ["Owned", "own", "owned", "owner", "owners"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Owned:
    """What Tessera knows of an optimizer beyond PyTorch.

    Attributes:
        plugins: Its transforms, in order.
        batch_sizes: The rows of the newest training step, as its only item; empty if unknown.
        held: Parameters that a plugin updated in the step at work, with their gradients.
    """

    plugins: tuple[Transform, ...]
    batch_sizes: list[int]
    held: list[tuple[nn.Parameter, Tensor | None]]


# id(parameter) -> its optimizers, the newest last. An optimizer holds its parameters, so as long as
# one of them lives the id is not reused; the dead are dropped when they are met.
_OWNERS: dict[int, list[weakref.ref[Optimizer]]] = {}
_OWNED: weakref.WeakKeyDictionary[Optimizer, Owned] = weakref.WeakKeyDictionary()


def own(optimizer: Optimizer, plugins: tuple[Transform, ...]) -> None:
    """Register `optimizer` as the owner of its parameters; the newest living owner counts."""
    _OWNED[optimizer] = Owned(plugins=plugins, batch_sizes=[], held=[])
    for group in optimizer.param_groups:
        _claim(optimizer, group["params"])
    itself = weakref.ref(optimizer)

    def add_param_group(param_group: dict[str, Any]) -> None:
        known = itself()
        if known is not None:
            type(known).add_param_group(known, param_group)
            _claim(known, known.param_groups[-1]["params"])

    # PyTorch has no hook for this; a group that nobody owned would silently never learn.
    optimizer.add_param_group = add_param_group  # type: ignore[method-assign]


def _claim(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Make `optimizer` the newest owner of these parameters."""
    new = weakref.ref(optimizer)
    for p in params:
        living = [r for r in _OWNERS.get(id(p), ()) if r() is not None]
        _OWNERS[id(p)] = [*living, new]


def owner(param: Tensor) -> Optimizer | None:
    """The living optimizer built last over this parameter by `tg.Adam` or `tg.SGD`."""
    refs = _OWNERS.get(id(param), [])
    while refs:
        known = refs[-1]()
        if known is not None:
            return known
        refs.pop()
    _OWNERS.pop(id(param), None)
    return None


def owners(params: Iterable[Tensor]) -> list[Optimizer]:
    """The owners of these parameters, each once, in order of first appearance."""
    found = {id(o): o for p in params if (o := owner(p)) is not None}
    return list(found.values())


def owned(optimizer: Optimizer) -> Owned | None:
    """What is known of an optimizer; None for one that Tessera did not build."""
    return _OWNED.get(optimizer)
