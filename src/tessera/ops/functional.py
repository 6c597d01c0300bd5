"""Thin, checked tensor functions under the names the field uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.errors import InputError
from tessera.ops.firstclass import DELTA_APPLY, KL_DIVERGENCE, PARAMETER

__all__ = [
    "concat",
    "cross_entropy",
    "delta_apply",
    "kl_divergence",
    "log_softmax",
    "parameter",
    "softmax",
]


def concat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The tensors one after the other along `dim`.

    Args:
        tensors: Equal shapes but for `dim`; an empty 1-d tensor joins anything.
        dim: Default 0, the batch.

    Returns:
        Tensor whose size along `dim` is the sum of theirs.

    Raises:
        InputError: The shapes do not fit; they are listed.

    Example:
        >>> concat([torch.zeros(2, 3), torch.ones(1, 3)]).shape
        torch.Size([3, 3])
    """
    try:
        return torch.cat(list(tensors), dim)
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise InputError(
            f"concat along dim {dim} needs tensors equal in every other dim, got {shapes}"
        ) from error


def softmax(logits: Tensor, dim: int = -1) -> Tensor:
    """``exp(logits) / sum exp(logits)`` along `dim` (the last by default).

    Example:
        >>> softmax(torch.zeros(1, 4)).tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    return torch.softmax(logits, dim)


def log_softmax(logits: Tensor, dim: int = -1) -> Tensor:
    """``logits - log sum exp(logits)`` along `dim` (the last by default).

    Example:
        >>> log_softmax(torch.zeros(1, 1)).tolist()
        [[0.0]]
    """
    return torch.log_softmax(logits, dim)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``-log softmax(logits)[label]`` over the batch.

    Args:
        logits: [n, C] or [n, C, d1, ...].
        labels: int64 [n] (or [n, d1, ...]) in 0 .. C-1; -100 is ignored.

    Returns:
        0-d tensor.

    Raises:
        InputError: The shapes or the dtype do not fit, or a label is out of range.

    Example:
        >>> round(cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4)
        1.3863
    """
    if logits.dim() < 2 or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise InputError(
            "cross_entropy needs logits [n, C, ...] and labels [n, ...], got logits "
            f"{tuple(logits.shape)} and labels {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise InputError(
            f"cross_entropy needs int64 class indices, got {labels.dtype}; use labels.long()"
        )
    try:
        return F.cross_entropy(logits, labels)
    except IndexError as error:
        raise InputError(
            f"cross_entropy got a label outside 0 .. {logits.shape[1] - 1}: labels span "
            f"{int(labels.min())} .. {int(labels.max())}, logits have {logits.shape[1]} classes"
        ) from error


def kl_divergence(log_p: Tensor, q: Tensor) -> Tensor:
    """``1/n sum q (log q - log_p)``: KL(q || p), summed over classes, mean over the batch.

    Args:
        log_p: Log-probabilities of the model in training, [n, ..., C].
        q: Probabilities of the target, same shape; no gradient flows into them.

    Returns:
        0-d tensor, >= 0 up to rounding; 0 where p = q.

    Raises:
        InputError: The shapes differ.

    Example:
        >>> p = softmax(torch.tensor([[1.0, 2.0]]))
        >>> round(kl_divergence(p.log(), p).item(), 6)
        0.0
    """
    if log_p.shape != q.shape or log_p.dim() < 1:
        raise InputError(
            f"kl_divergence needs log_p and q of one shape, got {tuple(log_p.shape)} and "
            f"{tuple(q.shape)}"
        )
    divergence: Tensor = KL_DIVERGENCE(log_p, q)
    return divergence


def delta_apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """``x W^T + b + scale (x A^T) B^T``: a linear layer under a low-rank delta.

    Args:
        x: [n, ..., in].
        weight: [out, in], the base's.
        bias: [out] or None, the base's.
        A: [r, in], or [n, r, in] for a delta of its own for every row.
        B: [out, r], or [n, out, r].
        scale: alpha / r.

    Returns:
        [n, ..., out]. Gradients reach all five.

    Raises:
        InputError: The shapes do not fit.

    Source:
        Hu et al. 2022, eq. 3 (arXiv:2106.09685).

    Example:
        >>> x, W, A, B = torch.ones(1, 2), torch.eye(2), torch.ones(1, 2), torch.ones(2, 1)
        >>> delta_apply(x, W, None, A, B, 0.5).tolist()
        [[2.0, 2.0]]
    """
    (out, wide), rows = weight.shape, A.shape[:-2]
    rank = A.shape[-2] if A.dim() > 1 else 0
    if (
        A.shape != (*rows, rank, wide)
        or B.shape != (*rows, out, rank)
        or rows
        not in (
            (),
            x.shape[:1],
        )
    ):
        raise InputError(
            f"delta_apply needs, for weight [{out}, {wide}], A [r, {wide}] and B [{out}, r], or "
            f"one of each for every row of x; got x {tuple(x.shape)}, A {tuple(A.shape)}, "
            f"B {tuple(B.shape)}"
        )
    changed: Tensor = DELTA_APPLY(x, weight, bias, A, B, float(scale))
    return changed


def parameter(value: Tensor, name: str, *, anchor: str = "") -> Tensor:
    """The same tensor, marked in a captured step as the parameter `name`, kept by `anchor`.

    Args:
        value: Any tensor. The result is a view of it: no copy, and gradients pass through.
        name: As in ``model.named_parameters()``.
        anchor: Name of the anchor that holds what the parameter was; "" for none.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> parameter(w, "head.weight", anchor="task1").sum().backward()
        >>> w.grad.tolist()
        [1.0, 1.0]
    """
    marked: Tensor = PARAMETER(value, name, anchor)
    return marked
