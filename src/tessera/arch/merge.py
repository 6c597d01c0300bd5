"""Several anchors as one quadratic, so that a penalty's cost does not grow with the tasks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.arch.anchor import Anchor, require_fit
from tessera.errors import AnchorError, InputError

__all__ = ["Quadratic", "as_anchors", "merged", "require_strength"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quadratic:
    """``1/2 sum w (theta - c)^2 + constant``, equal to the sum of the separate penalties.

    Attributes:
        centres: Parameter name -> c.
        weights: Parameter name -> w, the strength included.
        constant: What remains at the centre: the anchors' disagreement.
    """

    centres: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    constant: float

    def fits(self, current: Mapping[str, Tensor]) -> bool:
        """Whether `current` has all these parameters, in these shapes."""
        return all(n in current and current[n].shape == c.shape for n, c in self.centres.items())

    def at(self, current: Mapping[str, Tensor]) -> Quadratic:
        """The same on the devices of `current`."""
        if all(c.device == current[name].device for name, c in self.centres.items()):
            return self
        return Quadratic(
            centres={n: c.to(current[n].device) for n, c in self.centres.items()},
            weights={n: w.to(current[n].device) for n, w in self.weights.items()},
            constant=self.constant,
        )


def as_anchors(anchors: Anchor | Sequence[Anchor], who: str) -> tuple[Anchor, ...]:
    """One anchor or several as a tuple, checked."""
    several = tuple(anchors) if isinstance(anchors, Iterable) else (anchors,)
    for a in several:
        if not isinstance(a, Anchor):
            raise AnchorError(
                f"{who} needs anchors made by arch.anchor_from, got {type(a).__name__}"
            )
    return several


def require_strength(who: str, name: str, value: float) -> float:
    """`value` if it is a finite number >= 0, else InputError."""
    if not 0 <= value < float("inf"):
        raise InputError(f"{who} needs a finite {name} >= 0, got {value}")
    return float(value)


# Newest anchor -> (all anchors, strength, quadratic); weak, so that dropping
# the anchors drops the sums.
_Entry = tuple[tuple["weakref.ref[Anchor]", ...], float, Quadratic]
_CACHE: weakref.WeakKeyDictionary[Anchor, _Entry] = weakref.WeakKeyDictionary()


def merged(
    anchors: tuple[Anchor, ...], current: Mapping[str, Tensor], *, lam: float, who: str
) -> Quadratic:
    """EWC's penalty around all `anchors`, ready for the parameters `current`.

    With ``w_k = lam F_k``: ``w = sum w_k``, ``c = sum w_k theta_k / w``, and the constant
    ``1/2 sum w_k (theta_k - c)^2``, accumulated one anchor at a time as a running mean is.

    Raises:
        AnchorError: An anchor has no Fisher, or is of another model.
    """
    if not anchors:
        return Quadratic(centres={}, weights={}, constant=0.0)
    refs, strength, quadratic = _CACHE.get(anchors[-1], ((), 0.0, None))
    hit = (
        quadratic is not None
        and strength == lam
        and len(refs) == len(anchors)
        and all(r() is a for r, a in zip(refs, anchors, strict=True))
    )
    if quadratic is None or not hit:
        quadratic = _merge(anchors, lam, who)
    if not quadratic.fits(current):
        for a in anchors:
            require_fit(a, current)
    placed = quadratic.at(current)
    if placed is not quadratic or not hit:
        _CACHE[anchors[-1]] = (tuple(weakref.ref(a) for a in anchors), lam, placed)
    return placed


def _merge(anchors: tuple[Anchor, ...], lam: float, who: str) -> Quadratic:
    centres: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    constant = 0.0
    for a in anchors:
        if not a.fisher:
            raise AnchorError(
                f"{who} needs a Fisher, but anchor {a.name!r} has none. Make it with "
                f'arch.anchor_from(model, {a.name!r}, fisher="diagonal", data=...), or use '
                "loss.l2sp, which weighs all weights alike"
            )
        for name, f in a.fisher.items():
            theta, w = a.params[name], lam * f
            if name not in centres:
                centres[name], weights[name] = theta, w
                continue
            total = weights[name] + w
            share = torch.where(total > 0, w / total, torch.ones_like(total))
            gap = theta - centres[name]
            between = weights[name] * share * gap.square()
            constant += 0.5 * between.sum(dtype=torch.float64).item()
            centres[name], weights[name] = centres[name] + share * gap, total
    return Quadratic(centres=centres, weights=weights, constant=constant)
