"""What a fit over HTTP is asked for and what it brings, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

__all__ = ["Adapted", "FitSettings", "Origin", "Rehearsal", "Spent"]

Names = str | Sequence[str]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FitSettings:
    """How a delta is to be fitted on the server; what is None is left to it.

    Attributes:
        kind: "lora", "ia3", "mask", "prefix" or "prompt".
        r: Rank, of a lora; None: 4, or 2 or 1 where a layer is too small for that.
        alpha: Of a lora's scale ``alpha / r``.
        sites: Modules, of lora and ia3; parameters, of a mask, which needs it.
        feedforward: Modules whose input an ia3 scales.
        head: Modules that are trained whole along with it.
        tokens: Virtual tokens, of prefix and prompt, which need it.
        parent: The hash of a delta the tenant holds, to go on from: what is said above comes
            from it then, and must not be said.
        steps: Most steps.
        lr: Adam's learning rate.
        seed: Of the fresh delta.
        budget: Caps by name: ms, joules, steps.

    Example:
        >>> FitSettings(r=8, budget={"ms": 200}).steps
        20
    """

    kind: str | None = None
    r: int | None = None
    alpha: float | None = None
    sites: Names | None = None
    feedforward: Names | None = None
    head: Names | None = None
    tokens: int | None = None
    parent: str = ""
    steps: int = 20
    lr: float = 5e-3
    seed: int = 0
    budget: Mapping[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Origin:
    """How another process builds the base that this one serves: a function, called again.

    Attributes:
        function: ``PKG:FUNC``, importable where this process imports from; it returns the module.
        arguments: Its arguments by name, plain values as JSON has them.

    Example:
        >>> Origin(function="torch.nn:Linear", arguments={"in_features": 3, "out_features": 2})
        Origin(function='torch.nn:Linear', arguments={'in_features': 3, 'out_features': 2})
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rehearsal:
    """Examples of before, which a fit must not forget over the new ones.

    Attributes:
        inputs: Name -> [rows, ...]; names, dtypes and shapes of a row as the new shots have them.
        labels: int64 [rows]; None: among the inputs.
        rho: The share of the loss that the new shots have, 0 to 1; the rest is the rehearsal's.
        lam: Strength of the penalty on leaving what the fit goes on from, >= 0.

    Example:
        >>> import torch
        >>> old = Rehearsal(
        ...     inputs={"input": torch.eye(3)}, labels=torch.tensor([0, 1, 2]), rho=0.5, lam=0.0
        ... )
        >>> len(old.labels)
        3
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    rho: float
    lam: float


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spent:
    """What a fit took.

    Attributes:
        ms: Milliseconds.
        joules: Energy.
        joules_source: "nvml", "rapl" or "estimate".
    """

    ms: float
    joules: float
    joules_source: str


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapted:
    """What became of a fit.

    Attributes:
        hash: Of the delta.
        kind: Of the delta.
        rows: Shots.
        steps: Steps that were taken.
        stopped_by: "steps"; "loss", it fell no more or far enough; or the cap that ended it: "ms",
            "joules".
        first_loss: Mean loss on the shots before the first step.
        last_loss: Before the last step; where the loss ended it, at the end.
        spent: Time and energy.
        alias: What points to the delta now, and at which generation; or None.
        session: The session's name, and when it ends; or None.
    """

    hash: str
    kind: str
    rows: int
    steps: int
    stopped_by: str
    first_loss: float
    last_loss: float
    spent: Spent
    alias: Mapping[str, Any] | None = None
    session: Mapping[str, Any] | None = None
