"""Which optimizer owns which parameter, and what it carries. Held weakly."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from tessera.graph.transform import Transform

__all__ = ["Owned", "own", "owned", "owner", "owners"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Owned:
    """What Tessera knows of an optimizer beyond PyTorch.

    Attributes:
        plugins: Its transforms, in order.
        batch_sizes: The rows of the newest training step, as its only item; empty if unknown.
    """

    plugins: tuple[Transform, ...]
    batch_sizes: list[int]


# An optimizer holds its parameters, so an id cannot be reused while its entry is here.
_OWNERS: weakref.WeakValueDictionary[int, Optimizer] = weakref.WeakValueDictionary()
_OWNED: weakref.WeakKeyDictionary[Optimizer, Owned] = weakref.WeakKeyDictionary()


def own(optimizer: Optimizer, plugins: tuple[Transform, ...]) -> None:
    """Register `optimizer` as the owner of its parameters; the newest owner counts."""
    _OWNED[optimizer] = Owned(plugins=plugins, batch_sizes=[])
    for group in optimizer.param_groups:
        _OWNERS.update({id(p): optimizer for p in group["params"]})


def owner(param: Tensor) -> Optimizer | None:
    """The living optimizer built last over this parameter by `tg.Adam` or `tg.SGD`."""
    known = _OWNERS.get(id(param))
    if known is None:
        # The newest owner may be gone, or the parameter came with add_param_group.
        for o in reversed(list(_OWNED)):
            if any(p is param for group in o.param_groups for p in group["params"]):
                _OWNERS[id(param)] = known = o
                break
    return known


def owners(params: Iterable[Tensor]) -> list[Optimizer]:
    """The owners of these parameters, each once, in order of first appearance."""
    found = {id(o): o for p in params if (o := owner(p)) is not None}
    return list(found.values())


def owned(optimizer: Optimizer) -> Owned | None:
    """What is known of an optimizer; None for one that Tessera did not build."""
    return _OWNED.get(optimizer)
