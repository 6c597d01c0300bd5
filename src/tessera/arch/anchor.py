"""The anchor: what a model was at one moment, and how much each weight mattered."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tessera import trees
from tessera.errors import AnchorError

__all__ = ["Anchor"]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Anchor:
    """Weights of one model at one moment, with their importance. Immutable data.

    Attributes:
        name: Unique within a run, e.g. "task3". Used in messages and in checkpoints.
        params: Parameter name -> value at that moment, detached.
        stats: What else is known:
            "fisher": name -> diagonal Fisher, the shape of the parameter, >= 0, in units of
            (loss / weight)^2; absent or empty when the anchor was made with ``fisher=None``.
            "estimator": "exact", "sampled", "empirical" or "recycled".
            "samples": how many examples the Fisher is a mean over.
            "approximate": True for a recycled Fisher.
            "path_integral": name -> SI's importance omega, where `opt.path_integral` is in use.
            "buffers": the model's buffers (running statistics), which belong to its function.

    Raises:
        AnchorError: A Fisher or path integral names a parameter `params` lacks, has another
            shape, or holds a negative or non-finite value.

    Example:
        >>> anchor = Anchor("t0", {"w": torch.zeros(2)}, {"fisher": {"w": torch.ones(2)}})
        >>> anchor
        Anchor('t0', 1 tensors, 2 weights, fisher)
    """

    name: str
    params: Mapping[str, Tensor]
    stats: Mapping[str, Any] = field(default_factory=dict)
    _bound: list[_Binding] = field(default_factory=list, init=False, repr=False)
    _merged: list[Any] = field(default_factory=list, init=False, repr=False)  # arch.merge's

    def __post_init__(self) -> None:
        for kind in ("fisher", "path_integral"):
            for name, value in self.stats.get(kind, {}).items():
                self._check(kind, name, value)

    def _check(self, kind: str, name: str, value: Tensor) -> None:
        if name not in self.params:
            raise AnchorError(
                f"anchor {self.name!r}: its {kind} names {name!r}, which is not among its "
                f"parameters ({', '.join(list(self.params)[:4])}, ...)"
            )
        if value.shape != self.params[name].shape:
            raise AnchorError(
                f"anchor {self.name!r}: its {kind} of {name!r} has shape {tuple(value.shape)}, "
                f"the parameter has {tuple(self.params[name].shape)}"
            )
        if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
            raise AnchorError(
                f"anchor {self.name!r}: its {kind} of {name!r} holds negative or non-finite "
                "values; an importance is >= 0"
            )

    def _named_parts(self) -> list[tuple[str, Any]]:
        """How a captured graph names its tensors: `anchor.fisher`, not `anchor.stats.fisher`."""
        bound = [("model", b.frozen) for b in self._bound[:1]]
        return [("params", self.params), *self.stats.items(), *bound, ("", self._merged)]

    @property
    def fisher(self) -> Mapping[str, Tensor]:
        """Parameter name -> diagonal Fisher; empty when there is none."""
        fisher: Mapping[str, Tensor] = self.stats.get("fisher", {})
        return fisher

    @property
    def model(self) -> nn.Module:
        """The model as it was: frozen, in eval mode, sharing the anchor's tensors.

        Raises:
            AnchorError: The anchor was loaded or made by hand; `bind` it to a model first.
        """
        if not self._bound:
            raise AnchorError(
                f"anchor {self.name!r} is data without a model's code (it was loaded, or made by "
                "hand). Give it the code with: anchor.bind(model)"
            )
        return self._bound[0].frozen

    def bind(self, model: nn.Module) -> nn.Module:
        """Attach `model`'s code, so that `model` and `opt.consolidate` work; needed after loading.

        Args:
            model: A module with the anchor's parameter names and shapes. It is not changed.

        Returns:
            The frozen forward, as `anchor.model` gives it from now on.

        Raises:
            AnchorError: Names or shapes differ, or the module cannot be copied.

        Example:
            >>> net = nn.Linear(1, 1, bias=False)
            >>> anchor = Anchor("t0", {"weight": torch.full((1, 1), 2.0)})
            >>> anchor.bind(net)(torch.ones(1, 1)).item()
            2.0
        """
        current = trees.parameters(model)
        require_fit(self, current)
        missing = sorted(set(current) - set(self.params))
        if missing:
            raise AnchorError(
                f"anchor {self.name!r} cannot stand in for this model: it lacks the parameters "
                f"{missing[:3]} ({len(missing)} in all)"
            )
        return self._attach(shadow(model, self.params, self.stats.get("buffers", {})), model)

    def _attach(self, frozen: nn.Module, model: nn.Module) -> nn.Module:
        """Remember `frozen` and where the live parameters are."""
        frozen.requires_grad_(False)
        live = {name: weakref.ref(p) for name, p in trees.parameters(model).items()}
        self._bound[:] = [_Binding(frozen, live)]
        return frozen

    def live(self) -> dict[str, nn.Parameter]:
        """The parameters, by name, of the model this anchor was taken from or bound to.

        Empty when there is none, or it is gone.
        """
        if not self._bound:
            return {}
        found = {name: ref() for name, ref in self._bound[0].live.items()}
        return {name: p for name, p in found.items() if p is not None}

    def __repr__(self) -> str:
        weights = sum(t.numel() for t in self.params.values())
        known = "".join(f", {k}" for k in ("fisher", "path_integral") if self.stats.get(k))
        return f"Anchor({self.name!r}, {len(self.params)} tensors, {weights} weights{known})"


@dataclass(frozen=True, slots=True, eq=False)
class _Binding:
    """The process-local side of an anchor: code, and where the live weights are."""

    frozen: nn.Module
    live: Mapping[str, weakref.ref[nn.Parameter]]


def require_fit(anchor: Anchor, current: Mapping[str, Tensor]) -> None:
    """Raise AnchorError unless every parameter of `anchor` is in `current` with its shape."""
    for name, then in anchor.params.items():
        now = current.get(name)
        if now is None:
            raise AnchorError(
                f"anchor {anchor.name!r} is of another model: it holds {name!r}, which this one "
                f"lacks (it has {', '.join(list(current)[:4])}, ...)"
            )
        if now.shape != then.shape:
            raise AnchorError(
                f"anchor {anchor.name!r} is of another model: {name!r} has shape "
                f"{tuple(then.shape)} in the anchor and {tuple(now.shape)} in the model"
            )


def shadow(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of the module's structure, in eval mode, around other tensors.

    It shares nothing that can change with `model`: no other thread can see it, so whatever is
    done to it leaves the original's mode, buffers and gradients alone.

    Raises:
        AnchorError: `copy.deepcopy` refuses the module.
    """
    memo: dict[int, Any] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) not in memo:
            memo[id(p)] = nn.Parameter(params[name].to(p.device), requires_grad=p.requires_grad)
    for name, b in model.named_buffers(remove_duplicate=False):
        if id(b) not in memo:
            memo[id(b)] = buffers[name].to(b.device) if name in buffers else b.detach().clone()
    for module in model.modules():
        for t in vars(module).values():
            if isinstance(t, Tensor) and t.grad_fn is not None:
                # What a forward left behind (pruning, a cache): deepcopy takes leaves only.
                memo[id(t)] = t.detach().clone()
        for p in module.parameters(recurse=False):
            if p.grad is not None:
                # A gradient is no part of the function; None spares deepcopy the copy.
                memo[id(p.grad)] = None
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise AnchorError(
            f"an anchor needs a private copy of {type(model).__name__}, and copy.deepcopy "
            f"refused it: {error}. Define __deepcopy__ on the module that holds the culprit"
        ) from error
