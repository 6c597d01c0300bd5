"""The answer of one request computed again, from the log's words alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from tessera.arch import Delta
from tessera.errors import InputError
from tessera.serve.batch import Bank, Part, Plan, form_of, run

__all__ = ["execute"]


def execute(
    model: nn.Module,
    plan: Plan,
    part: int,
    inputs: Mapping[str, Tensor],
    load: Callable[[str], Delta],
) -> dict[str, Tensor]:
    """The outputs of one part of a batch, computed again, to the same bits on the same machine.

    The other parts are run with rows of padding in their place: their deltas count, for these
    decide what is computed; their values do not.

    Args:
        model: The base, in eval mode.
        plan: Of the batch.
        part: Which part.
        inputs: That part's.
        load: A delta by its hash.

    Raises:
        InputError: The plan has no such part.
    """
    if not 0 <= part < len(plan.parts):
        raise InputError(f"the batch had {len(plan.parts)} parts, there is no {part}")
    form = form_of(model)
    length = next((t.shape[1] for n, t in inputs.items() if n in form.padding), 0)
    deltas = {name: load(name) for name, _ in plan.parts if name}
    parts = []
    for at, (name, rows) in enumerate(plan.parts):
        own = dict(inputs) if at == part else {n: _blank(n, t, rows) for n, t in inputs.items()}
        parts.append(Part(inputs=own, delta=name, rows=rows, length=length))
    bank = Bank(model, max(1, len(deltas)), plan.room)
    return run(bank, form, parts, deltas, plan.bucket)[part]


def _blank(name: str, like: Tensor, rows: int) -> Tensor:
    blank = like.new_zeros(rows, *like.shape[1:])
    if name == "attention_mask":
        blank[:, :1] = 1
    return blank
