"""Run a module with other tensors in place of its parameters, and never touch it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from tessera import trees
from tessera.arch.base import named
from tessera.arch.delta import Delta
from tessera.arch.overlay import overlay, placed, shadow_tree
from tessera.errors import InputError, unknown_name
from tessera.meta.guard import Guard, require_no_dropout
from tessera.meta.norms import is_norm, plain_norm

__all__ = ["Buffers", "Functional"]

Buffers: TypeAlias = Literal["batch", "frozen", "per_task"]
_POLICIES = ("batch", "frozen", "per_task")


@final
class Functional:
    """`model` as a function of its parameters: ``f(params, x)``.

    Every call runs a private shadow of the module tree, so the model's tensors, gradients, buffers
    and mode stay as they are, several threads may call at once, and `torch.func` transforms may
    surround a call. Batch and layer normalization are plain operations here, as PyTorch's own have
    a wrong second derivative under `vmap`; attention takes the math path, which has one at all.
    Whatever else a forward writes into buffers is dropped after the call.

    Args:
        model: The module. What it is built of and its mode are read once, here.
        buffers: What normalization layers do, in either mode of the model. "batch": statistics of
            the batch; the running ones are neither read nor written. "frozen": the running ones
            are read, never written. "per_task": `call` takes running statistics and returns them.
        double: Whether outputs will be differentiated twice; only then are cuDNN's RNNs refused.
        delta: Laid over the model; ``params`` are then its tensors, and no gradient reaches the
            model.
        stacked: Whether it is called inside `torch.func.vmap` over parameters: the same numbers
            to rounding, sooner.

    Raises:
        InputError: The model cannot be run this way; the message names the module.
        UnknownNameError: No such policy.
        DeltaError: The delta is of another base.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> f = Functional(layer)
        >>> halved = {name: p / 2 for name, p in f.params().items()}
        >>> x = torch.ones(1, 2)
        >>> bool(torch.allclose(f(halved, x), layer(x) / 2))
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        buffers: Buffers = "batch",
        double: bool = True,
        delta: Delta | None = None,
        stacked: bool = False,
    ) -> None:
        if buffers not in _POLICIES:
            raise unknown_name("policy for buffers", buffers, _POLICIES)
        _require_callable(model, double=double)
        self._own: dict[str, Tensor] = dict(model.named_parameters())
        self._delta = None if delta is None else _Laid(delta, model)
        self._per_task, self._stacked = buffers == "per_task", stacked
        norms = {name for name, module in named(model).items() if is_norm(module)}
        seats = {name: [lambda twin: plain_norm(twin, buffers)] for name in norms}
        # Never run, so that it is what the model was when this was made.
        self._template = _same_buffers(shadow_tree(model, seats, frozen=delta is not None), model)
        self._idle: list[_Shadow] = []

    def params(self) -> dict[str, Tensor]:
        """The model's own parameters by name, a tied one once; of a delta its trainable tensors."""
        if self._delta is not None:
            return self._delta.trainable()
        return dict(self._own)

    def running(self) -> dict[str, Tensor]:
        """Copies of the running statistics as they are; empty unless they are kept per task."""
        if not self._per_task:
            return {}
        tracked = {
            f"{name}.{own}" if name else own: value
            for name, module in named(self._template).items()
            if is_norm(module)
            for own, value in module.named_buffers(recurse=False)
        }
        return trees.clone(tracked)

    def __call__(self, params: Mapping[str, Tensor], *args: Any) -> Any:
        """What the model computes with `params`; names it lacks are its own parameters."""
        return self.call(params, args)[0]

    def call(
        self,
        params: Mapping[str, Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        running: Mapping[str, Tensor] | None = None,
        learn: bool = False,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run it, with running statistics if they are kept per task.

        Args:
            params: Name -> tensor of the parameter's shape; those left out are the model's own.
            args: Positional arguments of the model.
            kwargs: Its arguments by name.
            running: As `running()` gives them; None takes the model's.
            learn: Normalize by the batch and let it move the running statistics, as in training;
                else normalize by them.

        Returns:
            The model's output, and the running statistics after it.

        Raises:
            UnknownNameError: `params` has a name the model lacks.
        """
        shadow = self._shadow(params)
        try:
            shadow.bind(params, running or {}, learn=learn)
            with Guard(stacked=self._stacked):
                output = shadow.root(*args, **(kwargs or {}))
            return output, shadow.running() if self._per_task else {}
        finally:
            shadow.release()
            if self._delta is None:
                self._idle.append(shadow)

    def _shadow(self, params: Mapping[str, Tensor]) -> _Shadow:
        if self._delta is not None:
            twin = self._delta.over(self._template, params)
            return _Shadow(_same_buffers(twin, self._template), {})
        try:
            return self._idle.pop()  # one bytecode: no two threads get the same
        except IndexError:
            twin = shadow_tree(self._template, {})
            return _Shadow(_same_buffers(twin, self._template), self._own)


@final
class _Laid:
    """A delta over a model, whose tensors come anew with each call."""

    def __init__(self, delta: Delta, model: nn.Module) -> None:
        self._delta = delta
        # Whose delta it is was asked here; a shadow would be asked again at each call.
        self._placed = replace(placed(delta, model), base_hash="", _home=[])
        self._names = dict(zip(self._placed.tensors, delta.tensors, strict=True))
        if not self.trainable():
            raise InputError(
                f"the inner loop adapts {delta!r}, which has no trainable tensor; give it "
                "delta.trainable()"
            )

    def trainable(self) -> dict[str, Tensor]:
        return {n: t for n, t in self._delta.tensors.items() if t.requires_grad}

    def over(self, template: nn.Module, params: Mapping[str, Tensor]) -> nn.Module:
        own = self._delta.tensors
        for name in params:
            if name not in own:
                raise unknown_name("tensor of the delta", name, own)
        tensors = {there: params.get(here, own[here]) for there, here in self._names.items()}
        return overlay(template, [(replace(self._placed, tensors=tensors), 1.0)])


@final
class _Shadow:
    """One tree of copies, run by one thread at a time."""

    def __init__(self, root: nn.Module, own: Mapping[str, Tensor]) -> None:
        self.root = root
        self._own = own
        modules = named(root)
        names = {id(p): name for name, p in own.items()}
        self._seats: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in own}
        for module in modules.values():
            slots = module.__dict__["_parameters"]
            for local, p in slots.items():
                if id(p) in names:
                    self._seats[names[id(p)]].append((slots, local))
        self._rnns = [m for m in modules.values() if isinstance(m, nn.RNNBase)]
        self._norms = {name: m for name, m in modules.items() if is_norm(m)}
        self._kept = [
            _Kept(m.__dict__["_buffers"], copied=not is_norm(m))
            for m in modules.values()
            if any(b is not None for b in m.__dict__["_buffers"].values())
        ]

    def bind(
        self, params: Mapping[str, Tensor], running: Mapping[str, Tensor], *, learn: bool
    ) -> None:
        for kept in self._kept:
            kept.refresh()
        if self._own:
            for name, tensor in params.items():
                if name not in self._seats:
                    raise unknown_name("parameter", name, self._own)
                for slots, local in self._seats[name]:
                    slots[local] = tensor
        for rnn in self._rnns:
            slots = rnn.__dict__["_parameters"]
            rnn.__dict__["_flat_weights"] = [slots.get(n) for n in rnn._flat_weights_names]
        for name, norm in self._norms.items():
            norm.__dict__["learn"] = learn
            start = f"{name}." if name else ""
            slots = norm.__dict__["_buffers"]
            for local in slots:
                if start + local in running:
                    slots[local] = running[start + local]

    def running(self) -> dict[str, Tensor]:
        return {
            f"{name}.{local}" if name else local: value
            for name, norm in self._norms.items()
            for local, value in norm.__dict__["_buffers"].items()
            if value is not None
        }

    def release(self) -> None:
        """Let go of the tensors of this call, and of the graph behind them."""
        for name, seats in self._seats.items():
            for slots, local in seats:
                slots[local] = self._own[name]
        for rnn in self._rnns:
            rnn.__dict__["_flat_weights"] = []
        for kept in self._kept:
            kept.release()


def _same_buffers(twin: nn.Module, model: nn.Module) -> nn.Module:
    """`twin` around the very buffers of `model`; a shadow in train mode has copies."""
    theirs = named(model)
    for name, module in named(twin).items():
        module.__dict__["_buffers"] = dict(theirs[name].__dict__["_buffers"])
    return twin


@final
class _Kept:
    """The buffers of one copied module: the model's values at each call, whatever one wrote."""

    def __init__(self, slots: dict[str, Any], *, copied: bool) -> None:
        self._slots, self._sources, self._copied = slots, dict(slots), copied
        self._copies: dict[str, tuple[Tensor, int, int]] = {}

    def refresh(self) -> None:
        for name, source in self._sources.items() if self._copied else ():
            if source is None:
                continue
            copy, of, at = self._copies.get(name, (None, -1, -1))
            if copy is None or of != source._version or at != copy._version:
                copy = source.detach().clone()
                self._copies[name] = (copy, source._version, copy._version)
            self._slots[name] = copy

    def release(self) -> None:
        self._slots.clear()
        self._slots.update(self._sources)


def _require_callable(model: nn.Module, *, double: bool) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"a meta-learner adapts an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputError(f"give the module inside: {type(model).__name__}(model).module")
    for name, module in named(model).items():
        where = f"{name!r} ({type(module).__name__})" if name else type(module).__name__
        if "forward" in module.__dict__:
            raise InputError(
                f"a forward is attached to the instance {where} (module.forward = ..., or "
                "torch.compile(module)); it would run with the model's own parameters. Give the "
                "module it was made from"
            )
        own: Iterable[Any] = module.__dict__["_parameters"].values()
        if any(nn.parameter.is_lazy(p) for p in own if p is not None):
            raise InputError(f"{where} does not know its shapes yet: run the model once before")
        if isinstance(module, nn.RNNBase):
            if module.training:
                require_no_dropout(module.dropout if module.num_layers > 1 else 0.0)
            if double:
                _require_differentiable(module, where)


def _require_differentiable(rnn: nn.RNNBase, where: str) -> None:
    on_cuda = any(p.device.type == "cuda" for p in rnn.parameters(recurse=False))
    if on_cuda and torch.backends.cudnn.enabled:
        raise InputError(
            f"cuDNN cannot differentiate {where} twice; surround the call by "
            "torch.backends.cudnn.flags(enabled=False), or use create_graph=False"
        )
