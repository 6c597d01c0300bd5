"""What a batch or a saved state must be before a replay buffer takes anything from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tessera.data.policies import Policy
from tessera.data.rows import Column, row_problem, shown
from tessera.errors import CheckpointError, InputError

__all__ = [
    "STATE_VERSION",
    "check_batch",
    "check_slots",
    "check_state",
    "checked_fields",
    "is_count",
    "require_count",
    "require_rows",
]

STATE_VERSION = 2
_NAMES = {
    *("version", "policy", "capacity", "seed", "fields"),
    *("seen", "draws", "carry", "rows", "slots", "rule"),
}


def is_count(value: object) -> bool:
    """Whether it is a whole number >= 0.

    Example:
        >>> is_count(3), is_count(3.0), is_count(True), is_count(-1)
        (True, False, False, False)
    """
    # Below 2**62: beyond it a position would not fit numpy's integers.
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < 1 << 62


def checked_fields(capacity: object, fields: Sequence[str], *, labelled: bool) -> tuple[str, ...]:
    """The names of a buffer's fields.

    Raises:
        InputError: They, or the capacity, are out of range.
    """
    if not is_count(capacity) or capacity == 0:
        raise InputError(f"ReplayBuffer needs a whole capacity >= 1, got {capacity!r}")
    names = () if isinstance(fields, str) else tuple(fields)
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"ReplayBuffer needs different names as fields, like ('x', 'y'), got {fields!r}"
        )
    if labelled and "y" not in names:
        raise InputError(
            "ReplayBuffer('class_balanced') finds the labels in the field 'y', and there is none "
            f"among {names}; name them so"
        )
    return names


def require_rows(who: str, held: int) -> None:
    """Refuse to draw from an empty buffer.

    Raises:
        InputError: It is empty.
    """
    if not held:
        raise InputError(
            f"ReplayBuffer.{who} has nothing to draw from: add() a batch first, or call "
            "sample_like(x), which gives zero rows as long as the buffer is empty"
        )


def check_batch(
    values: Sequence[Tensor], fields: Sequence[str], columns: Sequence[Column], *, labelled: bool
) -> None:
    """Refuse rows that a buffer with these columns, empty before its first batch, cannot keep.

    Raises:
        InputError: It names the field, and what is wrong with it.
    """
    who = f"ReplayBuffer.add({', '.join(fields)})"
    if len(values) != len(fields):
        raise InputError(
            f"{who} needs {len(fields)} tensors, got {len(values)}; "
            "other names are given by ReplayBuffer(..., fields=(...))"
        )
    for name, value in zip(fields, values, strict=True):
        if problem := row_problem(value):
            raise InputError(f"{who} cannot keep {name}: it {problem}")
        if len(value) != len(values[0]):
            sizes = ", ".join(str(len(value)) for value in values)
            raise InputError(f"{who} needs as many rows in each, got {sizes}")
    if labelled:
        y = values[list(fields).index("y")]
        if y.dim() != 1 or y.is_floating_point() or y.dtype is torch.bool:
            raise InputError(f"{who} needs whole labels [n] in 'y', got {shown(y)}")
    for name, value, column in zip(fields, values, columns, strict=False):
        if value.dtype != column.dtype or value.shape[1:] != column.row_shape:
            raise InputError(
                f"{who} got {name} {shown(value)}, but the buffer holds rows of {column.dtype} "
                f"{list(column.row_shape)} since its first add; convert it, or start another"
            )


def check_state(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a state that is damaged, or of a buffer with other settings.

    Raises:
        CheckpointError: It names what is wrong.
    """
    if not isinstance(state, Mapping) or set(state) != _NAMES:
        got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"a replay state has the entries {sorted(_NAMES)}, got {got}; "
            "give what ReplayBuffer.state_dict() returned"
        )
    for name, own in settings.items():
        saved = list(state[name]) if isinstance(state[name], tuple) else state[name]
        if type(saved) is not type(own) or saved != own:
            raise CheckpointError(
                f"this replay state was saved with {name}={saved!r}, the buffer that loads it has "
                f"{name}={own!r}; build the ReplayBuffer as the saved one was"
            )
    seen, draws, carry = state["seen"], state["draws"], state["carry"]
    if not is_count(seen) or not is_count(draws):
        raise CheckpointError(f"damaged replay state: seen={seen!r}, draws={draws!r}")
    if not isinstance(carry, (int, float)) or not -1e-6 < carry < 1:
        raise CheckpointError(f"damaged replay state: carry={carry!r} is not in [0, 1)")
    held, rows = min(seen, settings["capacity"]), state["rows"]
    if not isinstance(state["slots"], Mapping) or not isinstance(state["rule"], Mapping):
        raise CheckpointError("damaged replay state: slots and rule must be dictionaries")
    if not isinstance(rows, Mapping) or ((rows or held) and set(rows) != set(settings["fields"])):
        raise CheckpointError(f"damaged replay state: rows must hold {settings['fields']}")
    for name, value in rows.items():
        problem = row_problem(value)
        if problem is None and len(value) != held:
            problem = f"has {len(value)} rows, the buffer held {held}"
        if problem:
            raise CheckpointError(f"damaged replay state: {name} {problem}")


def check_slots(slots: Mapping[str, Any], policy: Policy, held: int) -> None:
    """Refuse what is not known of `held` slots under this policy.

    Raises:
        CheckpointError: It names what is wrong.
    """
    expected = policy.known(0)
    if set(slots) != set(expected):
        raise CheckpointError(f"damaged replay state: slots must hold {sorted(expected)}")
    for name, like in expected.items():
        got = slots[name]
        if not isinstance(got, Tensor) or got.dtype != like.dtype or got.shape != (held,):
            kind = str(like.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"damaged replay state: {name} must be {kind} [{held}], got {shown(got)}"
            )


def require_count(who: str, name: str, value: object) -> None:
    """Refuse an argument that is no whole number >= 0.

    Raises:
        InputError: It is not.
    """
    if not is_count(value):
        raise InputError(f"ReplayBuffer.{who} needs a whole {name} >= 0, got {value!r}")
