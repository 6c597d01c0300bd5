"""Learning rates of the inner loop that the outer loop learns."""

from __future__ import annotations

from typing import Literal, final

from torch import Tensor, nn

from tessera.arch.delta import Delta
from tessera.errors import InputError, unknown_name

__all__ = ["LearnedRates", "learned_rates"]

Per = Literal["parameter", "element"]


@final
class LearnedRates(nn.Module):
    """Learning rates as parameters; `learned_rates` makes it, and a call gives the rule's ``lr``.

    Example:
        >>> rates = learned_rates(nn.Linear(2, 1), 0.1)
        >>> {name: round(rate.item(), 3) for name, rate in rates().items()}
        {'weight': 0.1, 'bias': 0.1}
    """

    def __init__(self, names: list[str], rates: list[nn.Parameter], steps: int | None) -> None:
        super().__init__()
        self._names, self._steps = names, steps
        self.rates = nn.ParameterList(rates)

    def forward(self) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Parameter's name -> rate; with steps, a list of these."""
        if self._steps is None:
            return dict(zip(self._names, self.rates, strict=True))
        each = [rate.unbind() for rate in self.rates]
        return [dict(zip(self._names, row, strict=True)) for row in zip(*each, strict=True)]


def learned_rates(
    model: nn.Module | Delta,
    lr: float,
    *,
    steps: int | None = None,
    per: Per = "parameter",
) -> LearnedRates:
    """A learning rate for each parameter (and step) that the outer optimizer learns too.

    ``inner_opt=tg.SGD(model, lr=rates())``, and an outer optimizer over
    ``[*model.parameters(), *rates.parameters()]``. They may become negative.

    Args:
        model: What is adapted, or a `Delta`.
        lr: Where they begin, > 0.
        steps: As many as the inner loop has, each with rates of its own (MAML++); None shares them.
        per: "parameter", one number for each; "element", one for each of its entries (Meta-SGD).

    Returns:
        A module: ``rates()`` is the learning rate for `tg.SGD` or `tg.Adam`.

    Raises:
        InputError: `lr` or `steps` is out of range, or there is nothing to adapt.
        UnknownNameError: No such `per`.

    Source:
        Li et al. 2017, Meta-SGD (arXiv:1707.09835); Antoniou et al. 2019, MAML++, section 3
        (arXiv:1810.09502).

    Example:
        >>> rates = learned_rates(nn.Linear(2, 1), 0.1, steps=3, per="element")
        >>> len(rates()), rates()[0]["weight"].shape
        (3, torch.Size([1, 2]))
    """
    if not 0 < lr < float("inf"):
        raise InputError(f"learned_rates begins at lr > 0, got {lr!r}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InputError(f"learned_rates takes steps >= 1 or None, got {steps!r}")
    if per not in ("parameter", "element"):
        raise unknown_name("kind of rates", per, ("parameter", "element"))
    named = model.tensors.items() if isinstance(model, Delta) else model.named_parameters()
    adapted = {name: p for name, p in named if p.requires_grad}
    if not adapted:
        raise InputError("learned_rates finds no tensor that requires a gradient")
    lead = () if steps is None else (steps,)
    rates = [
        nn.Parameter(p.detach().new_full((*lead, *(p.shape if per == "element" else ())), lr))
        for p in adapted.values()
    ]
    return LearnedRates(list(adapted), rates, steps)
