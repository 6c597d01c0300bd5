"""A few labelled examples as one vector, whatever their order."""

from __future__ import annotations

import math
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from tessera import random
from tessera.data import Batch
from tessera.errors import InputError, unknown_name
from tessera.ops.registry import transformed

__all__ = ["TaskEncoder", "linear", "require_size"]

_POOLINGS = ("mean", "attention")


@final
class TaskEncoder(nn.Module):
    """A set of labelled examples -> an embedding: ``e = g(sum_i w_i f(x_i) v[y_i])``.

    f is a small network, and v one learned vector a class, multiplied element by element. The
    weights are 1/n, or, with ``pooling="attention"``, a softmax over learned scores. Any number of
    shots goes, of any of the classes, and a set given twice over is the same set. Examples are
    taken in an order that depends on them alone, so that another order gives the same bits (within
    `torch.func` transforms, the same to rounding).

    Args:
        in_dim: Values of one example; whatever its shape is, it is flattened.
        num_classes: Labels are 0 .. num_classes - 1.
        embed_dim: Length of the embedding.
        width: Of the layers within.
        pooling: "mean" or "attention".
        seed: Of the starting values.

    Raises:
        InputError: A size is below 1.
        UnknownNameError: No such pooling.

    Source:
        Zaheer et al. 2017, theorem 2 (arXiv:1703.06114); attention: Lee et al. 2019, section 3.2
        (arXiv:1810.00825), with one seed and one head.

    Example:
        >>> encode = TaskEncoder(3, 2, embed_dim=8)
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])
        >>> e = encode(Batch(x, y))
        >>> e.shape, torch.equal(e, encode(Batch(x.flip(0), y.flip(0))))
        (torch.Size([8]), True)
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        *,
        embed_dim: int = 64,
        width: int = 64,
        pooling: Literal["mean", "attention"] = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "num_classes": num_classes, "embed_dim": embed_dim}
        for name, value in {**sizes, "width": width}.items():
            require_size("TaskEncoder", name, value)
        if pooling not in _POOLINGS:
            raise unknown_name("pooling", pooling, _POOLINGS)
        self.in_dim, self.num_classes = in_dim, num_classes
        draw = random.generator(seed, "meta.TaskEncoder")
        self.example = linear(in_dim, width, draw)
        self.label = nn.Parameter(torch.randn(num_classes, width, generator=draw))
        self.deep = linear(width, width, draw)
        self.score = linear(width, 1, draw) if pooling == "attention" else None
        self.norm = nn.LayerNorm(width)
        self.task = linear(width, embed_dim, draw)

    def forward(self, context: Batch) -> Tensor:
        """The embedding of a set.

        Args:
            context: x [n, ...] with `in_dim` values each, y int64 [n]; n >= 1.

        Returns:
            [embed_dim].

        Raises:
            InputError: The set is empty, an example has another size, or a label is out of range.
        """
        x, y = self._read(context)
        # A product lets the sum tell the mean of one class from that of another from the start.
        each = self.deep(F.gelu(self.example(x))) * self.label[y]
        weights = 1 / len(each) if self.score is None else self.score(each).softmax(0)
        embedding: Tensor = self.task(self.norm((weights * each).sum(0)))
        return embedding

    def _read(self, context: Any) -> tuple[Tensor, Tensor]:
        if not (isinstance(context, tuple) and len(context) == 2):
            raise InputError(
                f"TaskEncoder needs a data.Batch(x, y) of examples, got {type(context).__name__}"
            )
        x, y = context
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise InputError("TaskEncoder needs tensors: x [n, ...] and y int64 [n]")
        if x.dim() < 1 or y.dim() != 1 or len(x) != len(y) or len(y) < 1:
            raise InputError(
                "TaskEncoder needs as many labels as examples, at least one: x [n, ...] and y [n], "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if x[0].numel() != self.in_dim:
            raise InputError(
                f"TaskEncoder was made for in_dim={self.in_dim} values an example, got "
                f"{x[0].numel()}: x {tuple(x.shape)}"
            )
        if y.dtype != torch.int64:
            raise InputError(f"TaskEncoder needs int64 labels, got {y.dtype}; use y.long()")
        x = x.flatten(1) if x.dim() > 1 else x[:, None]
        x = x.to(self.label.dtype)
        if transformed():
            return x, y  # values cannot be looked at
        labels = y.tolist()
        if min(labels) < 0 or max(labels) >= self.num_classes:
            raise InputError(
                f"TaskEncoder takes labels 0 .. {self.num_classes - 1}, got {min(labels)} .. "
                f"{max(labels)}"
            )
        rows = x.detach().cpu().contiguous().view(torch.uint8).numpy()
        order = sorted(range(len(labels)), key=lambda i: (labels[i], rows[i].tobytes()))
        index = torch.tensor(order, device=x.device)
        return x[index], y[index]


def linear(inside: int, out: int, draw: torch.Generator) -> nn.Linear:
    """A layer as `nn.Linear` starts, drawn from `draw` alone.

    Example:
        >>> linear(4, 2, random.generator(0, "demo")).weight.shape
        torch.Size([2, 4])
    """
    layer: nn.Linear = skip_init(nn.Linear, inside, out)  # type: ignore[no-untyped-call]  # torch
    bound = 1 / math.sqrt(inside)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=draw)
        layer.bias.uniform_(-bound, bound, generator=draw)
    return layer


def require_size(who: str, name: str, value: object) -> None:
    """Raise InputError unless `value` is a whole number from 1.

    Example:
        >>> require_size("TaskEncoder", "width", 8)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{who} needs a whole {name} >= 1, got {value!r}")
