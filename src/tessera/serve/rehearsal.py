"""The loss of a fit that must not forget: new examples, older ones, a pull to where it began."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tessera.arch import Delta
from tessera.arch.labels import cotangents, resolve
from tessera.arch.overlay import overlay
from tessera.errors import InputError
from tessera.loss import recency_weighted
from tessera.ops import weighted_square
from tessera.peft.shots import LossFn, loss_of
from tessera.serve.fitting_values import Rehearsal

__all__ = ["fisher_of", "rehearsing"]

_WHO = "a fit with a rehearsal"
_FISHER_ROWS = 32  # examples: one forward each, and a backward for each class


def rehearsing(model: nn.Module, delta: Delta, rehearsal: Rehearsal, rows: int) -> LossFn:
    """A loss for `peft.fit` on new and old examples in one batch.

    ``rho new + (1 - rho) old + lam/2 sum_i F_i (theta_i - theta*_i)^2``: `loss.recency_weighted` of
    the cross entropies of both, and EWC over the delta's own tensors, with theta* their values now
    and F their Fisher on the old examples.

    Args:
        model: The base, in eval mode.
        delta: Live, as it is before the fit.
        rehearsal: The old examples, and both weights.
        rows: How many new examples the batch begins with; the old ones follow.

    Returns:
        ``loss_fn(output, y)``, 0-d.

    Raises:
        InputError: The rehearsal has no labels or no rows, or the output no scores of classes.

    Source:
        Kirkpatrick et al. 2017, eq. 3 (arXiv:1612.00796).

    Example:
        >>> from tessera import peft
        >>> model, x = nn.Linear(3, 2).eval(), torch.eye(3)
        >>> delta = peft.lora(model, r=1)
        >>> old = Rehearsal(inputs={"input": x[2:]}, labels=torch.tensor([1]), rho=0.5, lam=10.0)
        >>> loss_fn = rehearsing(model, delta, old, rows=2)
        >>> shots = x, torch.tensor([0, 1, 1])
        >>> before = loss_fn(model(x), shots[1])
        >>> _ = peft.fit(delta, shots, steps=5, loss_fn=loss_fn, model=model)
        >>> bool(loss_fn(peft.apply(model, delta)(x), shots[1]) < before)
        True
    """
    if rehearsal.labels is None or not len(rehearsal.labels):
        raise InputError(f"labels: {_WHO} needs a label for each example of before, got none")
    leaves, weights = delta.parameters(), list[Tensor]()
    if rehearsal.lam:
        some = {name: x[:_FISHER_ROWS] for name, x in rehearsal.inputs.items()}
        weights = [rehearsal.lam * f for f in fisher_of(model, delta, some)]
    centres = [leaf.detach().clone() for leaf in leaves]

    def loss_fn(output: Any, y: Any) -> Tensor:
        z = _scores(output)
        new = loss_of(z[:rows], y[:rows], None, _WHO)
        old = loss_of(z[rows:], y[rows:], None, _WHO)
        mixed = recency_weighted(new, old, rho=rehearsal.rho)
        return mixed + weighted_square(leaves, centres, weights) if weights else mixed

    return loss_fn


def fisher_of(model: nn.Module, delta: Delta, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The diagonal Fisher of a delta's tensors, ``mean_x E_{c ~ p(x)} (d log p_c(x) / d theta)^2``.

    The expectation over the classes is exact up to 32 of them; beyond that one label is drawn for
    each example. Examples are run one by one: whatever the delta lies over, no other's gradient
    is in a square.

    Args:
        model: The base, in eval mode.
        delta: Live.
        inputs: Name -> [rows, ...], rows >= 1.

    Returns:
        One for each of ``delta.parameters()``, in their shapes, >= 0.

    Raises:
        AnchorError: The output has no scores [rows, classes >= 2].
        InputError: They are not finite, or not there.

    Example:
        >>> model = nn.Linear(1, 2, bias=False).eval()
        >>> _ = nn.init.zeros_(model.weight)
        >>> delta = Delta(kind="mask", tensors={
        ...     "weight.values": torch.zeros(2, 1, requires_grad=True)})
        >>> f = fisher_of(model, delta, {"input": torch.full((4, 1), 2.0)})[0]
        >>> f.round(decimals=5).tolist()
        [[1.0], [1.0]]
    """
    leaves = delta.parameters()
    totals = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    rows = len(next(iter(inputs.values())))
    device = leaves[0].device
    with torch.inference_mode(False), torch.enable_grad():
        shadow = overlay(model, [(delta, 1.0)], frozen=True).eval()
        for row in range(rows):
            z = _scores(shadow(**{n: x[row : row + 1].to(device) for n, x in inputs.items()}))
            estimator = resolve("auto", z.detach())
            for pull in cotangents(estimator, z.detach(), None, row, 0):
                found = torch.autograd.grad(z, leaves, pull, retain_graph=True, allow_unused=True)
                for total, g in zip(totals, found, strict=True):
                    if g is not None:
                        total += g.double().square()
    return [(t / rows).to(leaf.dtype) for t, leaf in zip(totals, leaves, strict=True)]


def _scores(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise InputError(
            f"labels: {_WHO} needs scores of classes; the model gave a {type(output).__name__} "
            "without logits"
        )
    return found
