"""The reservoirs of several streams as the reservoir of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tessera import random
from tessera.errors import InputError

__all__ = ["merged_state"]


def merged_state(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of one reservoir over all streams that these states are of.

    A reservoir holds the rows with the smallest keys of its stream, and keys of different seeds are
    independent. So the smallest of all held are the smallest of all seen: exactly what one buffer
    would hold. A shard that is met twice, or once more later on, counts once: its rows have the
    same keys.

    Args:
        states: Of reservoirs with one capacity and one tuple of fields.

    Raises:
        InputError: Another policy, capacities or fields that differ, rows that do not fit, or two
            streams with one seed.
    """
    if not states:
        raise InputError("ReplayBuffer.merge needs at least one buffer")
    first = states[0]
    origins: dict[int, int] = {}
    for state in states:
        if state["policy"] != "reservoir":
            why = {
                "ring": "rings of different streams have no common order",
                "prioritized": "priorities of different streams have no common scale or order",
            }.get(state["policy"], "what a label may keep depends on the labels of all streams")
            raise InputError(f"ReplayBuffer.merge cannot merge {state['policy']!r} buffers: {why}")
        for name in ("capacity", "fields"):
            if state[name] != first[name]:
                raise InputError(
                    f"ReplayBuffer.merge needs buffers of one {name}, got {first[name]} and "
                    f"{state[name]}; build the shards alike"
                )
        for seed, seen in _origins(state).items():
            origins[seed] = max(origins.get(seed, 0), seen)
    filled = [state for state in states if state["rows"]]
    rows = {name: _stacked(name, filled) for name in first["fields"]} if filled else {}
    keys = torch.cat([state["slots"]["keys"] for state in states]).numpy().view(np.uint64)
    _, where, again = np.unique(keys, return_index=True, return_inverse=True)
    chosen = torch.from_numpy(where[: first["capacity"]])
    for name, values in rows.items():
        # Rows with one key are one row, unless two streams were given the same seed.
        if not torch.equal(values[torch.from_numpy(where[again])], values):
            raise InputError(
                f"ReplayBuffer.merge: two shards of one seed hold different rows ({name}); give "
                "every shard a seed of its own, like ReplayBuffer(..., seed=rank)"
            )
    return {
        **first,
        "seed": random.key(0, "merge", *sorted(origins)) >> 1,
        "seen": sum(origins.values()),
        "draws": 0,
        "carry": 0.0,
        "slots": {
            "keys": torch.from_numpy(keys.view(np.int64))[chosen],
            "positions": torch.full((len(chosen),), -1),
        },
        "rule": {"origins": origins},
        "rows": {name: values[chosen] for name, values in rows.items()},
    }


def _origins(state: Mapping[str, Any]) -> dict[int, int]:
    """Seed -> rows seen, of each stream that is in it."""
    known: dict[int, int] = dict(state["rule"]["origins"])
    own = state["seen"] - sum(known.values())
    return known | ({state["seed"]: own} if own or not known else {})


def _stacked(name: str, states: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    parts = [state["rows"][name] for state in states]
    kinds = {(p.dtype, tuple(p.shape[1:])) for p in parts}
    if len(kinds) > 1:
        shown = " and ".join(f"{dtype} {list(shape)}" for dtype, shape in sorted(kinds, key=str))
        raise InputError(f"ReplayBuffer.merge: the rows of {name} differ: {shown}")
    return torch.cat(parts)
