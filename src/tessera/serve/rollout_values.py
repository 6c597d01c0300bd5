"""What rollouts hand out and take, beside experiments: values, for servers and clients alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from tessera.errors import InputError
from tessera.serve.gates import Policy
from tessera.serve.records import Alias

__all__ = ["Asked", "Feedback", "Gate", "Gated", "Shots", "Watch", "slice_value"]

_MOST_SHOTS = 20_000
_MOST_SLICES = 16
_MOST_TEXT = 100
_MOST_ID = 200


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Feedback:
    """Feedback that is kept.

    Attributes:
        request: The id of the request it is about.
        tenant: Whose.
        alias: What the request named.
        generation: Of the alias then.
        delta: That answered.
        experiment: That it took part in, or "".
        arm: "candidate", "incumbent" or "".
        outcomes: A 1 or 0 a row of the request; "": none is known.
        slices: Feature -> value.
        seq: Its event in the audit log.
    """

    request: str
    tenant: str
    alias: str
    generation: int
    delta: str
    experiment: str
    arm: str
    outcomes: str
    slices: Mapping[str, str]
    seq: int


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Watch:
    """When a promotion is taken back.

    Live accuracy is looked at after `min_n`, 2 min_n, 4 min_n ... outcomes of the promoted delta;
    where it lies below the incumbent's, as the gate's evidence has that, by more than `margin`, the
    alias is rolled back. All looks together do that in error with probability 1 - confidence at
    most: see `gates_statistics.spent`.

    Attributes:
        min_n: Outcomes before the first look, 1 to 10^6.
        margin: How much may be lost, 0 to below 1.
        confidence: Between 0.5 and 1.

    Example:
        >>> Watch(min_n=200).margin
        0.0
    """

    min_n: int = 100
    margin: float = 0.0
    confidence: float = 0.99

    def __post_init__(self) -> None:
        if type(self.min_n) is not int or not 1 <= self.min_n <= 10**6:
            raise InputError(f"a watch's min_n is 1 to 10^6, got {self.min_n!r:.40}")
        for name, low, high in (("margin", 0.0, 1.0), ("confidence", 0.5, 1.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value < high or value == 0.5:
                raise InputError(f"a watch's {name} is {low} to below {high}, got {value!r:.40}")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gate:
    """A decision that was made.

    Attributes:
        id: sha256 of its evidence, and where that is among the blobs.
        tenant: Whose.
        alias: Whose place the candidate wanted.
        generation: Of the alias then.
        incumbent: The delta there.
        candidate: The other.
        look: Which look at this pair it was, from 1.
        passed: Whether the candidate may take the place.
        decision: See `gates.decide`.
        decided_s: Seconds since 1970.
    """

    id: str
    tenant: str
    alias: str
    generation: int
    incumbent: str
    candidate: str
    look: int
    passed: bool
    decision: Mapping[str, Any]
    decided_s: float


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shots:
    """Held-out examples.

    Attributes:
        inputs: Name -> [n, ...].
        labels: The right class of each.
        ids: What to call each; empty: "0", "1", ...
        slices: Feature -> its value for each.

    Example:
        >>> import torch
        >>> Shots(inputs={"x": torch.zeros(2, 3)}, labels=[0, 1]).check()
    """

    inputs: Mapping[str, Tensor]
    labels: Sequence[int]
    ids: Sequence[str] = ()
    slices: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise unless everything is there for each of them.

        Raises:
            InputError: It is not.
        """
        n = len(self.labels)
        if not 1 <= n <= _MOST_SHOTS:
            raise InputError(f"a gate takes 1 to {_MOST_SHOTS} shots, got {n} labels")
        sizes = {f"the input {k!r}": len(v) if v.dim() else 0 for k, v in self.inputs.items()}
        sizes |= {f"the slice {k!r}": len(v) for k, v in self.slices.items()}
        if self.ids:
            sizes["ids"] = len(self.ids)
        for what, size in sizes.items():
            if size != n:
                raise InputError(f"{what} has {size} rows, and there are {n} labels")
        if not self.inputs or len(set(self.ids)) != len(self.ids):
            raise InputError("shots need inputs, and ids of which no two are the same")
        for id in self.ids:
            if not (isinstance(id, str) and len(id) <= _MOST_ID and id.isprintable()):
                raise InputError(f"an id is up to {_MOST_ID} printable characters, got {id!r:.80}")
        if len(self.slices) > _MOST_SLICES:
            raise InputError(f"shots have up to {_MOST_SLICES} slices, got {len(self.slices)}")
        for feature, values in self.slices.items():
            slice_value(feature, "-")
            for value in values:
                if value != "":  # it was not said
                    slice_value(feature, value)


def slice_value(feature: object, value: object) -> str:
    """The value that an example has for a feature, as text.

    Raises:
        InputError: It, or the feature's name, can be none.

    Example:
        >>> slice_value("language", "de"), slice_value("new", True)
        ('de', 'True')
    """
    if not (isinstance(feature, str) and 0 < len(feature) <= _MOST_TEXT and feature.isprintable()):
        raise InputError(f"a slice's feature is 1 to {_MOST_TEXT} characters; got {feature!r:.80}")
    plain = isinstance(value, str) or (isinstance(value, int) and abs(value) < 1 << 63)
    text = str(value) if plain else ""
    if not 0 < len(text) <= _MOST_TEXT or not text.isprintable():
        raise InputError(
            f"the value of the slice {feature!r} is text of 1 to {_MOST_TEXT} characters, a whole "
            f"number or a bool; got {value!r:.80}"
        )
    return text


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A gate that is asked for.

    Attributes:
        candidate: A delta's hash; None: that of the experiment.
        policy: What it has to show.
        shots: Held-out examples; None: the feedback of the experiment decides.
        output: Which output of the model has the classes; "": the only one, or "logits".
        promote: Whether the alias moves where it passes.
        watch: When it is moved back; None: never.
    """

    candidate: str | None
    policy: Policy
    shots: Shots | None
    output: str = ""
    promote: bool = False
    watch: Watch | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gated:
    """What became of it.

    Attributes:
        gate: The decision.
        alias: As it is after a promotion; None: it was not moved.
    """

    gate: Gate
    alias: Alias | None
