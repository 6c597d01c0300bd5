"""What learning from feedback is asked for and what it tells, as values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, final

from tessera.errors import InputError
from tessera.serve.fitting_read import read_settings
from tessera.serve.fitting_values import FitSettings
from tessera.serve.gates import Policy
from tessera.serve.records import Alias
from tessera.serve.rollout_values import Watch

__all__ = [
    "AccuracyPoint",
    "LearningPolicy",
    "LearningState",
    "LearningStep",
    "Round",
    "Spending",
]

WHEN = ("drift", "schedule", "both")
_MOST_ROWS = 4096
_MOST_BYTES = 16 << 10  # each of its events has it all
_YEAR_S = 366 * 86_400.0
_OWN = ("tenant", "alias")
_CAPS = ("ms", "joules", "steps")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearningPolicy:
    """When an alias learns from its feedback, and how.

    A round fits a candidate to the newest labelled examples, rehearsing older ones, and lets a gate
    decide on examples that were held out. Each of those spans begins where the drift detector says
    that the outcomes changed; where nothing changed, as far back as the window goes.

    Attributes:
        alias: Whose place the candidates want.
        tenant: Whose it is; "": the client's own.
        on: "drift": where its answers get worse; "schedule": now and then; or "both".
        every_s: How often "schedule" is, 1 s to a year.
        min_new: Labelled examples, held-out ones included, that must have come: since the change
            on drift, since the last round on schedule.
        window: New examples that a round is fitted to, at most.
        replay: Older ones that are rehearsed, at most; 0: none are.
        rho: The new ones' share of the loss, 0 to 1; the rest is the rehearsal's.
        lam: Strength of the penalty on leaving what it goes on from, >= 0: see `loss.ewc`.
        holdout: The share of the examples that no fit sees and gates decide on, 0.05 to 0.5.
        fit: How. What it says of a kind, rank, sites and head is for a first delta, over the bare
            base; later ones go on from what the alias points to.
        gate: What a candidate has to show.
        promote: Whether the alias moves where it passes; else a person decides.
        watch: When a promotion is taken back; None: never.
        output: Which output of the model has the classes; "": the only one, or "logits".

    Example:
        >>> policy = LearningPolicy(alias="clf", fit=FitSettings(r=4))
        >>> LearningPolicy.parse("acme", "clf", policy.json()).fit.r
        4
    """

    alias: str
    tenant: str = ""
    on: str = "both"
    every_s: float = 3600.0
    min_new: int = 200
    window: int = 128
    replay: int = 128
    rho: float = 0.5
    lam: float = 10.0
    holdout: float = 0.25
    fit: FitSettings = field(default_factory=FitSettings)
    gate: Policy = field(default_factory=Policy)
    promote: bool = True
    watch: Watch | None = None
    output: str = ""

    @classmethod
    def parse(cls, tenant: str, alias: str, said: Mapping[str, Any]) -> LearningPolicy:
        """Read a policy: plain values by the names above.

        Raises:
            InputError: There is none like this; the message names the field.
        """
        known = {f.name for f in fields(cls)} - set(_OWN)
        if unknown := set(said) - known:
            raise InputError(
                f"learning has no field {min(map(str, unknown))[:60]!r}, only "
                f"{', '.join(sorted(known))}"
            )
        parts: dict[str, Any] = {**said, "tenant": tenant, "alias": alias}
        parts["fit"] = _fit(said.get("fit"))
        parts["gate"] = Policy.parse(_mapping(said.get("gate"), "gate"))
        watch = said.get("watch")
        parts["watch"] = None if watch is None else _part(Watch, watch, "watch")
        policy = cls(**parts)
        policy._check()
        return policy

    def _check(self) -> None:
        if self.on not in WHEN:
            raise InputError(f"on is one of {', '.join(WHEN)}; got {self.on!r:.40}")
        for name, least in (("min_new", 1), ("window", 1), ("replay", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= _MOST_ROWS:
                raise InputError(f"{name} is {least} to {_MOST_ROWS} examples, got {value!r:.40}")
        for name, low, high in (
            ("every_s", 1.0, _YEAR_S),
            ("rho", 0.0, 1.0),
            ("lam", 0.0, 1e12),
            ("holdout", 0.05, 0.5),
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high:
                raise InputError(f"{name} is {low:g} to {high:g}, got {value!r:.40}")
        if type(self.promote) is not bool:
            raise InputError(f"promote is true or false, got {self.promote!r:.40}")
        if self.watch is not None and not self.promote:
            raise InputError("watch says when a promotion is taken back; it needs promote: true")
        if type(self.output) is not str or len(self.output) > 256:
            raise InputError(f"output is a name, got {self.output!r:.60}")
        for name, cap in self.fit.budget.items():
            if name not in _CAPS:
                raise InputError(f"fit.budget has no field {name[:60]!r}, only {', '.join(_CAPS)}")
            if not is_amount(cap):
                raise InputError(f"fit.budget.{name} is a number > 0, got {cap!r:.40}")
        if not is_amount(self.fit.lr):
            raise InputError(f"fit.lr is a finite number > 0, got {self.fit.lr!r:.40}")
        if self.fit.parent:
            raise InputError("fit has no parent here: rounds go on from what the alias points to")
        try:
            size = len(json.dumps(self.json(), allow_nan=False, ensure_ascii=False).encode())
        except ValueError as error:  # a number, or half of a character, that no JSON has
            raise InputError(f"learning takes finite numbers and Unicode: {error}") from error
        if size > _MOST_BYTES:
            raise InputError(f"learning takes up to {_MOST_BYTES} bytes as JSON, this is {size}")

    def json(self) -> dict[str, Any]:
        """Plain values, from which `parse` makes the same."""
        found = {n: v for n, v in asdict(self).items() if n not in _OWN}
        how = {n: _plain(v) for n, v in found["fit"].items() if v is not None and n != "parent"}
        return found | {"fit": how, "gate": self.gate.json()}


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spending:
    """What a tenant's background fits may take, and what they took.

    Attributes:
        tenant: Whose.
        ms: Spent in this window, milliseconds of fits.
        joules: The same, energy.
        cap_ms: Of a window.
        cap_joules: The same; None: no cap.
        window_s: How long a window is.
        since_s: When this one began, seconds since 1970.

    Example:
        >>> spent = Spending(tenant="a", ms=1.0, joules=2.0, cap_ms=3.0, cap_joules=1.0,
        ...                  window_s=60.0, since_s=0.0)
        >>> spent.left_ms, spent.left_joules
        (2.0, 0.0)
    """

    tenant: str
    ms: float
    joules: float
    cap_ms: float
    cap_joules: float | None
    window_s: float
    since_s: float

    @property
    def left_ms(self) -> float:
        """Milliseconds that may still be spent in this window."""
        return max(0.0, self.cap_ms - self.ms)

    @property
    def left_joules(self) -> float | None:
        """Joules that may still be spent in it; None: no cap."""
        return None if self.cap_joules is None else max(0.0, self.cap_joules - self.joules)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearningStep:
    """Something that learning did: an event of the log.

    Attributes:
        seq: Its number in the log.
        time_s: Seconds since 1970.
        kind: "learn.policy", "learn.drift", "learn.fit", "learn.gate" or "learn.skip".
        delta: The candidate, where it is about one; else "".
        text: It in a line.
        body: Of the event.
    """

    seq: int
    time_s: float
    kind: str
    delta: str
    text: str
    body: Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AccuracyPoint:
    """The outcomes of some feedback that came in a row.

    Attributes:
        time_s: When the last of it came, seconds since 1970.
        n: Outcomes.
        accuracy: The share of them that was right.
        drift: Whether a drift was detected in it.
    """

    time_s: float
    n: int
    accuracy: float
    drift: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearningState:
    """How far the learning of an alias is.

    Attributes:
        policy: See `LearningPolicy`.
        fresh: Labelled examples since the last round.
        changed: Labelled examples since the change that a drift is about; 0: none is pending.
        due: How many of them the next round on drift waits for.
        mean: The share of right outcomes in the detector's window.
        width: Outcomes in that window.
        busy: Whether a round of this tenant's is under way, in whichever process.
        last_s: When the last round ended, or the policy was set, seconds since 1970.
        spending: The tenant's budget.
        steps: The last 20, the newest last.
    """

    policy: LearningPolicy
    fresh: int
    changed: int
    due: int
    mean: float
    width: int
    busy: bool
    last_s: float
    spending: Spending
    steps: Sequence[LearningStep]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Round:
    """What became of a round.

    Attributes:
        step: What it ended with: "learn.gate", or "learn.skip" with the reason.
        alias: As it is after a promotion; None: it was not moved.
    """

    step: LearningStep
    alias: Alias | None


def _mapping(said: Any, name: str) -> Mapping[str, Any]:
    if said is None:
        return {}
    if not isinstance(said, Mapping):
        raise InputError(f"{name} is an object, got {said!r:.60}")
    return said


def _fit(said: Any) -> FitSettings:
    how = {n: v for n, v in _mapping(said, "fit").items() if v is not None}
    known = [f.name for f in fields(FitSettings)]
    for name in how:
        if name not in known:
            raise InputError(f"fit has no field {str(name)[:60]!r}, only {', '.join(known)}")
    try:
        return read_settings(how)
    except InputError as error:
        raise InputError(f"fit: {error}") from error


def _part(kind: Any, said: Any, name: str) -> Any:
    if isinstance(said, kind):
        return said
    values = _mapping(said, name)
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise InputError(f"{name} has no field {str(key)[:60]!r}, only {', '.join(known)}")
    return kind(**values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def is_amount(value: object) -> bool:
    """Whether it is a finite number > 0.

    Example:
        >>> is_amount(1), is_amount(True), is_amount(float("inf"))
        (True, False, False)
    """
    return isinstance(value, int | float) and type(value) is not bool and 0 < value < math.inf
