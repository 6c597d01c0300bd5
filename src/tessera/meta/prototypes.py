"""A head that begins as a classifier by the nearest prototype."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.errors import InputError

__all__ = ["prototypes"]


def prototypes(
    features: Tensor, labels: Tensor, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weight ``2 mu_c`` and bias ``-|mu_c|^2`` of a linear head, mu_c the mean feature of class c.

    ``features @ weight.T + bias`` is then ``|f|^2 - |f - mu_c|^2``: the nearest prototype has the
    largest logit. An inner loop that starts there is ProtoMAML's.

    Args:
        features: [n, d], or [tasks, n, d]; gradients flow through them.
        labels: int64 [n], or [tasks, n], in 0 .. C-1; each class has an example.
        num_classes: C; by default the largest label and one.

    Returns:
        weight [C, d] and bias [C], with a leading dimension of tasks if there is.

    Raises:
        InputError: The shapes do not fit, or a class has no example.

    Source:
        Triantafillou et al. 2020, Meta-Dataset, section 2 (arXiv:1903.03096); Snell et al. 2017,
        eq. 8 (arXiv:1703.05175).

    Example:
        >>> weight, bias = prototypes(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 1]))
        >>> weight.tolist(), bias.tolist()
        ([[2.0], [6.0]], [-1.0, -9.0])
    """
    if features.dim() not in (2, 3) or labels.shape != features.shape[:-1] or not labels.numel():
        raise InputError(
            "prototypes needs features [n, d] and labels [n], or [tasks, n, d] and [tasks, n], at "
            f"least one row, got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise InputError(f"prototypes needs int64 labels, got {labels.dtype}; use labels.long()")
    count = int(labels.max()) + 1 if num_classes is None else num_classes
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        raise InputError(
            f"prototypes of {count} classes got labels {int(labels.min())} .. {int(labels.max())}"
        )
    members = torch.nn.functional.one_hot(labels, count).to(features.dtype).mT  # [..., C, n]
    sizes = members.sum(-1)
    if not bool(sizes.all()):
        *task, missing = (sizes == 0).nonzero()[0].tolist()
        where = f" in task {task[0]}" if task else ""
        raise InputError(f"class {missing} of {count} has no example{where}, so no prototype")
    mean = (members @ features) / sizes.unsqueeze(-1)
    return 2 * mean, -mean.square().sum(-1)
