"""The average of the weights along the path they take, one for each stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, final

import torch
from torch import Tensor, nn

from tessera.errors import InputError, unknown_name
from tessera.graph import Transform

__all__ = ["WeightAverage", "ema"]

# (whose, which stream) of every scope that is open in this thread or task, innermost last.
_SCOPES: ContextVar[tuple[tuple[object, str], ...]] = ContextVar("tessera_ema_scopes", default=())


def ema(decay: float = 0.999) -> WeightAverage:
    """Keep the average of the weights after each step, those long past counting less.

    ``average_t = sum_s decay^(t-s) theta_s / sum_s decay^(t-s)`` over the steps s = 1 .. t: the
    weights add up to one from the first step on, so no initial value biases it. With `decay` 1 it
    is Polyak's plain mean of all steps.

    Args:
        decay: In [0, 1]; the average looks back about ``1 / (1 - decay)`` steps.

    Returns:
        A transform for ``tg.Adam(..., plugin=...)`` or ``tg.SGD(..., plugin=...)``; last in a list
        of them. Keep it in a variable: it holds the average.

    Raises:
        InputError: `decay` is outside [0, 1].

    Source:
        Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging", SIAM J.
        Control Optim. 30(4); the correction: Kingma & Ba 2015, section 3 (arXiv:1412.6980).

    Example:
        >>> from tessera import graph as tg
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> average = ema(0.5)
        >>> optimizer = tg.SGD(model.parameters(), lr=1.0, plugin=average)
        >>> for _ in range(2):  # gradient -1: the weight is 1, then 2
        ...     optimizer.zero_grad()
        ...     (-model(torch.ones(1, 1))).sum().backward()
        ...     optimizer.step()
        >>> with average.applied(model):  # (0.5 * 1 + 1 * 2) / 1.5
        ...     round(model.weight.item(), 4)
        1.6667
        >>> model.weight.item()
        2.0
    """
    if not 0 <= decay <= 1:
        raise InputError(f"opt.ema needs a decay in [0, 1], got {decay}; write opt.ema(0.999)")
    return WeightAverage(decay)


@final
class WeightAverage(Transform):
    """What `opt.ema` gives: averages of the weights by stream, to look at and to evaluate with.

    Averages of weights in half precision are kept in float32, where a small step is not lost.

    Example:
        >>> ema(0.999).streams
        ()
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._steps: dict[str, int] = {}
        self._means: dict[str, list[Tensor]] = {}
        self._applied = 0

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams that have seen a step."""
        return tuple(self._means)

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Steps inside count to this stream; of nested scopes the inner one. Outside it is "".

        The scope holds for the thread or task that opened it.

        Example:
            >>> average = ema()
            >>> with average.stream("a"):
            ...     pass  # step here
            >>> average.streams
            ()
        """
        token = _SCOPES.set((*_SCOPES.get(), (self, name)))
        try:
            yield
        finally:
            _SCOPES.reset(token)

    def attach(self, params: Sequence[nn.Parameter]) -> None:
        """Called by the optimizer."""
        moved = self.params and [id(p) for p in self.params] != [id(p) for p in params]
        if moved or any(not _fits(means, params) for means in self._means.values()):
            raise InputError(
                "this opt.ema already averages other parameters; make a new one for another model"
            )
        self.params = params

    def before_step(self) -> None:
        """Called by the optimizer."""
        if self._applied:
            raise InputError(
                "opt.ema: a step inside `with average.applied(model)` would be undone at its end; "
                "train outside it"
            )

    @torch.no_grad()
    def after_step(self) -> None:
        """Called by the optimizer: one fused pass over the weights."""
        name = next((n for owner, n in reversed(_SCOPES.get()) if owner is self), "")
        if name not in self._means:
            self._means[name] = [torch.zeros_like(p, dtype=_precise(p)) for p in self.params]
            self._steps[name] = 0
        self._steps[name] += 1
        means = self._means[name]
        # A copy of those in half precision only.
        now = [p.detach().to(m.dtype) for p, m in zip(self.params, means, strict=True)]
        if means:
            torch._foreach_lerp_(means, now, _share(self._decay, self._steps[name]))

    def weights(self, stream: str = "", *, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Copies of a stream's average.

        Args:
            stream: Which.
            model: The trained model, for its names; without it a weight is called by its place in
                the optimizer, "0", "1", ...

        Raises:
            UnknownNameError: No step has counted to this stream.
            InputError: The model has none of the averaged parameters.

        Example:
            >>> from tessera import graph as tg
            >>> model, average = nn.Linear(2, 1), ema()
            >>> optimizer = tg.SGD(model.parameters(), lr=0.1, plugin=average)
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> list(average.weights()), list(average.weights(model=model))
            (['0', '1'], ['weight', 'bias'])
        """
        means = self._known(stream)
        if model is None:
            return {str(i): m.clone() for i, m in enumerate(means)}
        place = {id(p): i for i, p in enumerate(self.params)}
        named = {n: place[id(p)] for n, p in model.named_parameters() if id(p) in place}
        if not named:
            raise InputError(
                "opt.ema: none of this model's parameters is averaged; pass the model that the "
                "optimizer trains"
            )
        return {n: means[i].clone() for n, i in named.items()}

    def copy_to(self, model: nn.Module, stream: str = "") -> None:
        """Write a stream's average into a model: the trained one, or a copy of it.

        A copy is one whose parameters that need a gradient have the shapes of those the optimizer
        has, in that order.

        Raises:
            UnknownNameError: No step has counted to this stream.
            InputError: The model is neither; nothing was written.
        """
        means = self._known(stream)
        with torch.no_grad():
            for p, m in zip(self._targets(model), means, strict=True):
                p.copy_(m)

    @contextmanager
    def applied(self, model: nn.Module, stream: str = "") -> Iterator[None]:
        """Inside, the model has a stream's average as its weights; then, in any case, its own.

        The weights are exchanged in place: no other thread may use the model meanwhile.

        Raises:
            UnknownNameError: No step has counted to this stream.
            InputError: See `copy_to`.
        """
        self._known(stream)
        targets = self._targets(model)
        own = [p.detach().clone() for p in targets]
        self._applied += 1
        try:
            self.copy_to(model, stream)
            yield
        finally:
            self._applied -= 1
            with torch.no_grad():
                for p, w in zip(targets, own, strict=True):
                    p.copy_(w)

    def drop(self, stream: str) -> None:
        """Forget a stream.

        Raises:
            UnknownNameError: There is none of this name.
        """
        self._known(stream)
        del self._means[stream], self._steps[stream]

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many steps each has seen; it travels in the optimizer's."""
        return {
            "decay": self._decay,
            "streams": {
                n: {"steps": self._steps[n], "mean": [m.clone() for m in means]}
                for n, means in self._means.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            InputError: It is of another decay or of other shapes; nothing was changed.
        """
        streams = state["streams"]
        if state["decay"] != self._decay:
            raise InputError(
                f"opt.ema: the saved state has decay {state['decay']}, this one {self._decay}: "
                f"write opt.ema({state['decay']})"
            )
        if self.params and any(not _fits(s["mean"], self.params) for s in streams.values()):
            raise InputError("opt.ema: the saved state is of parameters of other shapes")
        # Before `attach` the dtype and place are as saved.
        likes = self.params or next((s["mean"] for s in streams.values()), [])
        self._means = {
            n: [
                m.detach().to(like.device, _precise(like), copy=True)
                for m, like in zip(s["mean"], likes, strict=True)
            ]
            for n, s in streams.items()
        }
        self._steps = {n: int(s["steps"]) for n, s in streams.items()}

    def _known(self, stream: str) -> list[Tensor]:
        if stream not in self._means:
            raise unknown_name("stream of opt.ema with a step", stream, map(repr, self._means))
        return self._means[stream]

    def _targets(self, model: nn.Module) -> list[nn.Parameter]:
        theirs = list(model.parameters())
        if {id(p) for p in self.params} <= {id(p) for p in theirs}:
            return list(self.params)
        learned = [p for p in theirs if p.requires_grad]
        if not _fits(self.params, learned):
            raise InputError(
                f"opt.ema averages parameters of shapes {[tuple(p.shape) for p in self.params]}, "
                f"the model's are {[tuple(p.shape) for p in learned]}; pass the model that the "
                "optimizer trains, or a copy of it"
            )
        return learned


def _share(decay: float, step: int) -> float:
    """How much the newest of `step` weights counts: (1 - decay) / (1 - decay^step)."""
    if decay == 1:
        return 1 / step
    if decay == 0 or step == 1:
        return 1.0
    return (1 - decay) / -math.expm1(step * math.log(decay))


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _fits(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    return [t.shape for t in tensors] == [p.shape for p in params]
