"""PyTorch's optimizers with plugins, known to the training step by what they own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.errors import InputError
from tessera.graph.inner import InnerAdam, InnerSGD, Rate
from tessera.graph.ownership import own, owned
from tessera.graph.transform import Transform

__all__ = ["SGD", "Adam", "InnerAdam", "InnerSGD", "Transform"]

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
# The rates an inner loop may be given alone; a list of tensors is one of parameters.
Alone: TypeAlias = (
    float | Mapping[str, float | Tensor] | Sequence[float | Mapping[str, float | Tensor]]
)
Betas: TypeAlias = tuple[float, float]
Plugin: TypeAlias = Transform | Sequence[Transform] | None
Opt = TypeVar("Opt", bound=Optimizer)


@overload
def Adam(params: Alone, *, steps: int | None = ..., betas: Betas = ...) -> InnerAdam: ...
@overload
def Adam(
    params: nn.Module, lr: Rate, *, steps: int | None = ..., betas: Betas = ...
) -> InnerAdam: ...
@overload
def Adam(
    params: Params,
    lr: float = ...,
    *,
    betas: Betas = ...,
    eps: float = ...,
    weight_decay: float = ...,
    plugin: Plugin = ...,
) -> torch.optim.Adam: ...
def Adam(
    params: Params | nn.Module | Rate,
    lr: Rate | None = None,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    steps: int | None = None,
    plugin: Plugin = None,
) -> torch.optim.Adam | InnerAdam:
    """Adam: an optimizer that `tg.training_step` steps by itself, or the rule of an inner loop.

    ``Adam(model.parameters())`` is `torch.optim.Adam`; ``Adam(1e-2)`` and
    ``Adam(model, lr=1e-2, steps=5)`` are immutable `InnerAdam` values, as with `SGD`.

    Args:
        params: As for any PyTorch optimizer: parameters, groups, or named parameters (an
            optimizer); learning rates or a module (an inner loop).
        lr: Learning rate, >= 0; 1e-3 for an optimizer that is told none.
        betas: Decay of the mean and of the squared gradient.
        eps: Added to the denominator.
        weight_decay: L2 penalty of the optimizer.
        steps: Length of the inner loop.
        plugin: One `Transform` or a list of them, applied in order around every step.

    Returns:
        A `torch.optim.Optimizer`, to be kept in a variable: ownership is held weakly. Or the rule.

    Raises:
        InputError: A plugin is not a Transform, or an argument belongs to the other form.

    Source:
        Kingma & Ba 2015 (arXiv:1412.6980).

    Example:
        >>> model = nn.Linear(2, 1)
        >>> isinstance(Adam(model.parameters(), lr=2e-4), torch.optim.Optimizer)
        True
        >>> Adam(1e-2).betas
        (0.9, 0.999)
    """
    if _is_inner(params):
        if weight_decay or plugin is not None:
            raise InputError(_FOREIGN.format("Adam"))
        return InnerAdam(lr=_one_rate("Adam", params, lr), steps=steps, betas=betas, eps=eps)
    if steps is not None:
        raise InputError(_NOT_INNER.format("Adam"))
    entries = _entries(cast(Params, params))
    rate = 1e-3 if lr is None else cast(float, lr)
    fused = _fused(entries)
    optimizer = torch.optim.Adam(entries, rate, betas, eps, weight_decay, fused=fused)
    return _equip(optimizer, plugin)


@overload
def SGD(params: Alone, *, momentum: float = ..., steps: int | None = ...) -> InnerSGD: ...
@overload
def SGD(
    params: nn.Module, lr: Rate, *, momentum: float = ..., steps: int | None = ...
) -> InnerSGD: ...
@overload
def SGD(
    params: Params,
    lr: float,
    *,
    momentum: float = ...,
    weight_decay: float = ...,
    plugin: Plugin = ...,
) -> torch.optim.SGD: ...
def SGD(
    params: Params | nn.Module | Rate,
    lr: Rate | None = None,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    steps: int | None = None,
    plugin: Plugin = None,
) -> torch.optim.SGD | InnerSGD:
    """Stochastic gradient descent: an optimizer, or the rule of an inner loop.

    ``SGD(model.parameters(), lr=0.1)`` is `torch.optim.SGD` that `tg.training_step` steps by
    itself. ``SGD(1e-2)`` and ``SGD(model, lr=1e-2, steps=5)`` are immutable `InnerSGD` values.

    Args:
        params: Parameters (an optimizer); learning rates or a module (an inner loop).
        lr: Learning rate; not given when `params` is the rate. That of an inner loop may be a
            tensor, a mapping of them by parameter, or a list over the steps: see `InnerSGD`. A list
            of tensors is written ``SGD(model, lr=[...])``.
        momentum: Heavy-ball momentum.
        weight_decay: L2 penalty of the optimizer.
        steps: Length of the inner loop.
        plugin: One `Transform` or a list of them, applied in order around every step.

    Raises:
        InputError: The learning rate is missing, or an argument belongs to the other form.

    Example:
        >>> SGD(1e-2).lr, SGD(nn.Linear(1, 1), lr=1e-2, steps=5).steps
        (0.01, 5)
        >>> isinstance(SGD(nn.Linear(1, 1).parameters(), lr=0.1), torch.optim.SGD)
        True
    """
    if _is_inner(params):
        if weight_decay or plugin is not None:
            raise InputError(_FOREIGN.format("SGD"))
        return InnerSGD(lr=_one_rate("SGD", params, lr), steps=steps, momentum=momentum)
    if lr is None or steps is not None:
        raise InputError(_NOT_INNER.format("SGD"))
    optimizer = torch.optim.SGD(
        cast(Params, params), cast(float, lr), momentum, weight_decay=weight_decay
    )
    return _equip(optimizer, plugin)


_FOREIGN = (
    "an inner {0} takes no weight_decay and no plugin: they belong to the optimizer, "
    "tg.{0}(model.parameters(), lr=...)"
)
_NOT_INNER = (
    "tg.{0} over parameters needs lr= and takes no steps=; an inner loop is written "
    "tg.{0}(model, lr=1e-2, steps=5)"
)


def _is_inner(params: Any) -> bool:
    """Whether this is a module or learning rates, and neither parameters nor groups of them."""
    if isinstance(params, float | int | nn.Module | Mapping):
        return True
    if isinstance(params, Tensor):
        return params.dim() == 0
    if isinstance(params, list | tuple) and params:
        first = params[0]
        if isinstance(first, Mapping):
            return "params" not in first
        return isinstance(first, float | int)  # a list of tensors is one of parameters
    return False


def _one_rate(kind: str, params: Any, lr: Rate | None) -> Rate:
    if not isinstance(params, nn.Module):
        if lr is not None:
            raise InputError(f"an inner {kind} has one learning rate, got {params} and lr={lr}")
        return float(params) if isinstance(params, int) else cast(Rate, params)
    if lr is None:
        raise InputError(f"an inner {kind} needs lr > 0, got None; write tg.{kind}(1e-2)")
    return lr


def _entries(params: Params) -> list[Any]:
    """Parameters or groups as a list that can be read twice; a group may hold a generator."""
    return [
        {**e, "params": [e["params"]] if isinstance(e["params"], Tensor) else list(e["params"])}
        if isinstance(e, dict)
        else e
        for e in params
    ]


def _fused(params: list[Any]) -> bool:
    """Whether PyTorch's one-pass kernel takes these; Adam's loop is four times slower on a CPU."""
    tensors: list[Tensor] = []
    for entry in params:
        group = entry["params"] if isinstance(entry, dict) else [entry]
        tensors += [e[1] if isinstance(e, tuple) else e for e in group]
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in tensors)


def _equip(optimizer: Opt, plugin: Plugin) -> Opt:
    """Register ownership and hang the plugins into the optimizer's own hooks."""
    several = plugin if isinstance(plugin, Iterable) else [] if plugin is None else [plugin]
    plugins = tuple(several)
    for p in plugins:
        if not isinstance(p, Transform):
            raise InputError(
                f"plugin= takes graph.Transform objects such as opt.path_integral(), got {p!r}"
            )
    own(optimizer, plugins)
    if not plugins:
        return optimizer
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in plugins:
        p.attach(params)
    optimizer.register_step_pre_hook(_before)
    optimizer.register_step_post_hook(_after)
    optimizer.register_state_dict_post_hook(_add_plugin_state)
    optimizer.register_load_state_dict_pre_hook(_take_plugin_state)
    return optimizer


