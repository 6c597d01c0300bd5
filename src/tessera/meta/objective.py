"""A batch's loss as a function of the parameters in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, final

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from tessera.errors import InputError
from tessera.meta.calling import Functional
from tessera.meta.guard import Guard

__all__ = ["LossFn", "Named", "Objective", "leaves"]

LossFn: TypeAlias = Callable[[Any, Any], Tensor]
Named: TypeAlias = dict[str, Tensor]


def leaves(tensors: Mapping[str, Tensor]) -> Named:
    """The same values as tensors to differentiate by; the memory is shared.

    Example:
        >>> import torch
        >>> leaves({"w": torch.ones(1)})
        {'w': tensor([1.], requires_grad=True)}
    """
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


@final
class Objective:
    """A batch's loss as a function of the parameters in training.

    The parameters that `fn` reads from the model it closes over (for a weight decay, say) are
    those it is called with, too.

    Args:
        name: Of the batch, for messages.
        run: Runs the model.
        own: The model's own parameters that are in training.
        batch: (x, y).
        fn: ``fn(model(x), y)``, 0-d.
    """

    def __init__(
        self, name: str, run: Functional, own: Named, batch: tuple[Any, Any], fn: LossFn
    ) -> None:
        self.name, self.own = name, own
        self._run, self._batch, self._fn = run, batch, fn

    def __call__(self, w: Mapping[str, Tensor]) -> Tensor:
        """The loss at `w`."""
        x, y = self._batch
        out = self._run(w, x)
        with Guard(), _Instead({id(self.own[name]): t for name, t in w.items()}):
            value = self._fn(out, y)
        if not isinstance(value, Tensor) or value.dim() != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"the loss of {self.name} must be a 0-d tensor, got {got}; take its .mean()"
            )
        return value

    def uses(self, value: Tensor, w: Mapping[str, Tensor], others: Sequence[Tensor]) -> list[bool]:
        """Which of `others` the loss `value` depends on.

        Raises:
            InputError: It does not depend on `w`, or it does on the model's own parameters.
        """
        nodes = _graph(value)
        if not any(get_gradient_edge(t).node in nodes for t in w.values()):
            raise InputError(
                f"the loss of {self.name} depends on no parameter that requires a gradient; does "
                "loss_fn use the model's output, and does the forward detach it?"
            )
        for name, own in self.own.items():
            if get_gradient_edge(own).node in nodes:
                raise InputError(
                    f"the loss of {self.name} reads the model's own {name!r} where the inner loop "
                    "cannot put its own in place (a custom autograd.Function does that); write "
                    "that term in plain operations"
                )
        return [get_gradient_edge(t).node in nodes for t in others]


@final
class _Instead(TorchFunctionMode):
    """A scope, of this thread only, in which some tensors stand for others."""

    def __init__(self, stand_ins: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        swapped = tree_map_only(
            Tensor, lambda t: self._stand_ins.get(id(t), t), (tuple(args), dict(kwargs or {}))
        )
        return func(*swapped[0], **swapped[1])


def _graph(loss: Tensor) -> set[Node]:
    """All that the loss was computed by."""
    seen: set[Node] = set()
    stack = [] if loss.grad_fn is None else [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions if n is not None]
    return seen
