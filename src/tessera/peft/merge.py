"""A model of its own with deltas folded into its weights: for export, or for a single tenant."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tessera.arch import Delta
from tessera.arch.overlay import placed
from tessera.arch.terms import Terms, family, gather_terms
from tessera.errors import DeltaError, InputError

__all__ = ["merge"]


def merge(
    model: nn.Module,
    delta: Delta | Sequence[Delta],
    *,
    weights: Sequence[float] | None = None,
) -> nn.Module:
    """A copy of the model that computes by itself what it does under the deltas.

    ``W' = (W + m * values) * l_in * l_out + sum scale B A`` and ``b' = b * l_out``, as
    `peft.apply` has it, to rounding. The copy shares nothing with the base, and needs neither
    Tessera nor the deltas.

    A weight that two modules of the base share, and that changes in one of them only, is the
    copy's twice. Where transformers would tie them again (``save_pretrained``), set
    ``config.tie_word_embeddings = False`` first.

    Args:
        model: The base. It is not changed.
        delta: One, or several, whose changes add up. A prefix or prompt is no change of weights.
        weights: One for each of several deltas; None: all 1.

    Returns:
        A module of the base's own type and mode.

    Raises:
        DeltaError: A delta is of another base, does not fit, or is a prefix or prompt.
        UnknownNameError: A delta lies over a module the model lacks.
        InputError: The number of weights is not that of the deltas, or one is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> change = {"0.A": torch.ones(1, 2), "0.B": torch.ones(1, 1)}
        >>> merged = merge(model, Delta(kind="lora", tensors=change, scales={"0": 3.0}))
        >>> bool(((merged[0].weight - model[0].weight) - 3).abs().max() < 1e-6)
        True
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"peft.merge needs a torch.nn.Module, got {type(model).__name__}")
    deltas = [delta] if isinstance(delta, Delta) else list(delta)
    if not deltas or not all(isinstance(d, Delta) for d in deltas):
        raise InputError("peft.merge needs at least one arch.Delta")
    shares = [1.0] * len(deltas) if weights is None else [float(w) for w in weights]
    if len(shares) != len(deltas):
        raise InputError(f"peft.merge got {len(deltas)} deltas and {len(shares)} weights")
    if not all(abs(w) < float("inf") for w in shares):
        raise InputError(f"peft.merge needs finite weights, got {shares}")
    for d in deltas:
        if d.kind in ("prefix", "prompt"):
            raise DeltaError(
                f"peft.merge: {d!r} is virtual tokens before the sequence, which no change of "
                "weights amounts to. Keep it beside the model: peft.apply(model, delta)"
            )
    here = [(placed(d, model), w) for d, w in zip(deltas, shares, strict=True)]
    terms = gather_terms(model, here)
    merged = _copied(model)
    with torch.no_grad():
        for name, found in terms.items():
            _fold(merged.get_submodule(name), model.get_submodule(name), found)
    return merged


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy without gradients: they are no part of the function, and may be large."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module.__dict__["_parameters"].values(), *vars(module).values()):
            if isinstance(value, nn.Parameter):
                if id(value) not in memo:
                    own = value.detach().clone(memory_format=torch.preserve_format)
                    memo[id(value)] = nn.Parameter(own, requires_grad=value.requires_grad)
            elif isinstance(value, Tensor) and value.grad_fn is not None:
                # What a forward left behind (a cache): deepcopy takes leaves only.
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise DeltaError(
            f"peft.merge needs a copy of {type(model).__name__}, and copy.deepcopy refused it: "
            f"{error}. Define __deepcopy__ on the module that holds the culprit"
        ) from error


def _fold(module: nn.Module, base: nn.Module, terms: Terms) -> None:
    """Give `module`, the copy of `base`, weights that alone do what the terms do."""
    kind = family(base)
    names = set(terms.changes) | set(terms.whole)
    if terms.lowrank or terms.gain_in or terms.gain_out:
        names.add("in_proj_weight" if kind == "attention" else "weight")
    if terms.gain_out and getattr(base, "bias", None) is not None:
        names.add("bias")
    for name in sorted(names):
        value = getattr(base, name, None)  # of a parametrized weight, what it amounts to
        if not isinstance(value, Tensor):
            raise DeltaError(f"a delta changes {name!r}, which {type(base).__name__} lacks")
        folded = terms.folded(kind, name, value).to(value.dtype)
        if parametrize.is_parametrized(module, name):
            inside: Any = module.parametrizations
            trains = any(p.requires_grad for p in inside[name].parameters())
            _own_class(module)
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        else:
            trains = value.requires_grad
        # A parameter of its own: in a module that shares the old one, that stays as it is.
        setattr(module, name, nn.Parameter(folded.detach().clone(), requires_grad=trains))


def _own_class(module: nn.Module) -> None:
    """A parametrization is a property of a class that a deep copy shares with its original."""
    cls = type(module)
    inside = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, inside)
