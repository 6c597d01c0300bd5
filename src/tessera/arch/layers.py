"""Sums of squared per-example gradients, layer by layer, from activations and output gradients.

A layer that sees inputs a and passes back output gradients delta has, for example n, the weight
gradient ``G_n = sum_t delta_nt a_nt^T`` over the positions t (and over the layer's uses) at which
it was applied. A Fisher needs ``sum_n G_n^2``. Without positions that is ``(delta^2)^T (a^2)``,
one matrix product in which no per-example gradient ever exists.

Goodfellow 2015, "Efficient per-example gradient computations" (arXiv:1510.01799).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RULES", "Use", "is_flat"]

# One application of a layer: its input and the gradient at its output, both [n, ...].
Use = tuple[Tensor, Tensor]
# (layer, uses) -> local parameter name -> sum over examples of the squared gradient.
Rule = Callable[[nn.Module, Sequence[Use]], dict[str, Tensor]]


def is_flat(module: nn.Module, uses: Sequence[Use] | Sequence[tuple[Tensor, object]]) -> bool:
    """Whether this is a Linear applied once to [n, features], where squares factorise."""
    return type(module) is nn.Linear and len(uses) == 1 and uses[0][0].dim() == 2


def _positions(uses: Sequence[Use]) -> tuple[Tensor, Tensor]:
    """All uses as one: a [n, positions, in] and delta [n, positions, out]."""
    n = uses[0][0].shape[0]
    a = torch.cat([a.reshape(n, -1, a.shape[-1]) for a, _ in uses], 1)
    delta = torch.cat([d.reshape(n, -1, d.shape[-1]) for _, d in uses], 1)
    return a, delta


def _linear(module: nn.Module, uses: Sequence[Use]) -> dict[str, Tensor]:
    if is_flat(module, uses):
        a, delta = uses[0]
        squared = delta.square()
        return {"weight": squared.T @ a.square(), "bias": squared.sum(0)}
    a, delta = _positions(uses)
    return {
        "weight": torch.bmm(delta.transpose(1, 2), a).square().sum(0),
        "bias": delta.sum(1).square().sum(0),
    }


def _conv(module: nn.Module, uses: Sequence[Use]) -> dict[str, Tensor]:
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    n, groups = uses[0][0].shape[0], module.groups
    columns, deltas = [], []
    for a, delta in uses:
        padding: tuple[int, ...] = (0,) * len(module.kernel_size)
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            a = F.pad(a, module._reversed_padding_repeated_twice, mode=mode)
        else:
            padding = module.padding
        columns.append(_unfold(a, module, padding).reshape(n, groups, -1, delta[0, 0].numel()))
        deltas.append(delta.reshape(n, groups, delta.shape[1] // groups, -1))
    gradient = torch.cat(deltas, 3) @ torch.cat(columns, 3).transpose(2, 3)
    return {
        "weight": gradient.square().sum(0).reshape(module.weight.shape),
        "bias": torch.cat(deltas, 3).sum(3).square().sum(0).reshape(-1),
    }


def _unfold(a: Tensor, module: nn.Conv1d | nn.Conv2d, padding: tuple[int, ...]) -> Tensor:
    """The patches each output position saw: [n, channels * kernel, positions]."""
    if isinstance(module, nn.Conv2d):
        return F.unfold(a, module.kernel_size, module.dilation, padding, module.stride)
    k, d, p, s = module.kernel_size[0], module.dilation[0], padding[0], module.stride[0]
    return F.unfold(a.unsqueeze(2), (1, k), (1, d), (0, p), (1, s))


def _embedding(module: nn.Module, uses: Sequence[Use]) -> dict[str, Tensor]:
    assert isinstance(module, nn.Embedding)
    rows, width = module.weight.shape
    n = uses[0][0].shape[0]
    ids = torch.cat([i.reshape(n, -1).long() for i, _ in uses], 1)
    delta = torch.cat([d.reshape(n, -1, width) for _, d in uses], 1).reshape(-1, width)
    # One gradient row for each (example, token) pair that occurs, never [n, rows, width].
    pairs = (torch.arange(n, device=ids.device)[:, None] * rows + ids).reshape(-1)
    if module.padding_idx is not None:
        kept = ids.reshape(-1) != module.padding_idx
        pairs, delta = pairs[kept], delta[kept]
    unique, inverse = torch.unique(pairs, return_inverse=True)
    gradient = delta.new_zeros(len(unique), width).index_add_(0, inverse, delta)
    squares = delta.new_zeros(rows, width)
    return {"weight": squares.index_add_(0, unique % rows, gradient.square())}


def _last_dims_norm(module: nn.Module, uses: Sequence[Use]) -> dict[str, Tensor]:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    shape = tuple(module.normalized_shape)
    weight = bias = uses[0][1].new_zeros(())
    for a, delta in uses:
        if isinstance(module, nn.LayerNorm):
            normal = F.layer_norm(a, shape, None, None, module.eps)
        else:
            normal = F.rms_norm(a, shape, None, module.eps)
        n = a.shape[0]
        weight = weight + (delta * normal).reshape(n, -1, *shape).sum(1)
        bias = bias + delta.reshape(n, -1, *shape).sum(1)
    return {"weight": weight.square().sum(0), "bias": bias.square().sum(0)}


def _channel_norm(module: nn.Module, uses: Sequence[Use]) -> dict[str, Tensor]:
    weight = bias = uses[0][1].new_zeros(())
    for a, delta in uses:
        if isinstance(module, nn.GroupNorm):
            normal = F.group_norm(a, module.num_groups, None, None, module.eps)
        else:
            assert isinstance(module, nn.modules.batchnorm._BatchNorm)
            assert module.running_mean is not None
            assert module.running_var is not None
            mean, var = module.running_mean.to(a.dtype), module.running_var.to(a.dtype)
            normal = F.batch_norm(a, mean, var, eps=module.eps)
        n, channels = a.shape[:2]
        weight = weight + (delta * normal).reshape(n, channels, -1).sum(2)
        bias = bias + delta.reshape(n, channels, -1).sum(2)
    return {"weight": weight.square().sum(0), "bias": bias.square().sum(0)}


# By exact type: a subclass may compute something else.
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Embedding: _embedding,
    nn.LayerNorm: _last_dims_norm,
    nn.RMSNorm: _last_dims_norm,
    nn.GroupNorm: _channel_norm,
    nn.BatchNorm1d: _channel_norm,
    nn.BatchNorm2d: _channel_norm,
    nn.BatchNorm3d: _channel_norm,
}