def _plugins(optimizer: Optimizer) -> tuple[Transform, ...]:
    known = owned(optimizer)
    return known.plugins if known else ()


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(a is not None for a in (*args[1:], *kwargs.values())):
        raise InputError(
            "an optimizer with plugins takes no closure: call backward() first, then step()"
        )
    known = owned(optimizer)
    if known is None:
        return
    *others, last = known.plugins
    for plugin in others:
        plugin.before_step()
    moved = last.take_step(optimizer)
    if not moved:
        last.before_step()
    # Without a gradient PyTorch passes a parameter over; it is given back after the step.
    known.held[:] = [(p, p.grad) for p in moved]
    for p in moved:
        p.grad = None


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    known = owned(optimizer)
    if known is None:
        return
    for p, grad in known.held:
        p.grad = grad
    known.held.clear()
    for plugin in known.plugins:
        plugin.after_step()


def _add_plugin_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "plugins": [p.state_dict() for p in _plugins(optimizer)]}


def _take_plugin_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    if [len(g["params"]) for g in state["param_groups"]] != [
        len(g["params"]) for g in optimizer.param_groups
    ]:
        return  # PyTorch refuses it in a moment; the plugins stay as they are
    saved, plugins = state.get("plugins", []), _plugins(optimizer)
    if len(saved) != len(plugins):
        raise InputError(
            f"this optimizer has {len(plugins)} plugins, the saved state has {len(saved)}: build "
            "it with the plugins it was saved with"
        )
    for p, values in zip(plugins, saved, strict=True):
        p.load_state_dict(values)
