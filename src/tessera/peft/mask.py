"""A mask: some layers, or some weights of them, trained as a difference from the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tessera.arch import Delta
from tessera.arch.sites import matching
from tessera.errors import InputError, UnknownNameError
from tessera.peft.making import Head, made

__all__ = ["mask"]


def mask(
    model: nn.Module,
    layer_mask: str | Sequence[str] | Mapping[str, Tensor | bool],
    *,
    head: Head = None,
) -> Delta:
    """A fresh masked delta: ``theta + m * values`` with values = 0.

    Args:
        model: The base, or a part of it (see `arch.root`).
        layer_mask: Which parameters change: names, globs or ends of names of parameters or
            modules (``"layers.3"``, ``"*.bias"``, ``"norm"``). Or a mapping from such a name to
            True, or to a bool tensor of the parameter's shape: only where it is True.
        head: Modules that are trained whole along with it.

    Raises:
        UnknownNameError: A name means no parameter.
        InputError: A mask has another shape or dtype, or selects nothing.

    Source:
        With biases alone, Ben Zaken et al. 2022 (arXiv:2106.10199); with one mask a task, Mallya &
        Lazebnik 2018 (arXiv:1711.05769).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        >>> mask(model, ["*.bias"]).sites
        ('0.bias', '1.bias')
        >>> some = torch.tensor([True, False, True])
        >>> mask(model, {"1.weight": some}).tensors["1.weight.values"]
        tensor([0., 0.], requires_grad=True)
    """
    parameters = dict(model.named_parameters())
    if isinstance(layer_mask, str):
        layer_mask = [layer_mask]
    chosen = layer_mask if isinstance(layer_mask, Mapping) else dict.fromkeys(layer_mask, True)
    tensors: dict[str, Tensor] = {}
    for pattern, where in chosen.items():
        names = matching(parameters, pattern) or matching(parameters, f"{pattern}.*")
        names = names or matching(parameters, f"*.{pattern}.*")
        if not names:
            raise UnknownNameError(
                f"peft.mask: {pattern!r} names no parameter; the model has "
                f"{', '.join(list(parameters)[:6])}"
            )
        for name in names if where is not False else ():
            tensors.update(_values(name, parameters[name], where))
    if not tensors:
        raise InputError("peft.mask: the layer mask selects nothing")
    return made(model, "mask", tensors, head=head)


def _values(name: str, value: Tensor, where: Tensor | bool) -> dict[str, Tensor]:
    if not value.is_floating_point():
        raise InputError(f"peft.mask: {name!r} is {value.dtype}, and cannot be trained")
    if not isinstance(where, Tensor):
        return {f"{name}.values": torch.zeros_like(value.detach())}
    if where.dtype != torch.bool or where.shape != value.shape or not bool(where.any()):
        raise InputError(
            f"peft.mask: the mask of {name!r} must be bool {tuple(value.shape)} with something "
            f"True, got {where.dtype} {tuple(where.shape)}"
        )
    where = where.to(value.device)
    return {
        f"{name}.values": value.new_zeros(int(where.sum())),
        f"{name}.mask": where.clone(),
    }
