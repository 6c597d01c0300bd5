"""Dictionaries of named tensors: the parameters of a model, a Fisher, the gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_IN_NUMPY = (torch.float32, torch.float64, torch.int64, torch.bool)

__all__ = ["beside", "clone", "parameters", "sha256"]


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by name; one that is shared appears once, under its first name.

    Example:
        >>> list(parameters(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    return dict(model.named_parameters())


def beside(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` on the device of `other`; itself where it is there already.

    Example:
        >>> a = torch.zeros(1)
        >>> beside(a, torch.ones(1)) is a  # so a captured step shows no copy
        True
    """
    return tensor if tensor.device == other.device else tensor.to(other.device)


def clone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies that share no memory with the originals.

    Example:
        >>> a = {"w": torch.zeros(1)}
        >>> b = clone(a)
        >>> _ = b["w"].add_(1)
        >>> a["w"].item()
        0.0
    """
    return {name: t.detach().clone() for name, t in tensors.items()}


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest over names, dtypes, shapes and exact bytes, in sorted order of the names.

    Example:
        >>> sha256({"w": torch.zeros(2)}) == sha256({"w": torch.zeros(1, 2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        # bfloat16 has no NumPy type; a tensor's bytes are the same under any.
        plain = t if t.dtype in _IN_NUMPY else t.reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()
