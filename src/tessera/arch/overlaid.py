"""A module under deltas: the base's parameters, another forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera import ops as T
from tessera.arch.terms import Terms, family, gain

__all__ = ["bare_copy", "overlaid"]


def bare_copy(module: nn.Module) -> nn.Module:
    """The same module in another object: parameters and buffers shared, nothing else mutable.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> twin = bare_copy(layer)
        >>> twin.weight is layer.weight, twin is layer
        (True, False)
    """
    kind = type(module)
    # While a scope of meta.fastweights is open, modules are of a class that knows the plain one.
    twin: nn.Module = object.__new__(vars(kind).get("scoped_from", kind))
    inside = module.__dict__.copy()
    inside["_parameters"] = inside["_parameters"].copy()
    inside["_modules"] = inside["_modules"].copy()
    buffers = inside["_buffers"]
    # In train mode a forward writes into running statistics; those of the base stay as they are.
    if buffers and inside["training"]:
        buffers = {k: None if b is None else b.clone() for k, b in buffers.items()}
    inside["_buffers"] = buffers.copy()
    # What `module.compile()` left behind would run the base.
    inside["_compiled_call_impl"] = None
    object.__setattr__(twin, "__dict__", inside)  # nn.Module's own would look for parameters
    return twin


def overlaid(twin: nn.Module, terms: Terms) -> nn.Module:
    """Turn a private copy of a module into the module under `terms`.

    Whoever reads a parameter of it (``parent.linear.weight``, as PyTorch's fused paths do) finds
    the effective one: no way round the delta is left.

    Example:
        >>> terms = Terms()
        >>> terms.gain_out.append((torch.tensor([3.0]), 1.0))
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> bool(overlaid(bare_copy(layer), terms).weight == 3 * layer.weight)
        True
    """
    kind = family(twin)
    changed = set(terms.changes) | set(terms.whole)
    if terms.lowrank or terms.gain_in or terms.gain_out:
        changed |= {"in_proj_weight"} if kind == "attention" else {"weight"}
    if terms.gain_out and getattr(twin, "bias", None) is not None:
        changed.add("bias")
    twin.__dict__["terms"], twin.__dict__["plain"] = terms, type(twin)
    twin.__class__ = _under(cast(Any, type(twin)), kind, tuple(sorted(changed)))
    return twin


@cache
def _under(cls: Any, kind: str, changed: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose parameters `changed` are the effective ones, as parametrizations do it:
    only a property of the class comes before what `nn.Module` keeps under that name."""
    inside: dict[str, Any] = {name: property(_effective(kind, name)) for name in changed}
    known: dict[str, tuple[Any, Callable[..., Tensor]]] = {
        "linear": (nn.Linear, _linear),
        "embedding": (nn.Embedding, _embedding),
    }
    plain = known.get(kind)
    if plain and cls.forward is plain[0].forward and "weight" in changed:
        inside["forward"] = plain[1]
    elif kind == "conv1d" and "weight" in changed:
        inside["forward"] = _conv1d
    return type(f"Delta{cls.__name__}", (cls,), inside)


def base_parameter(module: Any, name: str) -> Tensor | None:
    """The base's parameter under an overlaid module; None where it has none of that name."""
    if name in module._parameters:
        own: Tensor | None = module._parameters[name]
        return own
    value: Tensor | None = getattr(module.plain, name).fget(module)  # a parametrization's own
    return value


def _effective(kind: str, name: str) -> Callable[[Any], Tensor | None]:
    def read(module: Any) -> Tensor | None:
        value = base_parameter(module, name)
        return None if value is None else module.terms.folded(kind, name, value)

    return read


def _linear(module: Any, input: Tensor) -> Tensor:
    terms: Terms = module.terms
    weight, bias = base_parameter(module, "weight"), base_parameter(module, "bias")
    assert weight is not None
    weight = terms.effective("weight", weight)
    bias = None if bias is None else terms.effective("bias", bias)
    scaled = input * gain(terms.gain_in) if terms.gain_in else input
    if terms.lowrank and not terms.gain_in and not terms.gain_out:
        A, B, scale = terms.lowrank[0]
        output, rest = T.delta_apply(input, weight, bias, A, B, scale), terms.lowrank[1:]
    else:
        output, rest = F.linear(scaled, weight, bias), terms.lowrank
        if terms.gain_out:
            output = output * gain(terms.gain_out)
    for A, B, scale in rest:
        output = output + scale * ((input @ A.mT) @ B.mT)
    return output


def _conv1d(module: Any, x: Tensor) -> Tensor:
    terms: Terms = module.terms
    weight, bias = base_parameter(module, "weight"), base_parameter(module, "bias")
    assert weight is not None
    assert bias is not None
    scaled = x * gain(terms.gain_in) if terms.gain_in else x
    weight, bias = terms.effective("weight", weight), terms.effective("bias", bias)
    output = torch.addmm(bias, scaled.reshape(-1, scaled.shape[-1]), weight)
    output = output.reshape(*x.shape[:-1], weight.shape[1])
    if terms.gain_out:
        output = output * gain(terms.gain_out)
    for A, B, scale in terms.lowrank:
        output = output + scale * ((x @ A.mT) @ B.mT)
    return output


def _embedding(module: Any, input: Tensor) -> Tensor:
    terms: Terms = module.terms
    weight = base_parameter(module, "weight")
    assert weight is not None
    weight = terms.effective("weight", weight)
    rule = (module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq)
    output = F.embedding(input, weight, *rule, module.sparse)
    if terms.gain_in:
        output = output * F.embedding(input, gain(terms.gain_in)[:, None])
    if terms.gain_out:
        output = output * gain(terms.gain_out)
    for A, B, scale in terms.lowrank:
        # Rows of A^T first, so that the width of the table never meets the rank.
        output = output + scale * (F.embedding(input, A.mT) @ B.mT)
    return output
