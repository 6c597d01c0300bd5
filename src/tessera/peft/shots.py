"""Shots as a fit is given them: read once, checked once, with the loss they are fitted by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from tessera import ops as T
from tessera.errors import InputError

__all__ = ["LossFn", "Shots", "loss_of", "read_shots"]

LossFn = Callable[[Any, Any], Tensor]

_FORM = "a data.Batch, a tuple (x, y), or a list of these"


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shots:
    """The examples of one step.

    Attributes:
        x: A tensor [n, ...], or the model's inputs by name.
        y: Labels [n, ...], or what else the loss takes.
        rows: n.

    Example:
        >>> shots = Shots(x={"input": torch.ones(2, 3)}, y=None, rows=2)
        >>> shots.through(nn.Linear(3, 1)).shape
        torch.Size([2, 1])
    """

    x: Tensor | dict[str, Any]
    y: Any
    rows: int

    def through(self, model: nn.Module) -> Any:
        """What the model makes of them."""
        return model(self.x) if isinstance(self.x, Tensor) else model(**self.x)


def read_shots(shots: Any, who: str, model: nn.Module) -> list[Shots]:
    """The batches in `shots`.

    Args:
        shots: A `data.Batch`, a tuple (x, y), or a list of these; x a tensor, or a mapping of them.
        who: Names the caller in messages.
        model: Says which floating dtype an x that is a tensor should have.

    Raises:
        InputError: There are no shots, x and y differ in length, x holds NaN or has another dtype
            than the model; the message names the field.

    Example:
        >>> one, two = torch.ones(2, 3), torch.ones(1, 3)
        >>> shots = [(one, torch.tensor([0, 1])), (two, torch.tensor([0]))]
        >>> [part.rows for part in read_shots(shots, "peft.fit", nn.Linear(3, 2))]
        [2, 1]
    """
    given: Sequence[Any] = shots if isinstance(shots, list) else [shots]
    if not given:
        raise InputError(f"{who} needs shots, got an empty list: give {_FORM}")
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    parts = []
    for i, part in enumerate(given):
        where = f"{who}: shots[{i}]" if isinstance(shots, list) else f"{who}: shots"
        parts.append(_read(part, where, dtypes))
    return parts


def _read(part: Any, where: str, dtypes: set[torch.dtype]) -> Shots:
    if isinstance(part, Mapping):
        part = (part, None)
    if not isinstance(part, tuple) or len(part) != 2:
        got = f"{type(part).__name__} of {len(part)}" if isinstance(part, tuple) else _kind(part)
        raise InputError(f"{where} must be {_FORM}, got {got}")
    x, y = part
    if isinstance(x, Mapping):
        tensors = {f"x[{k!r}]": v for k, v in x.items() if isinstance(v, Tensor)}
        if not tensors:
            raise InputError(f"{where}: x holds no tensor, only {sorted(map(str, x))}")
        x = {str(k): _plain(v) for k, v in x.items()}
    elif isinstance(x, Tensor):
        tensors, x = {"x": x}, _plain(x)
    else:
        raise InputError(f"{where}: x must be a tensor or a mapping of tensors, got {_kind(x)}")
    if isinstance(y, Tensor):
        tensors["y"], y = y, _plain(y)
    for name, tensor in tensors.items():
        _check(tensor, f"{where}: {name}", dtypes if name == "x" else None)
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    rows = next(iter(lengths.values()))
    if set(lengths.values()) != {rows}:
        raise InputError(f"{where} must have equally many rows in each tensor, got {lengths}")
    if not rows:
        raise InputError(f"{where} hold no example: {next(iter(lengths))} has 0 rows")
    return Shots(x=x, y=y, rows=rows)


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_inference():
        return value.detach()
    with torch.inference_mode(False):  # one made in that mode could take no part in a backward
        return value.clone()


def _kind(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check(tensor: Tensor, where: str, dtypes: set[torch.dtype] | None) -> None:
    if tensor.dim() == 0:
        raise InputError(f"{where} must have a row for each example, it is a single number")
    if not tensor.is_floating_point():
        return
    if dtypes is not None and len(dtypes) == 1 and tensor.dtype not in dtypes:
        want = str(next(iter(dtypes))).removeprefix("torch.")
        raise InputError(
            f"{where} is {tensor.dtype}, the model's weights are torch.{want}; "
            f"give x.to(torch.{want})"
        )
    bad = tensor.isnan()
    if bad.any():
        row = int(bad.flatten(1).any(1).nonzero()[0]) if tensor.dim() > 1 else int(bad.nonzero()[0])
        raise InputError(f"{where} holds NaN, first in row {row}")


def loss_of(output: Any, y: Any, loss_fn: LossFn | None, who: str) -> Tensor:
    """The loss of an output: `loss_fn`'s, the model's own, or cross entropy on its logits.

    Raises:
        InputError: There is nothing to take a loss of, it is no 0-d tensor, or a label is out of
            range.

    Example:
        >>> round(loss_of(torch.zeros(1, 2), torch.tensor([1]), None, "peft.fit").item(), 3)
        0.693
    """
    if loss_fn is not None:
        loss = loss_fn(output, y)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise InputError(f"{who}: loss_fn must return a 0-d tensor, got {_kind(loss)}")
        return loss
    own = own_loss(output)
    if own is not None:
        return own
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(
            f"{who} needs loss_fn=: the output, {type(output).__name__}, has no loss and no logits"
        )
    if not isinstance(y, Tensor):
        raise InputError(
            f"{who} needs labels: shots = (x, y) with y int64 [n], got y {_kind(y)}; or, for the "
            "model's own loss, put what it calls labels into x"
        )
    try:
        return T.cross_entropy(logits, y)
    except InputError as error:
        raise InputError(f"{who}: {error}") from error


def own_loss(output: Any) -> Tensor | None:
    """The loss that a model of transformers returns with its output, if it was given labels.

    Example:
        >>> own_loss(torch.zeros(1)) is None
        True
    """
    loss = None if isinstance(output, Tensor) else getattr(output, "loss", None)
    return loss.mean() if isinstance(loss, Tensor) else None
