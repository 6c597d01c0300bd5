"""What deltas say about one module: the terms that are added to what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from tessera.arch.base import named
from tessera.arch.delta import Delta, split
from tessera.errors import DeltaError, InputError, UnknownNameError

__all__ = [
    "Terms",
    "Weighted",
    "add_term",
    "family",
    "gain",
    "gather_terms",
    "owner",
]

Weighted = tuple[Delta, float]


@final
class Terms:
    """The change of one module, as a sum over deltas; the tensors are the deltas' own, live.

    Attributes:
        lowrank: (A, B, scale times weight).
        gain_in: (gain, weight): the input times ``1 + sum weight (gain - 1)``.
        gain_out: The same of the output.
        changes: Parameter's own name -> (values, mask or None, weight).
        whole: Parameter's own name -> (replacement, weight).

    Example:
        >>> terms = Terms()
        >>> terms.gain_in.append((torch.tensor([3.0]), 0.5))
        >>> gain(terms.gain_in).tolist()
        [2.0]
    """

    def __init__(self) -> None:
        self.lowrank: list[tuple[Tensor, Tensor, float]] = []
        self.gain_in: list[tuple[Tensor, float]] = []
        self.gain_out: list[tuple[Tensor, float]] = []
        self.changes: dict[str, list[tuple[Tensor, Tensor | None, float]]] = {}
        self.whole: dict[str, list[tuple[Tensor, float]]] = {}

    def effective(self, name: str, value: Tensor) -> Tensor:
        """The parameter `name` with everything that does not need the input folded in, but gains
        and low ranks, which `folded` adds."""
        for replacement, weight in self.whole.get(name, ()):
            # One delta at full weight gives its own bits, whatever the base holds.
            only = weight == 1.0 and len(self.whole[name]) == 1
            value = replacement if only else value + weight * (replacement - value)
        for values, mask, weight in self.changes.get(name, ()):
            if mask is not None:
                values = torch.zeros_like(value).masked_scatter(mask, values.to(value.dtype))
            value = value + (values if weight == 1.0 else weight * values)
        return value

    def folded(self, kind: str, name: str, value: Tensor) -> Tensor:
        """The parameter `name` of a module of family `kind` that alone does what the terms do."""
        value = self.effective(name, value)
        if name == "bias" and self.gain_out:
            return value * gain(self.gain_out)
        if name != ("in_proj_weight" if kind == "attention" else "weight"):
            return value
        # transformers' Conv1D keeps its weight as [in, out]; so does an embedding, entries first.
        turned = kind in ("conv1d", "embedding")
        if self.gain_in:
            g = gain(self.gain_in)
            shape = (-1, 1) if turned else (1, -1) + (1,) * (value.dim() - 2)
            value = value * g.reshape(shape)
        if self.gain_out:
            g = gain(self.gain_out)
            value = value * (g if turned else g.reshape(-1, *(1,) * (value.dim() - 1)))
        for A, B, scale in self.lowrank:
            if turned:
                value = value + scale * (A.mT @ B.mT)
            else:
                change = (B.flatten(1) @ A.flatten(1)).reshape(value.shape)
                value = value + scale * change
        return value


def gain(gains: Sequence[tuple[Tensor, float]]) -> Tensor:
    """``1 + sum weight (gain - 1)``; one gain of weight 1 as it is.

    Example:
        >>> gain([(torch.tensor([2.0]), 1.0), (torch.tensor([3.0]), 1.0)]).tolist()
        [4.0]
    """
    if len(gains) == 1 and gains[0][1] == 1.0:
        return gains[0][0]
    total = torch.ones_like(gains[0][0])
    for g, weight in gains:
        total = total + weight * (g - 1.0)
    return total


def family(module: nn.Module) -> str:
    """How a module is changed: "linear", "conv1d", "conv", "embedding", "attention" or "other".

    Example:
        >>> family(nn.Linear(1, 1)), family(nn.LayerNorm(1))
        ('linear', 'other')
    """
    if isinstance(module, nn.Linear):
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    return "other"


def owner(name: str) -> str:
    """The module that a tensor of a delta belongs to: its site, or that of its parameter.

    Example:
        >>> owner("fc.A"), owner("fc.weight.full")
        ('fc', 'fc')
    """
    site, part = split(name)
    return split(site)[0] if part in ("values", "mask", "full") else site


def gather_terms(model: nn.Module, deltas: Sequence[Weighted]) -> dict[str, Terms]:
    """Module's name -> its terms, checked against the model; prefixes and prompts are not here.

    Raises:
        UnknownNameError: A delta lies over a site the model lacks.
        DeltaError: A tensor's shape or device does not fit the module.
        InputError: A module is of a kind that cannot be changed so.
    """
    modules = named(model)
    found: dict[str, Terms] = {}
    for delta, weight in deltas:
        for name in delta.tensors:
            site, part = owner(name), split(name)[1]
            if part in ("prefix", "prompt"):
                continue
            if site not in modules:
                raise _no_site(site, modules, delta)
            terms = found.get(site)
            if terms is None:
                terms = found[site] = Terms()
            add_term(terms, modules[site], name, delta, weight)
    return found


def add_term(terms: Terms, module: nn.Module, name: str, delta: Delta, weight: float) -> None:
    """Enter what the tensor `name` of `delta` does to `module`.

    Raises:
        DeltaError: Its shape or device does not fit.
        InputError: The module is of a kind that cannot be changed so.
    """
    site, part = split(name)
    tensor = delta.tensors[name]
    if part in ("values", "full"):
        own = split(site)[1]
        _require_parameter(name, own, module, delta.tensors)
        if part == "full":
            terms.whole.setdefault(own, []).append((tensor, weight))
        else:
            mask = delta.tensors.get(f"{site}.mask")
            terms.changes.setdefault(own, []).append((tensor, mask, weight))
    elif part in ("A", "gain_in", "gain_out"):
        _require_fit(name, module, delta.tensors)
        if part == "A":
            B = delta.tensors[f"{name[:-1]}B"]
            terms.lowrank.append((tensor, B, delta.scales[site] * weight))
        else:
            getattr(terms, part).append((tensor, weight))


def _no_site(site: str, modules: Mapping[str, nn.Module], delta: Delta) -> UnknownNameError:
    known = [name for name in modules if name] or ["(the module itself)"]
    ending = site.rpartition(".")[2]
    close = [name for name in known if name.rpartition(".")[2] == ending] or known
    return UnknownNameError(
        f"{delta!r} lies over a module {site!r}, which this model lacks; it has "
        f"{', '.join(close[:6])}"
    )


def _require_parameter(
    name: str, own: str, module: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Raise unless `module` has the parameter that the tensor `name` changes or replaces."""
    value = getattr(module, own, None)
    if not isinstance(value, Tensor):
        raise DeltaError(
            f"the delta's {name!r} is for a parameter {own!r}, which {type(module).__name__} lacks"
        )
    tensor, mask = tensors[name], tensors.get(f"{name.removesuffix('values')}mask")
    if mask is None:
        fits = tensor.shape == value.shape
    else:
        fits = mask.shape == value.shape and tensor.dim() == 1
        fits = fits and (mask.is_meta or int(mask.sum()) == len(tensor))
    if not fits:
        raise DeltaError(
            f"the delta's {name!r} {tuple(tensor.shape)} does not fit the parameter "
            f"{tuple(value.shape)}" + ("" if mask is None else f" and its mask {tuple(mask.shape)}")
        )
    _require_place(name, tensor, value)


