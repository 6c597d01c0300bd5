"""What every kind of delta is made with: the whole it belongs to, and its head."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tessera.arch import Delta, base_hash
from tessera.arch.base import placement, root_of
from tessera.arch.delta import split
from tessera.arch.peft_names import layer_types
from tessera.arch.sites import matching
from tessera.errors import InputError, UnknownNameError

__all__ = ["Head", "made", "whole_of", "without_head"]

Head = str | Sequence[str] | None


def whole_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The whole that `model` was declared a part of, and the start of its modules' names there.

    Example:
        >>> whole_of(nn.Linear(1, 1))[1]
        ''
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"a delta is made for a torch.nn.Module, got {type(model).__name__}")
    whole = root_of(model)
    name = placement(model, whole)
    return (whole, f"{name}." if name else "") if name is not None else (model, "")


def made(
    model: nn.Module,
    kind: str,
    tensors: Mapping[str, Tensor],
    *,
    scales: Mapping[str, float] | None = None,
    info: Mapping[str, Any] | None = None,
    head: Head = None,
) -> Delta:
    """A trainable delta of `model`: names as the whole has them, its hash, the head's tensors."""
    whole, start = whole_of(model)
    named = {(n if n in ("prefix", "prompt") else start + n): t for n, t in tensors.items()}
    named.update(_head(whole, head))
    facts = dict(info or {})
    if "sites" in facts:
        facts["sites"] = [(start + site).rstrip(".") for site in facts["sites"]]
    # PEFT names what lies over an embedding or a convolution in another way; tensors do not tell.
    over = {split(n)[0] for n in named if split(n)[1] in ("A", "gain_in", "gain_out")}
    types = layer_types(whole, over)
    if types:
        facts["layer_types"] = types
    return Delta(
        kind=kind,
        tensors={n: t.requires_grad_(t.is_floating_point()) for n, t in named.items()},
        scales={(start + site).rstrip("."): scale for site, scale in (scales or {}).items()},
        base_hash=base_hash(whole),
        info=facts,
        _home=[weakref.ref(whole)],
    )


def without_head(model: nn.Module, names: Sequence[str], head: Head) -> list[str]:
    """Of sites that were chosen for the user, those not in a module that is trained whole anyway.

    Example:
        >>> without_head(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), ["0", "1"], "1")
        ['0']
    """
    whole, start = whole_of(model)
    modules = dict(whole.named_modules())
    patterns = [head] if isinstance(head, str) else head or ()
    heads = [name for pattern in patterns for name in matching(modules, pattern)]
    return [
        name
        for name in names
        if not any(f"{start}{name}" == h or f"{start}{name}".startswith(f"{h}.") for h in heads)
    ]


def _head(whole: nn.Module, head: Head) -> dict[str, Tensor]:
    """Whole copies of the parameters of the modules named `head`."""
    modules = dict(whole.named_modules())
    found = {}
    for pattern in [head] if isinstance(head, str) else head or ():
        names = matching(modules, pattern)
        own = [(n, p) for n in names for p in modules[n].named_parameters(recurse=True)]
        if not own:
            raise UnknownNameError(
                f"head {pattern!r} names no module with parameters; the model has "
                f"{', '.join([n for n in modules if n][-6:])}"
            )
        for name, (inner, p) in own:
            found[f"{name}.{inner}.full" if name else f"{inner}.full"] = p.detach().clone()
    return found
