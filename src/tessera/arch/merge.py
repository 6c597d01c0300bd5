"""Several anchors as one quadratic, so that a penalty's cost does not grow with the tasks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tessera.arch.anchor import Anchor, require_fit
from tessera.errors import AnchorError, InputError

__all__ = ["Quadratic", "as_anchors", "merged", "require_strength"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quadratic:
    """``lam (1/2 sum F (theta - c)^2 + constant)``, equal to the sum of the separate penalties.

    Attributes:
        centres: Parameter name -> c.
        fisher: Parameter name -> F, in the order of `centres`.
        constant: What remains at the centre: the anchors' disagreement.
    """

    centres: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    constant: float
    _scaled: list[tuple[float, list[Tensor]]] = field(default_factory=list, init=False)

    def weights(self, lam: float) -> list[Tensor]:
        """``lam F``, in the order of `centres`; kept for as long as `lam` stays."""
        if not self._scaled or self._scaled[0][0] != lam:
            self._scaled[:] = [(lam, [lam * f for f in self.fisher.values()])]
        return self._scaled[0][1]

    def fits(self, current: Mapping[str, Tensor]) -> bool:
        """Whether `current` has all these parameters, in these shapes."""
        return all(n in current and current[n].shape == c.shape for n, c in self.centres.items())

    def at(self, current: Mapping[str, Tensor]) -> Quadratic:
        """The same on the devices of `current`."""
        if all(c.device == current[name].device for name, c in self.centres.items()):
            return self
        return Quadratic(
            centres={n: c.to(current[n].device) for n, c in self.centres.items()},
            fisher={n: f.to(current[n].device) for n, f in self.fisher.items()},
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


def merged(anchors: tuple[Anchor, ...], current: Mapping[str, Tensor], *, who: str) -> Quadratic:
    """EWC's penalty around all `anchors`, ready for the parameters `current`.

    ``F = sum F_k``, ``c = sum F_k theta_k / F``, and the constant ``1/2 sum F_k (theta_k - c)^2``,
    accumulated one anchor at a time as a running mean is. The sums are kept in the newest anchor,
    so dropping it drops them.

    Raises:
        AnchorError: An anchor has no Fisher, or is of another model.
    """
    if not anchors:
        return Quadratic(centres={}, fisher={}, constant=0.0)
    kept = anchors[-1]._merged
    known = kept[0] if kept and kept[0].holds(anchors) else None
    quadratic = known.quadratic if known is not None else _merge(anchors, who)
    if not quadratic.fits(current):
        for a in anchors:
            require_fit(a, current)
    placed = quadratic.at(current)
    if known is None or placed is not quadratic:
        kept[:] = [Merged(anchors=tuple(map(weakref.ref, anchors)), quadratic=placed)]
    return placed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    """A quadratic and the anchors it is the sum of, held weakly."""

    anchors: tuple[weakref.ref[Anchor], ...]
    quadratic: Quadratic

    def holds(self, anchors: tuple[Anchor, ...]) -> bool:
        """Whether it is the sum of exactly these, in this order."""
        return len(self.anchors) == len(anchors) and all(
            r() is a for r, a in zip(self.anchors, anchors, strict=True)
        )


def _merge(anchors: tuple[Anchor, ...], who: str) -> Quadratic:
    centres: dict[str, Tensor] = {}
    fisher: dict[str, Tensor] = {}
    constant = 0.0
    for a in anchors:
        if not a.fisher:
            raise AnchorError(
                f"{who} needs a Fisher, but anchor {a.name!r} has none. Make it with "
                f'arch.anchor_from(model, {a.name!r}, fisher="diagonal", data=...), or use '
                "loss.l2sp, which weighs all weights alike"
            )
        for name, f in a.fisher.items():
            theta = a.params[name]
            if name not in centres:
                centres[name], fisher[name] = theta, f
                continue
            total = fisher[name] + f
            share = torch.where(total > 0, f / total, torch.ones_like(total))
            gap = theta - centres[name]
            between = fisher[name] * share * gap.square()
            constant += 0.5 * between.sum(dtype=torch.float64).item()
            centres[name], fisher[name] = centres[name] + share * gap, total
    return Quadratic(centres=centres, fisher=fisher, constant=constant)
