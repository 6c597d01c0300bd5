"""Normalization in plain operations, right in any order of vmap and derivatives.

PyTorch 2.13's own `batch_norm` and `layer_norm` have a wrong second derivative inside vmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from tessera.errors import InputError

__all__ = ["batch_norm", "is_norm", "layer_norm", "plain_norm"]


def is_norm(module: nn.Module) -> bool:
    """Whether `plain_norm` has a form of this layer.

    Example:
        >>> is_norm(nn.BatchNorm2d(3)), is_norm(nn.LayerNorm(3))
        (True, False)
    """
    return isinstance(module, _BatchNorm | _InstanceNorm)


def plain_norm(twin: nn.Module, buffers: str) -> nn.Module:
    """Turn a private copy of a BatchNorm or InstanceNorm into the same layer in plain operations.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``; the statistics are those of the batch, or
    the running ones as `buffers` has it.

    Example:
        >>> from tessera.arch.overlaid import bare_copy
        >>> layer, x = nn.BatchNorm1d(2), torch.tensor([[0.0, 1.0], [2.0, 5.0]])
        >>> bool(torch.allclose(plain_norm(bare_copy(layer), "batch")(x), layer(x)))
        True
    """
    twin.__class__ = _plain(cast(Any, type(twin)), buffers)
    return twin


@cache
def _plain(cls: Any, buffers: str) -> Any:
    inside = {"forward": _forward, "buffer_policy": buffers, "learn": False}
    return type(f"Plain{cls.__name__}", (cls,), inside)


def _forward(self: Any, x: Tensor) -> Tensor:
    self._check_input_dim(x)
    instance = isinstance(self, _InstanceNorm)
    # Unbatched input, which only an InstanceNorm takes, has its channels first.
    channel = 0 if instance and x.dim() == self._get_no_batch_dim() else 1
    dims = [*range(channel + 1, x.dim())] if instance else [0, *range(2, x.dim())]
    shape = [1] * x.dim()
    shape[channel] = -1
    tracked = self.running_mean is not None
    moving = self.buffer_policy == "per_task" and tracked and self.learn
    if tracked and self.buffer_policy != "batch" and not moving:
        centred, var = x - self.running_mean.view(shape), self.running_var.view(shape)
    else:
        mean, centred, var = _statistics(self, x, dims)
        if moving:
            _move(self, x, dims, mean, var)
    return _scaled(centred, var + self.eps, self.weight, self.bias, shape).to(x.dtype)


def _statistics(self: Any, x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    if _count(x, dims) < 2:
        raise InputError(
            f"{type(self).__name__.removeprefix('Plain')} normalizes by the statistics of the "
            f"batch and needs more than one value a channel, got input {tuple(x.shape)}; give more "
            'examples, or buffers="frozen"'
        )
    return _moments(x, dims)


def _move(self: Any, x: Tensor, dims: list[int], mean: Tensor, var: Tensor) -> None:
    """``running <- (1 - m) running + m batch`` into new tensors, as the layer does in training."""
    slots = self.__dict__["_buffers"]
    slots["num_batches_tracked"] = slots["num_batches_tracked"] + 1
    rate = self.momentum
    if rate is None:
        rate = 1.0 / slots["num_batches_tracked"].to(var.dtype)
    count = _count(x, dims)
    fresh = {"running_mean": mean, "running_var": var * (count / (count - 1))}
    for name, value in fresh.items():
        if isinstance(self, _InstanceNorm) and value.dim() > len(dims) + 1:
            value = value.mean(0)
        old = slots[name]
        slots[name] = old + rate * (value.reshape(old.shape).to(old.dtype) - old)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`.

    Example:
        >>> x = torch.tensor([[1.0, 3.0, 8.0]])
        >>> bool(torch.allclose(layer_norm(x, [3]), nn.functional.layer_norm(x, [3])))
        True
    """
    if tuple(input.shape[-len(normalized_shape) :]) != tuple(normalized_shape):
        raise InputError(
            f"layer_norm over {tuple(normalized_shape)} got input {tuple(input.shape)}"
        )
    dims = list(range(-len(normalized_shape), 0))
    _, centred, var = _moments(input, dims)
    return _scaled(centred, var + eps, weight, bias, tuple(normalized_shape)).to(input.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, but that running statistics are not written to.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> bool(torch.allclose(batch_norm(x, None, None, training=True),
        ...                     nn.functional.batch_norm(x, None, None, training=True)))
        True
    """
    shape = [1, -1, *(1 for _ in input.shape[2:])]
    if training or running_mean is None or running_var is None:
        _, centred, var = _moments(input, [0, *range(2, input.dim())])
    else:
        centred, var = input - running_mean.view(shape), running_var.view(shape)
    return _scaled(centred, var + eps, weight, bias, shape).to(input.dtype)


def _scaled(
    centred: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
) -> Tensor:
    """``centred / sqrt(var) * weight + bias``, the last two seen as of `shape`."""
    scale = var.rsqrt()
    if weight is not None and scale.numel() == weight.numel():
        scale = scale * weight.view(shape)  # one product less over all of the input
        weight = None
    output = centred * scale
    if weight is not None:
        output = output * weight.view(shape)
    return output if bias is None else output + bias.view(shape)


def _moments(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, what is left of `x` without it, and variance."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    # Sums that are scaled when they are small: the derivative of a mean is as large as its input,
    # and so is that of a square's factor 2.
    share = 1 / _count(x, dims)
    mean = wide.sum(dims, keepdim=True) * share
    centred = wide - mean
    return mean, centred, (centred * centred).sum(dims, keepdim=True) * share


def _count(x: Tensor, dims: list[int]) -> int:
    count = 1
    for d in dims:
        count *= x.shape[d]
    return count
