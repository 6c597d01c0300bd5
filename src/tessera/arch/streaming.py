"""Statistics of the norm layers by stream: many streams, one model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias, cast, final

import torch
from torch import Tensor, nn

from tessera.errors import (
    CheckpointError,
    InputError,
    NonFiniteError,
    UnknownNameError,
    unknown_name,
)

__all__ = ["StreamNorms", "stream_norms"]

Norm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.LayerNorm
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)


def stream_norms(model: nn.Module, beta: float = 0.01) -> StreamNorms:
    """Let every BatchNorm and LayerNorm of a model normalise by the statistics of a stream.

    In ``with norms.stream("a"):`` a layer computes ``(x - mean_t) / sqrt(var_t + eps)``, scaled and
    shifted by its own weight and bias, with moments that decay over the stream's batches::

        mean_t   = (1 - beta) mean_{t-1}   + beta mean(x)
        second_t = (1 - beta) second_{t-1} + beta mean(x^2),   var_t = second_t - mean_t^2

    In train mode they move before they are used, so that one example is a batch; in eval mode they
    stand. BatchNorm has a mean and a variance for each channel and starts from its running
    statistics: a new stream is first of all like the data the model knows. LayerNorm, and a
    BatchNorm without running statistics, know nothing to start from: there the moments are divided
    by ``1 - (1 - beta)^t``. LayerNorm has one mean and one variance, over all that it is given.

    The gradient is that of the formula with the past as a constant: it goes through the share that
    the batch has in its moments. With `beta` 1 that is BatchNorm's in full; with a small one the
    moments are nearly constants, as in normalisation by frozen statistics.

    Outside a scope the model is as it was, to the bit; its modules, parameters, buffers and
    `state_dict` never change.

    Args:
        model: With at least one `nn.BatchNorm1d`, `2d`, `3d` or `nn.LayerNorm`.
        beta: In (0, 1]; the statistics look back about ``1 / beta`` batches.

    Returns:
        The streams' statistics. `close` it to take it off the model.

    Raises:
        InputError: `beta` is out of range; there is no norm layer; the model has streams already.

    Source:
        Liao, Kawaguchi & Poggio 2016, "Streaming normalization" (arXiv:1610.06160), whose moments
        these are; the gradient here is exact for one batch where theirs is averaged over several.
        Chiley et al. 2019, "Online normalization" (arXiv:1905.05894), on what it costs to treat
        the moments as constants.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> norms = stream_norms(model)
        >>> with norms.stream("tenant-a", beta=0.05):
        ...     y = model(torch.ones(1, 2))  # one example, in train mode
        >>> norms.streams
        ('tenant-a',)
        >>> norms.close()
    """
    _check_beta("arch.stream_norms", beta)
    found = {n: m for n, m in model.named_modules() if isinstance(m, _NORMS)}
    if not found:
        raise InputError(
            f"arch.stream_norms needs a model with an nn.BatchNorm or nn.LayerNorm, got "
            f"{type(model).__name__} without one"
        )
    taken = [n for n, m in found.items() if _is_site(m)]
    if taken:
        raise InputError(
            f"arch.stream_norms: {taken[0]!r} has streams already; use those, or close() them"
        )
    return StreamNorms(found, beta)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Moments:
    """Of one layer in one stream; replaced, never written to, so a reader needs no lock."""

    mean: Tensor
    var: Tensor
    mass: float  # how much of the shares is given out: 1 - (1 - beta)^t, or 1 with a start


@final
class _Stream:
    """One stream's moments by layer."""

    def __init__(self) -> None:
        self.moments: dict[str, _Moments] = {}
        self.lock = threading.Lock()  # two threads in one stream: no update is lost


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Scope:
    norms: StreamNorms
    name: str
    beta: float


# Every scope that is open in this thread or task, innermost last.
_SCOPES: ContextVar[tuple[_Scope, ...]] = ContextVar("tessera_norm_scopes", default=())


