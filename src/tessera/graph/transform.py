"""What a plugin of an optimizer is."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Transform"]


class Transform(abc.ABC):
    """Something that acts around every step of an optimizer: pass it as ``plugin=``.

    The optimizer calls `attach` once, then `before_step` when the gradients are complete and
    `after_step` when the weights have moved; `arch.anchor_from` calls `on_anchor`. A transform
    with memory also gives `state_dict`, which travels inside the optimizer's own.

    Example:
        >>> class Clip(Transform):
        ...     def before_step(self) -> None:
        ...         nn.utils.clip_grad_norm_(self.params, 1.0)
    """

    params: Sequence[nn.Parameter] = ()
    wants_data = False  # whether `before_anchor` is to be called

    def attach(self, params: Sequence[nn.Parameter]) -> None:
        """Called once by the optimizer, with all its parameters in order."""
        self.params = params

    @abc.abstractmethod
    def before_step(self) -> None:
        """Gradients are in ``.grad``; change them here."""

    def take_step(self, optimizer: Optimizer) -> Sequence[nn.Parameter]:
        """Do `before_step` and the optimizer's own update in one pass, where that is possible.

        Asked of the last plugin only. Gradients may be left as they are.

        Returns:
            The parameters that have been updated; empty where nothing was done.
        """
        return ()

    def after_step(self) -> None:  # noqa: B027 - doing nothing is a fair answer
        """The weights have moved; change them here."""

    def before_anchor(  # noqa: B027 - for those that want the data
        self, model: nn.Module, names: Mapping[int, str], inputs: Iterable[Tensor] | None
    ) -> None:
        """Look at the task that an anchor is about to close; `on_anchor` follows if all is well.

        Called where `wants_data` is set. It may raise, and what was known before must then stand.

        Args:
            model: A private copy in eval mode, with the names of the anchored model.
            names: As for `on_anchor`.
            inputs: The task's examples in blocks [n, ...]; None where the anchor has no data.
        """

    def on_anchor(self, names: Mapping[int, str]) -> dict[str, Any]:
        """What this transform adds to a new anchor's `stats`.

        Args:
            names: ``id(parameter)`` -> name, for every parameter of the anchored model.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, in the order of the optimizer's parameters."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - see state_dict
        """Take over what `state_dict` gave."""
