"""The saved state of a stream: what it must be before anything is taken from it."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tessera.data.checks import is_count
from tessera.data.sources import Item
from tessera.errors import CheckpointError, MissingDataError

__all__ = [
    "STATE_VERSION",
    "check_rows",
    "check_shards",
    "check_state",
    "packed",
    "runs",
    "unpacked",
]

STATE_VERSION = 1
_NAMES = {
    *("version", "window", "seed", "position", "entered", "held", "shards", "of"),
    *("schema", "drifts", "detector"),
}
_LONG = 1024


def packed(rows: Sequence[int]) -> list[int] | str:
    """Numbers of rows as they are, or, when there are many, compressed as text.

    Example:
        >>> packed([3, 1]), unpacked(packed(range(5000))) == list(range(5000))
        ([3, 1], True)
    """
    if len(rows) <= _LONG:
        return list(rows)
    raw = zlib.compress(np.array(rows, "<i8").tobytes(), 6)
    return base64.b64encode(raw).decode()


def unpacked(rows: list[int] | str) -> list[int]:
    """What `packed` was given.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(rows, str):
        raw = zlib.decompress(base64.b64decode(rows, validate=True))
        return [int(row) for row in np.frombuffer(raw, "<i8")]
    if not isinstance(rows, list) or not all(is_count(row) for row in rows):
        raise ValueError("rows are whole numbers >= 0")
    return [int(row) for row in rows]


def runs(rows: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """Ascending numbers as runs ``start .. stop - 1`` without gaps.

    Example:
        >>> list(runs([1, 2, 3, 7, 8], 2))
        [(1, 3), (3, 4), (7, 9)]
    """
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1 or i - start == longest:
            yield rows[start], rows[i - 1] + 1
            start = i


def check_state(state: Mapping[str, Any], *, window: int, seed: int) -> list[int]:
    """The rows of its window, if it is a state of a stream with these settings.

    Raises:
        CheckpointError: It names what is wrong.
    """
    if not isinstance(state, Mapping) or set(state) != _NAMES:
        got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"the state of a stream has the entries {sorted(_NAMES)}, got {got}; give what "
            "Stream.state_dict() returned"
        )
    for name, own in (("version", STATE_VERSION), ("window", window), ("seed", seed)):
        if state[name] != own:
            raise CheckpointError(
                f"this state was saved by a stream with {name}={state[name]!r}, the one that loads "
                f"it has {name}={own!r}; build the Stream as the saved one was"
            )
    position, entered, shards = state["position"], state["entered"], state["shards"]
    if not is_count(position) or not is_count(entered):
        raise CheckpointError(f"damaged state of a stream: {position=}, {entered=}")
    try:
        held = unpacked(state["held"])
    except (ValueError, zlib.error, binascii.Error) as error:
        raise CheckpointError(f"damaged state of a stream: held: {error}") from error
    if (
        len(held) != entered - position
        or len(set(held)) != len(held)
        or not all(0 <= row < entered for row in held)
        or len(held) > max(0, window - 1)
    ):
        raise CheckpointError(
            f"damaged state of a stream: {len(held)} rows in its window, {entered} have entered "
            f"and {position} were given"
        )
    if not _are_shards(shards) or sum(rows for _, rows, _ in shards) < entered:
        raise CheckpointError("damaged state of a stream: its shards have too few rows")
    if not _is_schema(state["schema"]) or not _are_counts(state["drifts"]):
        raise CheckpointError("damaged state of a stream: schema or drifts")
    return held


def _are_shards(shards: Any) -> bool:
    return isinstance(shards, list) and all(
        isinstance(s, list | tuple)
        and len(s) == 3
        and isinstance(s[0], str)
        and is_count(s[1])
        and isinstance(s[2], str)
        for s in shards
    )


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(is_count(v) for v in values)


def _is_schema(schema: Any) -> bool:
    return schema is None or (
        isinstance(schema, list)
        and len(schema) == 2
        and all(
            isinstance(field, list)
            and len(field) == 2
            and isinstance(field[0], str)
            and _are_counts(field[1])
            for field in schema
        )
    )


def check_shards(state: Mapping[str, Any], items: Sequence[Item], *, follow: bool) -> None:
    """Refuse to go on over other data than the state was saved on.

    Raises:
        MissingDataError: A shard is not there.
        CheckpointError: One has changed, or there are more without `follow`.
    """
    names = [item.name for item in items]
    for number, (name, _, fingerprint) in enumerate(state["shards"]):
        if number >= len(names) or (names[number] != name and name not in names):
            raise MissingDataError(
                f"this state was saved when the stream had read the shard {name!r}, which is not "
                f"there; put it back (there are {len(names)}: {', '.join(names[:5]) or 'none'})"
            )
        if names[number] != name:
            raise CheckpointError(
                f"this state was saved when shard {number} was {name!r}, now it is "
                f"{names[number]!r}; give the same shards in the same order"
            )
        found = items[number].fingerprint()
        if found != fingerprint:
            raise CheckpointError(
                f"the shard {name!r} is not what it was when this state was saved (its fingerprint "
                f"is {found}, it was {fingerprint}); restore it, or start the stream anew"
            )
    saved = state["of"]
    if saved is None or follow:
        return
    if saved != len(items):
        advice = "follow=True takes new ones" if len(items) > saved else "put the others back"
        raise CheckpointError(
            f"this state was saved by a stream of {saved} shards, the one that loads it has "
            f"{len(items)}; {advice}"
        )


def check_rows(name: str, saved: int, found: int, *, last: bool) -> None:
    """Refuse a shard with other rows; the last may have grown.

    Raises:
        CheckpointError: It names the shard.
    """
    if found < saved or (found != saved and not last):
        raise CheckpointError(
            f"the shard {name!r} has {found} rows, and had {saved} when it was read; restore it, "
            "or start the stream anew"
        )
