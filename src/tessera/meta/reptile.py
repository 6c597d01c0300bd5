"""Reptile: the way an inner loop went, as a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.errors import InputError
from tessera.meta.adapted import Adapted

__all__ = ["reptile_step"]


def reptile_step(model: nn.Module, adapted: Adapted | Sequence[Adapted]) -> Tensor:
    """Add ``theta - mean_tasks theta_K`` to the model's ``.grad``, for any optimizer to step on.

    With ``torch.optim.SGD(lr=eps)`` that is Reptile's ``theta += eps (theta_K - theta)``. No graph
    is needed: adapt under `tg.no_grad()`.

    Args:
        model: What was adapted.
        adapted: From `maml_step`, several of them, or from `maml_tasks`, whose tasks are averaged.

    Returns:
        0-d tensor: the length of what was added.

    Raises:
        InputError: There is none, or they are of another model.

    Source:
        Nichol, Achiam & Schulman 2018, algorithm 1 (arXiv:1803.02999).

    Example:
        >>> from tessera import graph as tg
        >>> from tessera.data import Batch
        >>> from tessera.meta.maml import maml_step
        >>> model = nn.Linear(1, 1, bias=False)
        >>> with tg.no_grad():
        ...     adapted, _ = maml_step(model, Batch(torch.ones(1, 1), torch.zeros(1, 1)),
        ...                            inner_opt=tg.SGD(0.1), K=3, loss_fn=nn.functional.mse_loss)
        >>> _ = reptile_step(model, adapted)
        >>> bool(model.weight.grad == model.weight.detach() - adapted.params["weight"])
        True
    """
    every = [adapted] if isinstance(adapted, Adapted) else list(adapted)
    if not every:
        raise InputError("reptile_step needs at least one adapted model, got none")
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ways: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, p in own.items():
            ends = [_rows(a, name, p) for a in every]
            ways[name] = p - torch.cat(ends).mean(0)
        for name, p in own.items():
            p.grad = ways[name] if p.grad is None else p.grad + ways[name]
        return torch.stack([w.square().sum() for w in ways.values()]).sum().sqrt()


def _rows(adapted: Adapted, name: str, p: Tensor) -> Tensor:
    end = adapted.params.get(name)
    if end is None or end.shape[end.dim() - p.dim() :] != p.shape:
        raise InputError(
            f"reptile_step got a model adapted from another one: it has no {name!r} of shape "
            f"{tuple(p.shape)}; a delta that was adapted is no parameter of the model"
        )
    return end if end.dim() > p.dim() else end[None]