def _require_place(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.device != value.device:
        raise DeltaError(
            f"the delta's {name!r} is on {tensor.device}, the model on {value.device}; "
            f"use delta.to({str(value.device)!r})"
        )


def _require_fit(name: str, module: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless the tensor `name` (an A with its B, or a gain) fits `module`."""
    kind, part, tensor = family(module), split(name)[1], tensors[name]
    if kind == "other" or (kind == "attention" and part != "A"):
        raise InputError(
            f"the delta's {name!r} lies over {type(module).__name__}, which is neither Linear, "
            "Conv, Embedding nor (for a low rank) MultiheadAttention; a mask changes any module"
        )
    if kind == "attention" and module.in_proj_weight is None:
        raise InputError(
            f"the delta's {name!r} lies over a MultiheadAttention whose query, key and value "
            "have different widths; it keeps no single in_proj_weight"
        )
    weight: Tensor = module.in_proj_weight if kind == "attention" else module.weight
    out, wide = weight.shape[:2]
    if kind in ("embedding", "conv1d"):
        out, wide = wide, out
    if part == "A":
        B = tensors[f"{name[:-1]}B"]
        rank = len(tensor)
        A_wanted = (rank, wide, *(weight.shape[2:] if kind == "conv" else ()))
        B_wanted = (out, rank, *(1,) * (weight.dim() - 2 if kind == "conv" else 0))
        if tensor.shape != A_wanted or B.shape != B_wanted:
            raise DeltaError(
                f"the delta's {name!r} {tuple(tensor.shape)} and B {tuple(B.shape)} do not fit "
                f"{type(module).__name__} [{out}, {wide}]: they must be {A_wanted} and {B_wanted}"
            )
        if rank > min(out, wide * weight[0, 0].numel() if kind == "conv" else wide):
            raise DeltaError(
                f"the delta's {name!r} has rank {rank}, above the {min(out, wide)} of a layer "
                f"[{out}, {wide}]: choose r <= {min(out, wide)}"
            )
        _require_place(name, B, weight)
    else:
        wanted = wide * getattr(module, "groups", 1) if part == "gain_in" else out
        if tensor.shape != (wanted,) or (part == "gain_in" and getattr(module, "groups", 1) > 1):
            raise DeltaError(
                f"the delta's {name!r} {tuple(tensor.shape)} does not fit {type(module).__name__} "
                f"[{out}, {wide}]: it must be ({wanted},)"
            )
    _require_place(name, tensor, weight)
