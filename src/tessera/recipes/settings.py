"""What a run is told, and what it uses where it is told nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tessera.errors import InputError

__all__ = ["Settings"]

# Strengths that work, by recipe and scenario: loss.ewc's lam, loss.si's c, loss.l2sp's and
# loss.lwf's lam, loss.der's alpha. Chosen on a validation split of the training set of Split
# Fashion-MNIST (never on test) by `python benchmarks/tune_strength.py`.
STRENGTHS: Mapping[str, Mapping[str, float]] = {
    "ewc": {"task": 1e5, "domain": 1e6, "class": 3e6, "permuted": 1e3},
    "online-ewc": {"task": 1e5, "domain": 1e5, "class": 3e6, "permuted": 1e2},
    "er+ewc": {"task": 1e4, "domain": 1e3, "class": 1e1, "permuted": 1e1},
    "si": {"task": 1e3, "domain": 1e4, "class": 1e0, "permuted": 1e1},
    "l2sp": {"task": 1.0, "domain": 0.3, "class": 0.01, "permuted": 0.01},
    "lwf": {"task": 3.0, "domain": 3.0, "class": 0.3, "permuted": 0.3},
    "der": {"task": 0.1, "domain": 0.5, "class": 1.0, "permuted": 1.0},
}
_STREAM_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "digits": {"epochs": 10, "batch_size": 32, "buffer": 200},
}
_DEFAULTS: Mapping[str, int] = {"epochs": 1, "batch_size": 128, "buffer": 500}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Settings:
    """Everything that decides the outcome of a run; None asks for the default.

    Attributes:
        recipe: A name in `recipes.RECIPES`, or the path of a file with ``def recipe(run)``.
        stream: "digits", "fashion_mnist", or a folder of IDX or .npz files.
        scenario: "task", "domain", "class" or "permuted".
        data: Where the stream's files lie, when not at their usual place.
        model: "PKG:FUNC", called with (input_shape, num_classes).
        epochs: Passes over each task, >= 1.
        batch_size: Rows of new data a step, >= 1.
        lr: Adam's learning rate, > 0.
        lam: The strength of the recipe's penalty, >= 0.
        buffer: Rows the replay holds, >= 1.
        num_tasks: How many tasks the stream is cut into.
        seed: Of the weights, the order, the replay and the permutations.
        validation: Fraction of the training rows to measure on in place of the test set.
        threads: CPU threads. 1 unless said: the last bits of a sum depend on the number, so a
            default of "all cores" would give every machine weights of its own.

    Example:
        >>> settings = Settings(recipe="ewc", scenario="domain").resolved()
        >>> settings.stream, settings.epochs, settings.lam
        ('digits', 10, 1000000.0)
    """

    recipe: str = "der"
    stream: str = "digits"
    scenario: str = "class"
    data: str | None = None
    model: str = "tessera.recipes:mlp"
    epochs: int | None = None
    batch_size: int | None = None
    lr: float = 1e-3
    lam: float | None = None
    buffer: int | None = None
    num_tasks: int = 5
    seed: int = 0
    validation: float = 0.0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "buffer", "num_tasks", "threads"):
            value = getattr(self, name)
            if value is not None and (int(value) != value or value < 1):
                raise InputError(f"{name} must be a whole number >= 1, got {value}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr must be a finite number > 0, got {self.lr}")
        if self.lam is not None and not (self.lam >= 0 and math.isfinite(self.lam)):
            raise InputError(f"lam must be a finite number >= 0, got {self.lam}")
        if not 0 <= self.validation < 1:
            raise InputError(f"validation must lie in [0, 1), got {self.validation}")

    def resolved(self) -> Settings:
        """The same with every None replaced by the default for this stream and scenario.

        Example:
            >>> Settings(stream="fashion_mnist", recipe="er").resolved().batch_size
            128
        """
        defaults = {**_DEFAULTS, **_STREAM_DEFAULTS.get(self.stream, {})}
        found: dict[str, Any] = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        if self.lam is None:
            found["lam"] = STRENGTHS.get(self.recipe, {}).get(self.scenario, 1.0)
        return replace(self, **found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON.

        Example:
            >>> Settings().to_dict()["seed"]
            0
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """What `to_dict` gave; unknown names are an error.

        Example:
            >>> Settings.from_dict({"recipe": "er"}).recipe
            'er'
        """
        known = {f.name for f in fields(cls)}
        strangers = sorted(set(values) - known)
        if strangers:
            raise InputError(f"unknown settings {strangers}; a run has: {', '.join(sorted(known))}")
        return cls(**values)