@final
class StreamNorms:
    """What `arch.stream_norms` gives: the statistics of the streams of one model.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.BatchNorm1d(3))
        >>> norms = stream_norms(model)
        >>> with norms.stream("a"):
        ...     _ = model(torch.randn(4, 3))
        >>> norms.streams
        ('a',)
    """

    def __init__(self, layers: Mapping[str, Norm], beta: float) -> None:
        self._beta = beta
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()
        self._layers = dict(layers)
        self._open = True
        for name, layer in layers.items():
            # Not a hook: BatchNorm's own forward refuses one example and moves its buffers, and a
            # hook cannot keep it from running. An attribute of the instance is in no state_dict.
            object.__setattr__(layer, "forward", _Site(self, name, layer, layer.forward).forward)

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams that have statistics."""
        return tuple(self._streams)

    @contextmanager
    def stream(self, name: str, beta: float | None = None) -> Iterator[None]:
        """Inside, the model normalises by this stream; of nested scopes the inner one counts.

        The scope holds for the thread or task that opened it: others are not touched.

        Args:
            name: Which stream. In train mode a new name begins a stream.
            beta: How fast, in (0, 1], for the batches inside; None as given for the model.

        Raises:
            InputError: `beta` is out of range, or the streams were closed.
            UnknownNameError: From the model in eval mode, where the stream has no statistics yet.
            NonFiniteError: From the model in train mode, where a batch is not finite; the layer's
                statistics stand.
        """
        if not self._open:
            raise InputError(
                "these streams were closed; write norms = arch.stream_norms(model) anew"
            )
        rate = self._beta if beta is None else beta
        _check_beta("norms.stream", rate)
        token = _SCOPES.set((*_SCOPES.get(), _Scope(norms=self, name=name, beta=rate)))
        try:
            yield
        finally:
            _SCOPES.reset(token)

    def drop(self, stream: str) -> None:
        """Forget a stream.

        Raises:
            UnknownNameError: There is none of this name.
        """
        with self._lock:
            if stream not in self._streams:
                raise unknown_name("stream", stream, map(repr, self._streams))
            del self._streams[stream]

    def close(self) -> None:
        """Take the streams off the model; what they know can still be saved."""
        if self._open:
            for layer in self._layers.values():
                layer.__dict__["forward"].__self__.remove()
        self._open = False

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, by stream and layer.

        Example:
            >>> model = nn.Sequential(nn.LayerNorm(2))
            >>> norms = stream_norms(model)
            >>> with norms.stream("a"):
            ...     _ = model(torch.tensor([[1.0, 3.0]]))
            >>> norms.state_dict()["streams"]["a"]["0"]["mean"].item()
            2.0
        """
        with self._lock:
            known = {name: dict(s.moments) for name, s in self._streams.items()}
        return {
            "streams": {
                name: {
                    layer: {"mean": m.mean.clone(), "var": m.var.clone(), "mass": m.mass}
                    for layer, m in moments.items()
                }
                for name, moments in known.items()
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; streams of now are replaced.

        Raises:
            CheckpointError: It is of another model; nothing was changed.
        """
        streams: dict[str, _Stream] = {}
        for name, layers in state["streams"].items():
            streams[name] = _Stream()
            for layer, values in layers.items():
                shape = _shape(self._layers[layer]) if layer in self._layers else None
                if any(values[k].shape != shape for k in ("mean", "var")):
                    raise CheckpointError(
                        f"the saved statistics of stream {name!r} are of another model: "
                        f"{layer!r} has shape {tuple(values['mean'].shape)}, here "
                        f"{tuple(shape) if shape is not None else 'there is no such norm layer'}"
                    )
                streams[name].moments[layer] = _Moments(
                    mean=values["mean"].detach().clone(),
                    var=values["var"].detach().clone(),
                    mass=float(values["mass"]),
                )
        with self._lock:
            self._streams = streams

    def _of(self, name: str) -> _Stream:
        with self._lock:
            return self._streams.setdefault(name, _Stream())


@final
class _Site:
    """Stands before the forward of one layer."""

    def __init__(self, norms: StreamNorms | None, name: str, layer: Norm, plain: Any) -> None:
        self.norms, self.name, self.layer, self.plain = norms, name, layer, plain
        self.replaced = "forward" in layer.__dict__

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model, or what torch.save keeps of it, has no streams.
        return _Site, (None, self.name, self.layer, self.plain)

    def remove(self) -> None:
        if self.replaced:
            object.__setattr__(self.layer, "forward", self.plain)
        else:
            object.__delattr__(self.layer, "forward")

    def forward(self, x: Tensor) -> Tensor:
        scope = next((s for s in reversed(_SCOPES.get()) if s.norms is self.norms), None)
        if scope is None or not x.numel():
            return cast(Tensor, self.plain(x))
        _check_input(self.name, self.layer, x)
        dims, view = _axes(self.layer, x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.layer.training:
            mean, var = self._move(scope, wide, dims)
        else:
            mean, var = self._stand(scope, wide)
        scale = torch.rsqrt(var + self.layer.eps).view(view)
        y = (wide - mean.view(view)) * scale
        weight, bias = self.layer.weight, self.layer.bias
        shape = view if view else list(cast(nn.LayerNorm, self.layer).normalized_shape)
        if weight is not None:
            y = y * weight.view(shape)
        if bias is not None:
            y = y + bias.view(shape)
        return y.to(x.dtype)

    def _move(self, scope: _Scope, x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
        """The moments with this batch's share in them, which goes on to the gradient."""
        batch_var, batch_mean = torch.var_mean(x, dims, correction=0)
        if not bool(torch.isfinite(batch_var).all()):
            raise NonFiniteError(
                f"stream {scope.name!r}: the input of {self.name!r} has a NaN or an infinity; its "
                "statistics were not changed"
            )
        stream = scope.norms._of(scope.name)
        with stream.lock:
            past = stream.moments.get(self.name) or _start(self.layer, x)
            mass = (1 - scope.beta) * past.mass + scope.beta
            share = scope.beta / mass
            old_mean, old_var = past.mean.to(x), past.var.to(x)
            mean = torch.lerp(old_mean, batch_mean, share)
            # E[x^2] - mean^2 without its cancellation: within, and between the old and the new.
            between = (1 - share) * share * (batch_mean - old_mean).square()
            var = torch.lerp(old_var, batch_var, share) + between
            stream.moments[self.name] = _Moments(mean=mean.detach(), var=var.detach(), mass=mass)
        return mean, var

    def _stand(self, scope: _Scope, x: Tensor) -> tuple[Tensor, Tensor]:
        stream = scope.norms._streams.get(scope.name)
        moments = stream.moments.get(self.name) if stream else None
        if moments is None:
            raise UnknownNameError(
                f"stream {scope.name!r} has no statistics of {self.name!r}: give it a batch in "
                f"train mode first; streams so far: {', '.join(scope.norms.streams) or 'none'}"
            )
        return moments.mean.to(x), moments.var.to(x)


def _is_site(layer: nn.Module) -> bool:
    site = getattr(layer.__dict__.get("forward"), "__self__", None)
    return isinstance(site, _Site) and site.norms is not None


def _check_beta(who: str, beta: float) -> None:
    if not 0 < beta <= 1:
        raise InputError(f"{who} needs a beta in (0, 1], got {beta}; write beta=0.01")


def _shape(layer: Norm) -> torch.Size:
    return torch.Size([] if isinstance(layer, nn.LayerNorm) else [layer.num_features])


def _axes(layer: Norm, x: Tensor) -> tuple[list[int], list[int]]:
    """Over which axes the moments are taken, and the shape in which they meet x."""
    if isinstance(layer, nn.LayerNorm):
        return list(range(x.dim())), []
    return [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)


def _start(layer: Norm, x: Tensor) -> _Moments:
    if isinstance(layer, nn.LayerNorm) or layer.running_mean is None or layer.running_var is None:
        zero = torch.zeros(_shape(layer), dtype=x.dtype, device=x.device)
        return _Moments(mean=zero, var=zero, mass=0.0)
    mean, var = layer.running_mean.to(x), layer.running_var.to(x)
    return _Moments(mean=mean.clone(), var=var.clone(), mass=1.0)


def _check_input(name: str, layer: Norm, x: Tensor) -> None:
    if isinstance(layer, nn.LayerNorm):
        shape = list(layer.normalized_shape)
        fits = list(x.shape[-len(shape) :]) == shape
        wanted = f"[..., {', '.join(map(str, shape))}]"
    else:
        rank = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
        ranks = next(r for kind, r in rank.items() if isinstance(layer, kind))
        fits = x.dim() in ranks and x.shape[1] == layer.num_features
        wanted = f"[n, {layer.num_features}, ...] of {' or '.join(map(str, ranks))} axes"
    if not fits:
        raise InputError(f"{name!r} needs an input {wanted}, got shape {list(x.shape)}")
